"""HQQ: grids without data, by a robust fit that lets few large errors be for many small ones.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"
(https://mobiusml.github.io/hqq_blog/; https://github.com/mobiusml/hqq, ``core/optimize.py``).

Minimized is ``Σ|W − W_r|ᵖ`` with p < 1, where ``W_r`` are the reals after rounding. Half-quadratic
splitting introduces the errors ``W_e`` as unknowns of their own and alternates:

1. ``W_e ← shrink(W − W_r)``, the proximal step of ``|·|ᵖ``: ``sign(x) · max(0, |x| −
   |x|^(p−1)/β)``;
2. the grid, fitted to ``W − W_e`` by least squares; then ``W_r`` anew; ``β ← κ β``.

The published step 2 solves for the zero point alone, as a real number: ``z ← mean(W_q − (W −
W_e)/s)``. Here zero points are integers, which such small changes do not move. So step 2 rounds
``z``, and solves for the scale as well: ``s ← ⟨W − W_e, W_q − z⟩ / ⟨W_q − z, W_q − z⟩``. Each group
keeps the best grid it met, the one it started from included.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..affine import rounded_scale
from ..spec import QuantSpec
from ..tensor import SMALLEST_SCALE
from .grid import Grid, grouped, minmax_grid, nearest

NORM, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20
"""p, β, κ and the number of steps: the published choice."""


def hqq(
    weight: Tensor,
    spec: QuantSpec,
    *,
    norm: float = NORM,
    beta: float = BETA,
    kappa: float = KAPPA,
    steps: int = STEPS,
) -> Grid:
    """The grids, one for each group of ``weight``, that make ``Σ|W − W_r|ᵖ`` small.

    Args:
        weight: ``(out, in)``, finite, not empty.
        spec: per tensor, per channel along axis 0, or per group. Where it is symmetric, zero points
            stay and only scales are solved for.
        norm: p, in (0, 1].
        beta: β of the first step, positive.
        kappa: what β grows by, at least 1.
        steps: at least 1.

    Raises:
        ValueError: a number out of range.

    >>> from zeropoint import WEIGHT_INT4
    >>> hqq(torch.randn(4, 64), WEIGHT_INT4).scale.shape
    torch.Size([4, 2])
    """
    for name, value, good in (
        ("norm", norm, 0 < norm <= 1),
        ("beta", beta, beta > 0),
        ("kappa", kappa, kappa >= 1),
        ("steps", steps, steps >= 1),
    ):
        if not good:
            raise ValueError(f"{name} is out of range, got {value!r}")
    groups = grouped(weight.detach().to(torch.float32), spec)
    start = minmax_grid(weight, spec)
    scale, zero_point = start.scale, start.zero_point
    best_scale, best_zero = scale.clone(), zero_point.clone()
    least = torch.full(scale.shape, torch.inf)
    for step in range(steps + 1):
        reals = nearest(groups, scale[..., None].float(), zero_point[..., None], spec)
        error = groups - reals
        size = error.abs()
        cost = size.pow(norm).sum(2)
        better = cost < least
        least[better] = cost[better]
        best_scale[better], best_zero[better] = scale[better], zero_point[better]
        if step == steps:
            break
        # 0^(p−1) is infinite, which shrinks an error of zero to zero, as it should be.
        kept = error.sign() * (size - size.pow(norm - 1) / beta).clamp(min=0)
        scale, zero_point = _fit(groups - kept, reals, scale, zero_point, spec)
        beta *= kappa
    return replace(start, scale=best_scale, zero_point=best_zero)


def _fit(
    target: Tensor, reals: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Scale and zero point by least squares for the integers of ``reals``; see the module."""
    integers = torch.round(reals / scale[..., None]) + zero_point[..., None]
    if not spec.symmetric:
        shift = (integers - target / scale[..., None].float()).mean(2)
        zero_point = shift.round().clamp(spec.qmin, spec.qmax).to(torch.int32)
    steps = integers - zero_point[..., None]
    squares = steps.square().sum(2)
    fitted = (target * steps).sum(2) / squares
    usable = (squares > 0) & (fitted >= SMALLEST_SCALE) & fitted.isfinite()
    fitted = torch.where(usable, fitted, scale.float())
    return rounded_scale(fitted, spec.scale_dtype), zero_point
