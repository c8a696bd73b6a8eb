"""Indexing a quantized tensor: which scales and zero points belong to the integers left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spec import PerGroup

QParams = tuple[Tensor, Tensor, int | None, int | None]
"""Scale, zero point, channel axis, group size."""


def follow(index: Any, shape: torch.Size, qparams: QParams) -> QParams:
    """What ``qparams`` of a tensor of ``shape`` become where it is indexed by ``index``.

    Raises:
        IndexError: an index that leaves no granularity of ours: one that rearranges the axes, or
            cuts groups so that they are not of one size any more.
    """
    scale, zero_point, axis, group_size = qparams
    if axis is None and group_size is None:
        return qparams
    parts = simple(index, len(shape))
    if parts is None:
        rows = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        along_rows = isinstance(rows, Tensor | list) and torch.as_tensor(rows).ndim == 1
        if along_rows and (axis == 0 or (axis is None and len(shape) > 1)):
            return scale[rows], zero_point[rows], axis, group_size
        raise IndexError(
            f"a {'per-channel' if group_size is None else 'per-group'} QTensor takes integers and "
            "slices, or one list or 1-d tensor along "
            + (
                f"channel axis 0; got {index!r} with the channel axis {axis}"
                if axis is not None
                else f"axis 0; got {index!r}"
            )
        )
    if axis is not None:
        along = parts[axis]
        axis -= sum(not isinstance(part, slice) for part in parts[:axis])
        return scale[along], zero_point[along], axis if isinstance(along, slice) else None, None
    assert group_size is not None
    at, size = _groups(parts[-1], shape[-1], group_size)
    groups = (*parts[:-1], at)
    scale, zero_point = scale[groups], zero_point[groups]
    if scale.ndim == 0:  # one element: per tensor
        return scale.to(torch.float32), zero_point.to(torch.int32), None, None
    return scale, zero_point, None, size


def simple(index: Any, ndim: int) -> tuple[Any, ...] | None:
    """An index of integers, slices, an ellipsis as one integer or slice an axis, else ``None``."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or isinstance(part, slice) or _is_int(part) for part in parts):
        return None
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        fill = ndim - (len(parts) - 1)
        parts = parts[:at] + (slice(None),) * fill + parts[at + 1 :]
    parts = parts + (slice(None),) * (ndim - len(parts))
    return parts if len(parts) == ndim and Ellipsis not in parts else None


def keeps_rows(index: Any, ndim: int) -> bool:
    """Whether an index leaves the last axis whole, so that packed rows can be taken as they are."""
    parts = simple(index, ndim)
    if parts is not None:
        return bool(parts) and parts[-1] == slice(None)
    rows = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    return ndim > 1 and isinstance(rows, Tensor | list) and torch.as_tensor(rows).ndim == 1


def _groups(along: Any, length: int, size: int) -> tuple[Any, int]:
    """Which groups an index along the last axis leaves, and of which size."""
    if not isinstance(along, slice):
        if not -length <= along < length:
            raise IndexError(f"index {along} is out of range for the last axis, of size {length}")
        return along % length // size, 1  # a column: every entry with a scale of its own
    start, stop, step = along.indices(length)
    if stop <= start:
        return slice(0, 0), size
    first, last = start // size, (stop - 1) // size
    if first == last:
        return slice(first, last + 1), size
    if start % size or step != 1:
        raise IndexError(
            f"along the last axis, a slice must begin with a group and have step 1, or lie within "
            f"one group of {size}; got {along!r}"
        )
    return slice(first, PerGroup(size).count(stop)), size


def _is_int(index: Any) -> bool:
    return not isinstance(index, bool | Tensor) and hasattr(index, "__index__")
