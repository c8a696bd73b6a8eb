"""What changing one layer costs the model's output: estimated for all layers at once, or measured.

The estimate. Let ``y`` be a sample's output, ``δ`` the error that a choice makes in one layer's
output, and ``J`` the Jacobian of the model's output with respect to that layer's output. To first
order the model's output is off by ``e = Jδ``, and its cosine with ``y`` by ``1 − cos ≈ ‖Pe‖² /
2‖y‖²``, with ``P`` the projection onto what is perpendicular to ``y``. ``J`` is far too large to be
had, but for a vector ``v`` of random signs ``E[(vᵀAδ)²] = ‖Aδ‖²`` (Hutchinson 1990), and ``vᵀA``
for ``A = PJ / ‖y‖`` is one backward pass of the float model, for all layers at once. So a forward
and a few backward passes give every layer's gradient, and each choice costs one call of the layer
more. The square makes this a Gauss-Newton estimate: second order in ``δ``, from first derivatives.

Errors of different layers are taken as unrelated, so that damages add up. :func:`compare` tells
how near the estimates come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..calibrate import progress_bar
from ..running import call, real
from .numbers import FLOAT, Check, Pair

PROBES = 4
"""Backward passes a batch: a damage is off by about ``√(2 / (samples · probes))`` of itself."""
TRUSTED = 0.8
"""Rank correlation with measured damages from which on estimates are used."""

Damages = dict[str, dict[str, float]]
"""Name of a layer → label of a choice → damage."""


class _Call:
    """A layer's input and output, and a zero that was added to the output, to differentiate by."""

    def __init__(self, x: Tensor, y: Tensor, zero: Tensor) -> None:
        self.x, self.y, self.zero = x, y, zero


def estimate(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Mapping[str, nn.Module],
    built: Mapping[str, Mapping[str, nn.Module]],
    output: Callable[[Any], Tensor],
    *,
    probes: int = PROBES,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Damages, set[str]]:
    """Estimated damages, NaN where no gradient reaches a layer; and the layers that are called.

    Args:
        model: in eval mode.
        batches: to average over.
        layers: name → float layer of ``model``.
        built: name → label → the layer that would replace it.
        output: picks the tensor that counts from what the model returns.
        probes: backward passes a batch.
        seed: of the random signs.
        progress: show a progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, dict[str, float]] = {
        n: dict.fromkeys(choices, 0.0) for n, choices in built.items()
    }
    called: set[str] = set()
    reached: set[str] = set()
    count = 0
    for batch in progress_bar(batches, "estimating", progress):
        with torch.enable_grad(), _recording(layers) as calls:
            y = real(output(call(model, batch)))
            signs = [_signs(y.detach(), generator) for _ in range(probes)]
            zeros = [c.zero for many in calls.values() for c in many]
            gradients = [
                torch.autograd.grad(
                    (y * v).sum(), zeros, retain_graph=i + 1 < probes, allow_unused=True
                )
                if y.requires_grad and zeros
                else [None] * len(zeros)
                for i, v in enumerate(signs)
            ]
        samples = signs[0].shape[0] if _has_vectors(y) else 1
        count += samples
        at = 0
        for name, many in calls.items():
            slopes = [[g[at + i] for g in gradients] for i in range(len(many))]
            at += len(many)
            called |= {name} if many else set()
            if all(g is None for per_call in slopes for g in per_call):
                continue
            reached.add(name)
            for label, layer in built[name].items():
                sums[name][label] += _squares(layer, many, slopes, samples) / probes
    damages = {
        name: {x: (s / 2 / count if name in reached else math.nan) for x, s in choices.items()}
        for name, choices in sums.items()
    }
    return damages, called


def _has_vectors(y: Tensor) -> bool:
    """As :func:`zeropoint.running.cosines`: whether dimension 0 counts samples."""
    return y.ndim > 1 and y.shape[-1] > 1


def _signs(y: Tensor, generator: torch.Generator) -> Tensor:
    """``Pᵀ v / (‖y‖ √vectors)`` for random signs ``v``: weights of the output elements."""
    v = torch.randint(0, 2, y.shape, generator=generator).to(y.device, torch.float64) * 2 - 1
    rows = (-1, y.shape[-1]) if _has_vectors(y) else (1, -1)
    a, v = y.to(torch.float64).reshape(rows), v.reshape(rows)
    power = a.square().sum(1, keepdim=True)
    usable = (power > 0) & power.isfinite()
    inverse = torch.where(usable, 1 / power.clamp(min=1e-300), 0.0)
    v = (v - a.nan_to_num() * (v * a.nan_to_num()).sum(1, keepdim=True) * inverse) * inverse.sqrt()
    vectors = len(v) // y.shape[0] if _has_vectors(y) else 1
    return (v / math.sqrt(vectors)).reshape(y.shape).to(y.dtype)


def _squares(
    layer: nn.Module, calls: Sequence[_Call], slopes: Sequence[Sequence[Any]], samples: int
) -> float:
    """``Σ (gᵀ δ)²`` over samples and probes, calls of one sample added up before."""
    found: list[Tensor | None] = [None] * len(slopes[0])
    for c, gradients in zip(calls, slopes, strict=True):
        with torch.no_grad():
            error = real(layer(c.x)).to(torch.float64) - c.y.to(torch.float64)
        # Samples are runs of rows where the layer sees them in the order of the batch.
        rows = samples if error.ndim > 1 and error.shape[0] % samples == 0 else 1
        for i, g in enumerate(gradients):
            if g is not None:
                part = (g.to(torch.float64) * error).reshape(rows, -1).sum(1)
                before = found[i]
                if before is None or before.shape == part.shape:
                    found[i] = part if before is None else before + part
                else:
                    found[i] = (before.sum() + part.sum()).reshape(1)
    return sum(float(x.square().sum()) for x in found if x is not None)


@contextmanager
def _recording(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[_Call]]]:
    """Note the calls of the layers; each output has a zero added that requires a gradient."""
    calls: dict[str, list[_Call]] = {name: [] for name in layers}

    def hook_for(name: str) -> Any:
        def hook(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            zero = torch.zeros_like(y, requires_grad=True)
            calls[name].append(_Call(x.detach(), y.detach(), zero))
            return y + zero

        return hook

    handles = [
        layer.register_forward_hook(hook_for(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it goes past the layers
    try:
        yield calls
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(layer: nn.Module, other: nn.Module) -> Iterator[None]:
    """Let ``other`` compute what ``layer`` is asked for."""

    def hook(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _y: Any) -> Any:
        return other(*args, **kwargs)

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def measure(
    fidelity: Callable[[nn.Module], np.ndarray],
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    built: Mapping[str, Mapping[str, nn.Module]],
    pairs: Sequence[tuple[str, str]],
    progress: bool,
) -> dict[tuple[str, str], float]:
    """Damages by running the model with one layer changed: ``1 −`` mean fidelity."""
    found = {}
    for name, label in progress_bar(pairs, "measuring layers", progress):
        with replaced(layers[name], built[name][label]):
            found[name, label] = 1 - float(fidelity(model).mean())
    return found


def spread(damages: Damages, count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` pairs evenly spread over the estimated damages, from smallest to largest."""
    pairs = [
        (value, name, label)
        for name, choices in damages.items()
        for label, value in choices.items()
        if label != FLOAT and math.isfinite(value)
    ]
    order = np.random.default_rng(seed).permutation(len(pairs))  # among equals, any
    ranked = sorted((pairs[i] for i in order), key=lambda p: p[0])
    if len(ranked) > count:
        at = np.linspace(0, len(ranked) - 1, count).round().astype(int)
        ranked = [ranked[i] for i in at]
    return [(name, label) for _, name, label in ranked]


def compare(damages: Damages, measured: Mapping[tuple[str, str], float]) -> Check:
    """Estimates beside what was measured."""
    pairs = tuple(Pair(n, x, damages[n][x], value) for (n, x), value in measured.items())
    spearman = math.nan
    if len(pairs) > 2:
        from scipy.stats import spearmanr

        columns = [p.estimated for p in pairs], [p.measured for p in pairs]
        if all(len(set(c)) > 1 for c in columns):
            spearman = float(spearmanr(*columns).statistic)
    ratios = [p.measured / p.estimated for p in pairs if p.estimated > 0]
    ratio = float(np.median(ratios)) if ratios else math.nan
    return Check(pairs, spearman, ratio, "estimated")
