"""How the parts of a QTensor fit together: shapes, ranges, and integers packed below 8 bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import codec
from .spec import SCALE_DTYPES, PerGroup, check_bits, integer_range

LEAST_SCALE, LARGEST_SCALE = 2.0**-128 + 2.0**-150, 2.0**128 - 2.0**103
"""Between these a scale and its reciprocal are finite in float32, to which it is rounded."""

_RECIPROCAL_OVERFLOWS = 2.0**-128
"""The largest scale whose reciprocal is infinite in float32."""


class Layout(NamedTuple):
    """What the integers of a QTensor are, and how many share a scale."""

    bits: int
    signed: bool
    shape: torch.Size
    group_size: int | None

    @classmethod
    def of(cls, shape: torch.Size, signed: bool, bits: int, group_size: int | None) -> Layout:
        """The layout, checked.

        Raises:
            TypeError, ValueError: another width, a group size that is no size, or groups of a 0-d
                tensor.
        """
        check_bits(bits)
        if group_size is not None:
            PerGroup(group_size)  # checks it
            if not shape:
                raise ValueError("group_size must be None for a 0-d tensor: no axis to group")
        return cls(bits, signed, shape, group_size)

    def kept(self) -> Layout | None:
        """What a QTensor keeps: nothing for 8 bits without groups, where its integers tell."""
        return None if self.bits == 8 and self.group_size is None else self


def normalized(
    layout: Layout,
    device: torch.device,
    scale: float | Tensor,
    zero_point: int | Tensor,
    axis: int | None,
) -> tuple[Tensor, Tensor, int | None]:
    """Scale, zero point and axis as a QTensor stores them.

    Raises:
        TypeError, ValueError: see :class:`zeropoint.QTensor`.
    """
    bits, signed, shape, group_size = layout
    if group_size is None or not isinstance(scale, Tensor) or scale.dtype not in SCALE_DTYPES:
        # The dtype is named: a Python float would become torch.get_default_dtype() first.
        scale = torch.as_tensor(scale, dtype=torch.float32)
    scale = scale.to(device).detach()
    zero_point = torch.as_tensor(zero_point, device=device).detach()
    if zero_point.is_floating_point() or zero_point.dtype == torch.bool:
        raise TypeError(f"zero_point must hold integers, got {zero_point.dtype}")
    if axis is not None:
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise TypeError(f"axis must be an int or None, got {type(axis).__name__}")
        if group_size is not None:
            raise ValueError(f"axis must be None where there are groups, got {axis}")
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"axis must be within [{-len(shape)}, {len(shape) - 1}] for a tensor of "
                f"{len(shape)} dimensions, got {axis}"
            )
        axis %= len(shape)
    expected: tuple[int, ...] = () if axis is None else (shape[axis],)
    kind = "per tensor" if axis is None else f"per channel along axis {axis}"
    if group_size is not None:
        expected, kind = (*shape[:-1], PerGroup(group_size).count(shape[-1])), "per group"
    elif axis is None:
        scale, zero_point = (t.reshape(()) if t.numel() == 1 else t for t in (scale, zero_point))
    for name, t in (("scale", scale), ("zero_point", zero_point)):
        if tuple(t.shape) != expected:
            raise ValueError(f"{name} must have shape {expected} ({kind}), got {tuple(t.shape)}")
    good = (scale > _RECIPROCAL_OVERFLOWS) & scale.isfinite()
    if not bool(good.all()):
        raise ValueError(
            "scale must be positive and finite in float32, and so must 1/scale; got "
            f"{float(scale[~good].flatten()[0])}"
        )
    qmin, qmax = integer_range(bits, signed)
    if zero_point.numel() and not (qmin <= int(zero_point.min()) and int(zero_point.max()) <= qmax):
        raise ValueError(
            f"zero_point must be within [{qmin}, {qmax}] for {'int' if signed else 'uint'}{bits}, "
            f"got {int(zero_point.min())}…{int(zero_point.max())}"
        )
    if group_size is None or zero_point.dtype not in (torch.int8, torch.uint8):
        zero_point = zero_point.to(torch.int32)
    return scale, zero_point, axis


def pack(integers: Tensor, bits: int) -> Tensor:
    """Integers one a byte, packed; a 0-d tensor's as a row of one."""
    qmin, _ = integer_range(bits, integers.dtype == torch.int8)
    codes = (integers - qmin).view(torch.uint8)  # below 8 bits the difference fits an int8
    return codec.pack(codes if codes.ndim else codes.reshape(1), bits)


def unpack(packed: Tensor, layout: Layout) -> Tensor:
    codes = codec.unpack(packed, layout.bits, layout.shape[-1] if layout.shape else 1)
    if layout.signed:
        codes = codes.view(torch.int8) + integer_range(layout.bits, True)[0]
    return codes.reshape(layout.shape)


def broadcastable(per_channel: Tensor, axis: int, ndim: int) -> Tensor:
    """View a vector so that it broadcasts along ``axis`` of an ``ndim``-dimensional tensor."""
    shape = [1] * ndim
    shape[axis] = -1
    return per_channel.reshape(shape)


def expand_groups(per_group: Tensor, size: int, length: int) -> Tensor:
    """``(…, groups)`` as ``(…, length)``: each group's value at every entry of the group."""
    size = min(size, length)  # of a single group it may be anything above
    return per_group.repeat_interleave(size, -1)[..., :length]
