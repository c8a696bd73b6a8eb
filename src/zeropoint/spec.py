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


Granularity = PerTensor | PerChannel


@dataclass(frozen=True)
class QuantSpec:
    """Which integers stand for which reals.

    Args:
        bits: width of the integers. 8 is the only width so far.
        signed: ``torch.int8`` (−128…127) if true, ``torch.uint8`` (0…255) if false.
        symmetric: the zero point is fixed (0 if signed, 128 if unsigned) and the range is
            symmetric about real zero, so that ±the largest magnitude are both representable.
        granularity: ``PerTensor()`` or ``PerChannel(axis)``.

    Raises:
        ValueError: a width that is not supported.
        TypeError: a field of the wrong type.

    >>> QuantSpec(signed=False, symmetric=False).qmax
    255
    >>> WEIGHT_INT8.zero_point_if_symmetric
    0
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = PerTensor()

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise ValueError(f"bits must be 8, got {self.bits!r}")
        for field in ("signed", "symmetric"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} must be a bool, got {getattr(self, field)!r}")
        if not isinstance(self.granularity, PerTensor | PerChannel):
            raise TypeError(
                f"granularity must be PerTensor() or PerChannel(axis), got {self.granularity!r}"
            )

    @property
    def qmin(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return self.qmin + (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that stores the integers."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def zero_point_if_symmetric(self) -> int:
        """The fixed zero point of a symmetric spec: 0 if signed, 128 if unsigned."""
        return 0 if self.signed else 1 << (self.bits - 1)


WEIGHT_INT8 = QuantSpec(granularity=PerChannel(0))
"""Weights of a Linear layer: signed, symmetric, one scale an output channel."""

ACTIVATION_UINT8 = QuantSpec(signed=False, symmetric=False)
"""Static activations: unsigned, with a zero point, one scale for the tensor."""
