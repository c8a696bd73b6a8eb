"""Where values lie before quantization, and which integers they become. All counts."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ..input_transform import transform_input, walsh_hadamard
from ..modules import QuantizedLinear
from ..observers import GrowingHistogram
from ..reference import quantize_rows, quantize_static
from ..tensor import QTensor
from .numbers import Grid, Histogram, Integers

BINS = 64
"""Of a histogram, at most."""

_SAMPLE = 1 << 17
"""Of a call with more activations, so many are counted, in rows taken evenly."""


class Inputs:
    """The activations that a layer is fed with, and the integers it makes of them.

    Where the layer changes its input first, by a factor and a rotation, the changed ones.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        self.layer = layer
        self._reals = GrowingHistogram()
        self._integers = torch.zeros(256, dtype=torch.int64)
        self._lo, self._hi = math.inf, -math.inf

    def add(self, x: Tensor | QTensor) -> None:
        """Count one call's input."""
        if isinstance(x, QTensor):
            x = x.dequantize()
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        rows = rows[:: max(1, rows.numel() // _SAMPLE)]
        rows = rows[rows.isfinite().all(1)].cpu()
        if not rows.numel():
            return
        if self.layer.input_factor is not None:
            rows = transform_input(rows, self.layer.input_factor.cpu(), self.layer.rotation)
        lo, hi = (float(v) for v in rows.aminmax())
        self._lo, self._hi = min(self._lo, lo), max(self._hi, hi)
        self._reals.add(rows.reshape(-1), self._lo, self._hi)
        q = _integers(self.layer, rows)
        if q is not None:
            self._integers += torch.bincount(q.reshape(-1), minlength=256)

    def histogram(self) -> Histogram | None:
        """Of the floats; the grid is that of a static layer."""
        if not math.isfinite(self._lo):
            return None
        h = self._reals
        width = math.ldexp(1.0, h.exponent)
        counts = h.counts.astype(np.int64)
        if len(counts):
            counts[-h.first] += int(h.zeros)  # the bin that begins at zero
            edges = (h.first + np.arange(len(counts) + 1)) * width
        else:
            counts, edges = np.array([int(h.zeros)]), np.array([0.0, 1.0])
        grids: tuple[Grid, ...] = ()
        scale, zero_point = self.layer.input_scale, self.layer.input_zero_point
        if scale is not None and zero_point is not None:
            grids = (Grid("every value", float(scale), int(zero_point), 0, 255),)
        return _histogram(counts, edges, self._lo, self._hi, grids)

    def integers(self) -> Integers | None:
        """What became of them; ``None`` where the layer leaves activations float."""
        counts = tuple(self._integers.tolist())
        return Integers(0, counts) if any(counts) else None


def _integers(layer: QuantizedLinear, rows: Tensor) -> Tensor | None:
    if layer.mode == "dynamic":
        return quantize_rows(rows)[0]
    if layer.mode == "static":
        scale, zero_point = layer.input_scale, layer.input_zero_point
        assert scale is not None
        assert zero_point is not None
        return quantize_static(rows, scale.cpu(), zero_point.cpu())[0]
    return None


def weights(linear: nn.Linear, quantized: QuantizedLinear) -> tuple[Histogram | None, Integers]:
    """The float weights over the finest, median and coarsest grid, and the integers they became.

    Where the layer changes its input first, the weights of the changed input.
    """
    q = quantized.weight_qtensor()
    spec, codes = q.spec, q.int_repr().cpu().to(torch.int64).reshape(-1)
    counts = torch.bincount(codes - spec.qmin, minlength=spec.qmax - spec.qmin + 1)
    integers = Integers(spec.qmin, tuple(counts.tolist()))
    w = linear.weight.detach().to("cpu", torch.float32)
    if quantized.input_factor is not None:  # W = H(W′) · f, and H(H(W)) is size · W
        size = quantized.rotation
        w = walsh_hadamard(w / quantized.input_factor.cpu(), size) / size
    w = w.reshape(-1)
    w = w[w.isfinite()]
    if not w.numel():
        return None, integers
    found, edges = torch.histogram(w, BINS)
    h = _histogram(
        found.numpy().astype(np.int64), edges.double().numpy(), float(w.min()), float(w.max()),
        _grids(q),
    )  # fmt: skip
    return h, integers


def _grids(q: QTensor) -> tuple[Grid, ...]:
    spec, scale, zero_point = q.spec, q.scale.cpu().float(), q.zero_point.cpu().to(torch.int32)
    groups = scale.shape[-1] if scale.ndim > 1 else 1
    scale, zero_point = scale.reshape(-1), zero_point.reshape(-1)
    order = scale.argsort(stable=True)

    def place(n: int) -> str:
        where = f"channel {n // groups}"
        return where if groups == 1 else f"{where}, group {n % groups}"

    chosen = {"finest": order[0], "median": order[len(order) // 2], "coarsest": order[-1]}
    if bool((scale == scale[0]).all()) and bool((zero_point == zero_point[0]).all()):
        chosen = {"every": order[0]}
    return tuple(
        Grid(
            "every channel" if which == "every" else f"{which}, {place(int(n))}",
            float(scale[n]),
            int(zero_point[n]),
            spec.qmin,
            spec.qmax,
        )
        for which, n in chosen.items()
    )


def _histogram(
    counts: np.ndarray, edges: np.ndarray, lo: float, hi: float, grids: tuple[Grid, ...]
) -> Histogram:
    """At most :data:`BINS` bins between ``lo`` and ``hi``, of finer ones."""
    full = np.flatnonzero(counts)
    first, last = (int(full[0]), int(full[-1]) + 1) if len(full) else (0, len(counts))
    size = -(-(last - first) // BINS)
    starts = np.arange(first, last, size)
    merged = np.add.reduceat(counts, starts)
    ends = [*(float(edges[i]) for i in starts), float(edges[last])]
    # The first and last bin reach just as far as there are values.
    ends[0], ends[-1] = max(ends[0], lo), min(max(ends[-1], lo), hi)
    ends = [float(f"{e:.9g}") for e in ends]
    if any(a >= b for a, b in pairwise(ends)):  # too narrow for bins that can be told apart
        wide = max(0.5, 1e-3 * abs(lo))
        ends, merged = [lo - wide, hi + wide], np.array([int(merged.sum())])
    return Histogram(tuple(ends), tuple(int(c) for c in merged), grids)
