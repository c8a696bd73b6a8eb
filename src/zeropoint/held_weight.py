"""How layers hold the integers of a weight: shapes, types and ranges, one set for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .codec import packed_size
from .layout import Layout
from .spec import PerChannel, PerGroup, QuantSpec, integer_range
from .tensor import QTensor


def buffers(
    rows: int, columns: int, bits: int, group_size: int | None, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of ``weight``, ``scale`` and ``zero_point`` of a ``(rows, columns)`` weight.

    8-bit integers are signed; fewer bits are unsigned codes, packed (:mod:`zeropoint.codec`).

    Raises:
        TypeError, ValueError: a width, group size or type of scales that is not supported.

    >>> buffers(3, 5, 4, 2, torch.bfloat16)["weight"]
    (torch.Size([3, 3]), torch.uint8)
    """
    granularity = PerChannel(0) if group_size is None else PerGroup(group_size)
    spec = QuantSpec(bits, bits == 8, False, granularity, scale_dtype)  # checks them
    per, zero_points = torch.Size((rows,)), torch.int32
    if isinstance(granularity, PerGroup):
        per, zero_points = torch.Size((rows, granularity.count(columns))), spec.dtype
    return {
        "weight": (torch.Size((rows, packed_size(columns, bits))), spec.dtype),
        "scale": (per, scale_dtype),
        "zero_point": (per, zero_points),
    }


def layout(rows: int, columns: int, bits: int, group_size: int | None) -> Layout | None:
    """The same as a :class:`QTensor` keeps it."""
    return Layout.of(torch.Size((rows, columns)), bits == 8, bits, group_size).kept()


def held(weight: QTensor) -> dict[str, Tensor]:
    """``weight``, ``scale`` and ``zero_point`` of a QTensor ``(rows, columns)`` as layers hold
    them, to be copied into buffers of :func:`buffers`.

    uint8 integers and their zero points are lowered by 128; below 8 bits signed ones are raised, as
    their codes are. Per tensor, scale and zero point stand for every row.

    Raises:
        ValueError: a QTensor that is not 2-d, or per channel along axis 1.
    """
    if weight.ndim != 2 or weight.axis not in (None, 0):
        raise ValueError(
            f"weight must be 2-d, per tensor, per group or per channel along axis 0; got shape "
            f"{tuple(weight.shape)}, axis {weight.axis}"
        )
    integers, zero_point = weight._int_repr, weight.zero_point.to(torch.int32)
    if weight.bits < 8:  # packed codes, which are unsigned whatever the integers are
        zero_point = zero_point - integer_range(weight.bits, weight.dtype == torch.int8)[0]
    elif weight.dtype == torch.uint8:
        integers = (integers.to(torch.int16) - 128).to(torch.int8)
        zero_point = zero_point - 128
    scale = weight.scale
    if scale.ndim == 0:
        scale, zero_point = scale.expand(len(weight)), zero_point.expand(len(weight))
    return {"weight": integers, "scale": scale, "zero_point": zero_point}
