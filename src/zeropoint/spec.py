"""How real numbers map to integers: ``QuantSpec`` and its granularities.

The equation everywhere is ``real = scale * (q - zero_point)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PerTensor:
    """One scale and one zero point for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale and one zero point for each index along ``axis``.

    Axis 0 of a Linear weight ``(out_features, in_features)`` is the output channel; axis 0 of
    activations flattened to ``(rows, features)`` is the row.
    """

    axis: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):
            raise TypeError(f"axis must be an int, got {type(self.axis).__name__}")


@dataclass(frozen=True)
class PerGroup:
    """One scale and one zero point for each run of ``size`` entries along the last axis.

    Of a Linear weight ``(out_features, in_features)`` that axis is the inputs. Where ``size`` does
    not divide it, the last group is shorter; a ``size`` above it is one group.
    """

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool):
            raise TypeError(f"size must be an int, got {type(self.size).__name__}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")

    def count(self, length: int) -> int:
        """How many groups an axis of this length has.

        >>> PerGroup(32).count(65)
        3
        """
        return -(-length // self.size)


Granularity = PerTensor | PerChannel | PerGroup

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that the scales of groups may have."""


def check_bits(bits: object) -> None:
    """Refuse a width other than 2 to 8 bits.

    Raises:
        TypeError, ValueError: another type or width.
    """
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise TypeError(f"bits must be an int, got {bits!r}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, got {bits!r}")


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest integer.

    >>> integer_range(4, signed=True)
    (-8, 7)
    """
    qmin = -(1 << (bits - 1)) if signed else 0
    return qmin, qmin + (1 << bits) - 1


@dataclass(frozen=True)
class QuantSpec:
    """Which integers stand for which reals.

    Args:
        bits: width of the integers, 2 to 8.
        signed: two's complement (8 bits: −128…127, 4 bits: −8…7) if true, else from 0 (0…255,
            0…15).
        symmetric: the zero point is fixed (0 if signed, the middle if unsigned: 128 of 8 bits) and
            the range is symmetric about real zero, so that ±the largest magnitude are both
            representable: by ±127 of signed 8 bits, ±7 of 4. The lowest integer is not used.
        granularity: ``PerTensor()``, ``PerChannel(axis)`` or ``PerGroup(size)``.
        scale_dtype: ``torch.float32``, or for groups ``torch.bfloat16`` or ``torch.float16``:
            scales are rounded to it before they are used. One scale a row takes no space worth
            saving; one a group does.

    Raises:
        ValueError: a width or a type of scales that is not supported.
        TypeError: a field of the wrong type.

    >>> QuantSpec(signed=False, symmetric=False).qmax
    255
    >>> WEIGHT_INT8.zero_point_if_symmetric
    0
    >>> WEIGHT_INT4.qmax
    15
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = PerTensor()
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for field in ("signed", "symmetric"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} must be a bool, got {getattr(self, field)!r}")
        if not isinstance(self.granularity, PerTensor | PerChannel | PerGroup):
            raise TypeError(
                "granularity must be PerTensor(), PerChannel(axis) or PerGroup(size), got "
                f"{self.granularity!r}"
            )
        if not isinstance(self.scale_dtype, torch.dtype):
            raise TypeError(f"scale_dtype must be a torch.dtype, got {self.scale_dtype!r}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {SCALE_DTYPES}, got {self.scale_dtype}")
        if self.scale_dtype != torch.float32 and not isinstance(self.granularity, PerGroup):
            raise ValueError(
                f"scale_dtype must be torch.float32 unless per group, got {self.scale_dtype}"
            )

    @property
    def qmin(self) -> int:
        """The smallest integer."""
        return integer_range(self.bits, self.signed)[0]

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return integer_range(self.bits, self.signed)[1]

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that holds the integers, one a byte."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def zero_point_if_symmetric(self) -> int:
        """The fixed zero point of a symmetric spec: 0 if signed, the middle (128) if unsigned."""
        return 0 if self.signed else 1 << (self.bits - 1)


WEIGHT_INT8 = QuantSpec(granularity=PerChannel(0))
"""Weights of a Linear layer: signed, symmetric, one scale an output channel."""

WEIGHT_INT4 = QuantSpec(4, False, False, PerGroup(32), torch.bfloat16)
"""Weights of a Linear layer in 4 bits: with zero points, a scale and zero point for 32 inputs.

The scales are bfloat16: beside an error of 4 bits their rounding is nothing, and they are a tenth
of the bytes, which is what a small batch waits for.
"""

ACTIVATION_UINT8 = QuantSpec(signed=False, symmetric=False)
"""Static activations: unsigned, with a zero point, one scale for the tensor."""


def int4(
    group: int | None = 32, *, symmetric: bool = False, scale_dtype: torch.dtype | None = None
) -> QuantSpec:
    """A spec of 4-bit weights.

    Args:
        group: entries along the inputs that share a scale; ``None`` means one scale an output
            channel.
        symmetric: signed integers about zero point 0; otherwise unsigned ones with zero points.
        scale_dtype: see :class:`QuantSpec`; by default bfloat16 with groups, float32 without.

    >>> int4() == WEIGHT_INT4
    True
    """
    granularity = PerChannel(0) if group is None else PerGroup(group)
    if scale_dtype is None:
        scale_dtype = torch.float32 if group is None else torch.bfloat16
    return QuantSpec(4, symmetric, symmetric, granularity, scale_dtype)
