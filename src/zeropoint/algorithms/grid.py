"""Grids: the reals that integers can stand for, one grid for each group of a weight's entries.

All algorithms that choose scales and zero points return a :class:`Grid`; those that choose integers
on a given grid take one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..affine import choose_qparams, quantize_per_channel, quantize_per_group, quantize_per_tensor
from ..spec import PerChannel, PerGroup, PerTensor, QuantSpec
from ..tensor import QTensor

SHRINKING = tuple(f / 50 for f in range(50, 9, -1))
"""Fractions of a group's range that :func:`search_grid` tries: 1.00, 0.98, … 0.20."""

_CHUNK = 1 << 22  # entries of a weight that a search looks at in one go


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight ``(out, in)``, in the layout of its groups.

    A grid is made of ``rows × groups`` small grids of ``size`` columns each: per tensor 1 × 1,
    per channel ``out`` × 1, per group ``out`` × ``ceil(in / size)``.

    Args:
        spec: per tensor, per channel along axis 0, or per group.
        in_features: of the weight.
        scale: of ``spec.scale_dtype``, ``(rows, groups)``.
        zero_point: int32 ``(rows, groups)``.
    """

    spec: QuantSpec
    in_features: int
    scale: Tensor
    zero_point: Tensor

    @property
    def size(self) -> int:
        """How many neighbouring columns share a scale and zero point."""
        return group_size(self.spec, self.in_features)

    def columns(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each column, ``(rows, in)``."""
        return tuple(  # type: ignore[return-value]
            t.repeat_interleave(self.size, 1)[:, : self.in_features]
            for t in (self.scale, self.zero_point)
        )

    def nearest(self, weight: Tensor) -> Tensor:
        """The reals of this grid nearest to ``weight`` ``(out, in)``, in its dtype."""
        scale, zero_point = self.columns()
        return nearest(weight, scale, zero_point, self.spec)

    def qtensor(self, weight: Tensor) -> QTensor:
        """``weight`` rounded to this grid."""
        spec, weight = self.spec, weight.detach().to(torch.float32)
        if isinstance(spec.granularity, PerTensor):
            scale, zero_point = self.scale.reshape(()), self.zero_point.reshape(())
            return quantize_per_tensor(weight, scale, zero_point, spec.dtype, bits=spec.bits)
        if isinstance(spec.granularity, PerChannel):
            scale, zero_point = self.scale[:, 0], self.zero_point[:, 0]
            return quantize_per_channel(weight, scale, zero_point, 0, spec.dtype, bits=spec.bits)
        size = spec.granularity.size  # as the spec has it: a row may be shorter than a group
        return quantize_per_group(
            weight, self.scale, self.zero_point, size, spec.dtype, bits=spec.bits
        )


def group_size(spec: QuantSpec, in_features: int) -> int:
    """How many neighbouring columns of a weight share a scale and zero point, at least 1."""
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else in_features
    return max(1, min(size, in_features))


def grouped(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A weight ``(out, in)`` as ``(rows, groups, entries)``, short groups filled up with zeros,
    which every grid represents exactly."""
    if isinstance(spec.granularity, PerTensor):
        return weight.reshape(1, 1, -1)
    size = group_size(spec, weight.shape[1])
    missing = -weight.shape[1] % size
    return torch.nn.functional.pad(weight, (0, missing)).reshape(len(weight), -1, size)


def minmax_grid(weight: Tensor, spec: QuantSpec) -> Grid:
    """The grids that cover each group's smallest and largest entry: nothing is clipped.

    Args:
        weight: ``(out, in)``, finite, not empty.
        spec: per tensor, per channel along axis 0, or per group.
    """
    groups = grouped(weight, spec)
    return _grid(groups.amin(2), groups.amax(2), weight, spec)


def nearest(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The reals nearest to ``weight``; ``scale`` and ``zero_point`` broadcast against it."""
    scale, zero_point = scale.to(weight.dtype), zero_point.to(weight.dtype)
    q = torch.round(weight * (1 / scale) + zero_point).clamp_(spec.qmin, spec.qmax)
    return q.sub_(zero_point).mul_(scale)


Cost = Callable[[Tensor], Tensor]
"""Rounding errors ``(rows, groups, entries)`` → what they cost, ``(rows, groups)``."""


def search_grid(
    weight: Tensor, spec: QuantSpec, cost: Cost | None = None, one_sided: bool = True
) -> Grid:
    """The grids whose rounding costs least, of those that clip their groups' ranges.

    Both ends of a group's range shrink in proportion, by the fractions :data:`SHRINKING`; then, if
    the zero points are free, each end alone. Of equal costs the wider range stays.

    Args:
        weight: ``(out, in)``, finite, not empty.
        spec: per tensor, per channel along axis 0, or per group.
        cost: what an error costs, by default the sum of its squares.
        one_sided: whether to move each end alone as well.
    """
    weight = weight.detach()
    chunk = max(1, _CHUNK // weight.shape[1])
    if isinstance(spec.granularity, PerTensor):
        chunk = len(weight)
    ends = [
        _search(grouped(weight[at : at + chunk], spec), spec, cost, one_sided)
        for at in range(0, len(weight), chunk)
    ]
    low, high = (torch.cat(e) for e in zip(*ends, strict=True))
    return _grid(low, high, weight, spec)


def _search(
    groups: Tensor, spec: QuantSpec, cost: Cost | None, one_sided: bool
) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    best_low, best_high = low.clone(), high.clone()
    least = torch.full_like(low, torch.inf)

    def attempt(a: Tensor, b: Tensor) -> None:
        scale, zero_point = choose_qparams(a, b, spec)
        error = nearest(groups, scale[..., None], zero_point[..., None], spec) - groups
        costs = error.square_().sum(2) if cost is None else cost(error)
        better = costs < least
        least[better], best_low[better], best_high[better] = costs[better], a[better], b[better]

    for f in SHRINKING:
        attempt(low * f, high * f)
    if one_sided and not spec.symmetric:
        start = best_low.clone()
        for f in SHRINKING:
            attempt(start, high * f)
        start = best_high.clone()
        for f in SHRINKING:
            attempt(low * f, start)
    return best_low, best_high


def _grid(low: Tensor, high: Tensor, weight: Tensor, spec: QuantSpec) -> Grid:
    scale, zero_point = choose_qparams(low, high, spec)
    return Grid(spec, weight.shape[1], scale, zero_point)
