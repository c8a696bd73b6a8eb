"""GPTQ: round one column after the other, and let the columns to come make up for the error.

Source: Frantar, Ashkboos, Hoefler and Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", algorithm 1 (https://arxiv.org/abs/2210.17323), after Frantar
and Alistarh 2022, "Optimal Brain Compression" (https://arxiv.org/abs/2208.11580).

The error of a layer's output is ``tr((Ŵ − W) H (Ŵ − W)ᵀ)`` with ``H = E[xᵀ x]``. When column ``j``
is rounded with error ``e``, the best change of the columns after it is ``−e / U[j,j] · U[j,j+1:]``,
where ``U`` is upper triangular and ``H⁻¹ = Uᵀ U``. What is added to the paper:

* ``U`` comes from one Cholesky factorization and one triangular inverse of ``H`` in reversed order
  (``H = R Rᵀ`` with ``R`` upper triangular gives ``U = R⁻¹``), in float64, instead of inverting
  ``H`` and factorizing the inverse: half the work, and ``H`` is never inverted.
* A channel that was always zero in the data is rounded to nearest. The paper's code sets its
  weights to zero, which is as good on the data and worse on any other.
* Where ``H`` cannot be factorized for lack of precision, damping is raised tenfold until it can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import QuantSpec
from ..tensor import QTensor
from .grid import Grid, group_size, minmax_grid, nearest

DAMPING = 0.01
"""What is added to H's diagonal, as a fraction of the diagonal's mean: the paper's choice."""

BLOCK = 128
"""Columns whose effect on the rest is applied in one product: the paper's choice."""


def gptq(
    weight: Tensor,
    spec: QuantSpec,
    gram: Tensor,
    grid: Grid | None = None,
    *,
    activation_order: bool = True,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> QTensor:
    """Quantize a weight so that the layer's output changes little on the data it was shown.

    Args:
        weight: ``(out, in)``, finite, not empty. Computed in float32, or float64 if it is that.
        spec: per tensor, per channel along axis 0, or per group.
        gram: ``E[xᵀ x]`` of the layer's inputs, ``(in, in)``, any positive multiple.
        grid: the scales and zero points to use. By default those that cover each group's range:
            of the weight as it is with ``activation_order``, else of the weight as changed by the
            columns before, as in the paper.
        activation_order: round the columns by falling ``H[j,j]``, so that those that matter most
            have most columns left to make up for them (the paper's code calls it ``act_order``).
        damping: fraction of ``H``'s mean diagonal that is added to the diagonal, at least 0.
        block: columns a block, at least 1. Changes only the order of sums.

    Raises:
        ValueError: ``gram`` of another shape, not finite or with a negative diagonal; ``damping``
            or ``block`` out of range; a ``grid`` for another weight.

    >>> from zeropoint import WEIGHT_INT8
    >>> w, x = torch.randn(4, 8), torch.randn(100, 8)
    >>> gptq(w, WEIGHT_INT8, x.T @ x / 100).shape
    torch.Size([4, 8])
    """
    columns = weight.shape[1]
    if tuple(gram.shape) != (columns, columns):
        raise ValueError(f"gram must have shape {(columns, columns)}, got {tuple(gram.shape)}")
    if not bool(gram.isfinite().all()):
        raise ValueError("gram must be finite, got NaN or Inf")
    if not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping!r}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block!r}")
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()):
        raise ValueError(f"gram must have no negative diagonal, got {float(diagonal.min())}")
    weight = weight.detach()
    if weight.dtype != torch.float64:
        weight = weight.to(torch.float32)
    order = torch.arange(columns, device=weight.device)
    if activation_order:
        order = diagonal.argsort(descending=True, stable=True)
        grid = minmax_grid(weight, spec) if grid is None else grid
    factor = inverse_factor(gram[order][:, order], damping).to(weight.dtype)
    w = weight.T[order].contiguous()  # (in, out): a column's entries side by side
    found = _round_columns(w, factor, order, spec, grid, block)
    scale, zero_point, real = found
    result = Grid(spec, columns, scale, zero_point)
    return result.qtensor(real[order.argsort()].T)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular ``U`` with ``(H + damping)⁻¹ = Uᵀ U``, float64 ``(in, in)``.

    Channels without any activation get a diagonal entry of their own, and so no influence.
    """
    h = gram.to(torch.float64).flip(0, 1)
    diagonal = h.diagonal().clone()
    dead = diagonal <= 0
    mean = float(diagonal.mean()) or 1.0
    h[dead] = 0.0
    h[:, dead] = 0.0
    diagonal[dead] = mean
    while True:
        h.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(h)
        if not int(failed):
            break
        damping = max(10 * damping, 1e-6)
    one = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1)


def _round_columns(
    w: Tensor, factor: Tensor, order: Tensor, spec: QuantSpec, grid: Grid | None, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, zero points and reals ``(in, out)``, in the order of rounding; ``w`` is used up."""
    columns, rows = w.shape
    size = group_size(spec, columns)
    if grid is not None:
        scale, zero_point = grid.scale, grid.zero_point
    else:
        start = minmax_grid(w.T, spec)  # the layout; each group's numbers come when it is reached
        scale, zero_point = start.scale.clone(), start.zero_point.clone()
    real = torch.empty_like(w)
    for begin, end in _blocks(columns, size, block):
        errors = torch.empty(end - begin, rows, dtype=w.dtype, device=w.device)
        for j in range(begin, end):
            column = int(order[j])
            group = column // size
            if grid is None and column % size == 0 and column:
                now = minmax_grid(w[j : j + size].T, spec)
                scale[:, group], zero_point[:, group] = now.scale[:, 0], now.zero_point[:, 0]
            real[j] = nearest(w[j], scale[:, group], zero_point[:, group], spec)
            error = (w[j] - real[j]).div_(factor[j, j])
            w[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
            errors[j - begin] = error
        w[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return scale, zero_point, real


def _blocks(columns: int, size: int, block: int) -> list[tuple[int, int]]:
    """First and last column of each block. None begins within a group and ends beyond it, so that
    a group's columns are up to date when it is reached."""
    step = size * max(1, block // size)  # whole groups, or one group in pieces
    return [
        (begin, min(begin + block, end) if size > block else end)
        for start in range(0, columns, step)
        for end in [min(start + step, columns)]
        for begin in (range(start, end, block) if size > block else [start])
    ]
