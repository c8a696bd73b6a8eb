"""Inputs for the kernels, by hazard, and what the reference makes of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bits import assert_same_bits
from zeropoint import QTensor, functional, kernels, reference
from zeropoint.affine import quantize

# Without the core, the reference stands in, so that what surrounds the kernels is tested at least.
ISAS = [name for name in kernels.available_isas() if name != kernels.REFERENCE] or ["reference"]

FLOAT_MODES = ("dynamic", "static", "weight-only")
INTEGER_MODES = ("integer", "quantized")  # QTensor in; float out, QTensor out
MODES = FLOAT_MODES + INTEGER_MODES
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BYTES = (torch.uint8, torch.int8)

ORDINARY = ("gaussian", "positive", "negative", "offset", "sparse")
HAZARDS = (
    *ORDINARY,
    "zero",
    "constant",
    "denormal",
    "tiny",
    "huge",
    "spread",
    "halves",
    "nan",
    "inf",
    "-inf",
    "alternating",
)


def activations(
    g: torch.Generator, m: int, k: int, dtype: torch.dtype, kinds: tuple[str, ...] = HAZARDS
) -> Tensor:
    """``(m, k)`` floats; every row is of a kind drawn from ``kinds``."""
    x = torch.randn(m, k, generator=g)
    for row in x:
        kind = kinds[int(torch.randint(len(kinds), (), generator=g))]
        at = int(torch.randint(k, (), generator=g)) if k else slice(0)
        if kind == "positive":
            row.abs_()
        elif kind == "negative":
            row.abs_().neg_().sub_(1)
        elif kind == "offset":
            row.add_(100)
        elif kind == "sparse":
            row.mul_(torch.rand(k, generator=g) < 0.1)
        elif kind == "zero":
            row.zero_()
            row[at] = -0.0
        elif kind == "constant":
            row.fill_(float(torch.randn((), generator=g)))
        elif kind == "denormal":
            row.mul_(1e-40)
        elif kind == "tiny":
            row.mul_(1e-36)
        elif kind == "huge":
            row.mul_(1e38).clamp_(-3.4e38, 3.4e38)
        elif kind == "spread":
            row.mul_(torch.pow(2.0, torch.randint(-60, 60, (k,), generator=g)))
        elif kind == "halves":  # scale 1 and zero point 128 by its ends, the rest halfway
            row.copy_(torch.randint(-127, 127, (k,), generator=g) + 0.5)
            row[:2] = torch.tensor([-128.0, 127.0])[: min(k, 2)]
        elif kind == "alternating":
            row.fill_(1.0)
            row[::2] = -1.0
        elif kind in ("nan", "inf", "-inf"):
            row[at] = float(kind)
    return x.to(dtype)


def weights(
    g: torch.Generator,
    n: int,
    k: int,
    dtype: torch.dtype = torch.int8,
    per_channel: bool = True,
    zero_points: bool = False,
    extreme: bool = False,
) -> QTensor:
    """``(n, k)`` integers over the full range; ``extreme``: at its ends, scales of 2**±100."""
    info = torch.iinfo(dtype)
    shape = (n,) if per_channel else ()
    integers = torch.randint(info.min, info.max + 1, (n, k), generator=g, dtype=torch.int32)
    scale = torch.rand(shape, generator=g) * 0.02 + 0.001
    zero_point = torch.full(shape, (info.min + info.max + 1) // 2, dtype=torch.int32)
    if zero_points:
        zero_point = torch.randint(info.min, info.max + 1, shape, generator=g, dtype=torch.int32)
    if extreme:
        ends = torch.tensor([info.min, info.max], dtype=torch.int32)
        integers = ends[torch.randint(2, (n, k), generator=g)]
        scale = torch.pow(2.0, torch.randint(-100, 100, shape, generator=g)) * (1 + scale)
        if zero_points:
            zero_point = ends[torch.randint(2, shape, generator=g)]
    return QTensor(integers.to(dtype), scale, zero_point, 0 if per_channel else None)


class Case:
    """A call in one of the modes; ``compute()`` by what is active, ``expected()`` by reference."""

    def __init__(
        self,
        mode: str,
        x: Tensor,
        weight: QTensor,
        bias: Tensor | None = None,
        scale: float = 0.02,
        zero_point: int = 100,
        out_scale: float = 0.5,
        out_zero_point: int = 90,
    ) -> None:
        self.mode, self.weight, self.bias = mode, weight, bias
        self.scale, self.zero_point = scale, zero_point
        self.out_scale, self.out_zero_point = out_scale, out_zero_point
        self.x: Tensor = x  # floats, or the integers of a QTensor

    def compute(self) -> Tensor:
        x, w, b = self.x, self.weight, self.bias
        if self.mode == "dynamic":
            return functional.linear_dynamic(x, w, b)
        if self.mode == "static":
            return functional.linear_static(x, w, b, self.scale, self.zero_point)
        if self.mode == "weight-only":
            return functional.linear_weight_only(x, w, b)
        q = QTensor(x, self.scale, self.zero_point)
        if self.mode == "integer":
            return functional.linear_static(q, w, b)
        return functional.linear(q, w, b, self.out_scale, self.out_zero_point).int_repr()

    def expected(self) -> Tensor:
        lead, k = self.x.shape[:-1], self.x.shape[-1]
        x, w = self.x.reshape(lead.numel(), k), self.weight
        b = None if self.bias is None else self.bias.to(torch.float32)
        scale = torch.tensor(self.scale, dtype=torch.float32)
        zero_point = torch.tensor(self.zero_point, dtype=torch.int32)
        if self.mode == "dynamic":
            y = reference.linear_dynamic(x, w, b)
        elif self.mode == "static":
            y = reference.linear_static(x, scale, zero_point, w, b)
        elif self.mode == "weight-only":
            y = reference.linear_weight_only(x, w, b)
        else:
            y = reference.linear_integer(x, scale, zero_point, w, b)
        if self.mode == "quantized":
            info = torch.iinfo(x.dtype)
            out = torch.tensor(self.out_scale, dtype=torch.float32)
            y = quantize(y, out, torch.tensor(self.out_zero_point), info.min, info.max)
        dtype = torch.float32 if self.mode == "integer" else self.x.dtype
        return y.to(dtype).reshape(*lead, w.shape[0])


def make(
    mode: str,
    m: int,
    k: int,
    n: int,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    kinds: tuple[str, ...] = ORDINARY,
    weight: QTensor | None = None,
    bias: bool = True,
) -> Case:
    """An ordinary case of a shape; integers are uniform over their range."""
    g = torch.Generator().manual_seed(seed)
    w = weights(g, n, k) if weight is None else weight
    b = torch.randn(n, generator=g) if bias else None
    if mode in FLOAT_MODES:
        return Case(mode, activations(g, m, k, dtype or torch.float32, kinds), w, b)
    dtype = dtype or torch.uint8
    info = torch.iinfo(dtype)
    q = torch.randint(info.min, info.max + 1, (m, k), generator=g, dtype=torch.int32).to(dtype)
    return Case(mode, q, w, b, 0.02, 100, 0.1, 90)


def each_isa() -> Iterator[str]:
    """Force every instruction set in turn, and make sure that it is the one that computes."""
    for isa in ISAS:
        with kernels.force_isa(isa):
            assert kernels.active_isa() == isa
            if kernels.core is not None:
                assert kernels.core.active_isa() == isa
            yield isa


def check(case: Case, note: str = "") -> None:
    """Every instruction set gives the bits of the reference."""
    expected = case.expected()
    for isa in each_isa():
        assert kernels.usable(case.x, case.weight) == (isa != kernels.REFERENCE)
        assert_same_bits(case.compute(), expected, f"{isa} {case.mode} {note}")
        # Once more by the short way, now that the weight is packed.
        assert_same_bits(case.compute(), expected, f"{isa} {case.mode} {note} again")
