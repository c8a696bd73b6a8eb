"""What torch's own quantized tensors answer, under the same names: for :class:`QTensor`."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor

SIGNED = {torch.int8: True, torch.uint8: False, torch.qint8: True, torch.quint8: False}


_Q = TypeVar("_Q", bound="TorchNames")


class TorchNames:
    """The methods of a QTensor that torch's have too, and the way from those."""

    __slots__ = ()

    _axis: int | None
    _layout: Any
    scalars: Any
    _scale: Tensor
    _zero_point: Tensor

    @classmethod
    def from_torch(cls: type[_Q], q: Tensor) -> _Q:
        """Convert one of torch's own quantized tensors (``quint8`` or ``qint8``).

        torch keeps scales in float64 and computes with them in float32; ours are float32 from the
        start, so that the integers and the reals they stand for are the same.

        Raises:
            TypeError: not a quantized tensor, or of a dtype other than quint8 and qint8.
            ValueError: a quantization scheme that is not affine with integer zero points.
        """
        if not isinstance(q, Tensor) or not q.is_quantized:
            got = f"a tensor of {q.dtype}" if isinstance(q, Tensor) else type(q).__name__
            raise TypeError(f"q must be a quantized torch.Tensor, got {got}")
        if q.dtype not in SIGNED:
            raise TypeError(f"q must be of torch.quint8 or torch.qint8, got {q.dtype}")
        scheme = q.qscheme()
        parts: tuple[Any, ...] = ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that its accessors are deprecated
            if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
                parts = (q.q_scale(), q.q_zero_point())
            elif scheme in (torch.per_channel_affine, torch.per_channel_symmetric):
                parts = (
                    q.q_per_channel_scales(),
                    q.q_per_channel_zero_points(),
                    q.q_per_channel_axis(),
                )
        if not parts:
            raise ValueError(f"q must be per-tensor or per-channel affine, got {scheme}")
        return cls(q.int_repr(), *parts)  # type: ignore[call-arg]

    def q_scale(self) -> float:
        """The scale of a per-tensor quantized tensor. Raises ``ValueError`` if per channel."""
        self._require_per_tensor("q_scale")
        return self.scalars()[0]

    def q_zero_point(self) -> int:
        """The zero point of a per-tensor quantized tensor. ``ValueError`` if per channel."""
        self._require_per_tensor("q_zero_point")
        return self.scalars()[1]

    def q_per_channel_scales(self) -> Tensor:
        """Scales, float32 ``(channels,)``. Raises ``ValueError`` if per tensor."""
        self._require_per_channel("q_per_channel_scales")
        return self._scale

    def q_per_channel_zero_points(self) -> Tensor:
        """Zero points, int32 ``(channels,)``. Raises ``ValueError`` if per tensor."""
        self._require_per_channel("q_per_channel_zero_points")
        return self._zero_point

    def q_per_channel_axis(self) -> int:
        """The channel axis. Raises ``ValueError`` if per tensor."""
        self._require_per_channel("q_per_channel_axis")
        assert self._axis is not None
        return self._axis

    def qscheme(self) -> torch.qscheme:
        """``torch.per_tensor_affine`` or ``torch.per_channel_affine``; torch has none for groups.

        Raises:
            ValueError: per group.
        """
        if self._group_size() is not None:
            raise ValueError("qscheme needs a per-tensor or per-channel QTensor; this has groups")
        return torch.per_tensor_affine if self._axis is None else torch.per_channel_affine

    def _group_size(self) -> int | None:
        return None if self._layout is None else self._layout.group_size

    def _require_per_tensor(self, name: str) -> None:
        if self._axis is not None or self._group_size() is not None:
            kind = "channel" if self._group_size() is None else "group"
            raise ValueError(f"{name} needs a per-tensor QTensor; this one is per {kind}")

    def _require_per_channel(self, name: str) -> None:
        if self._axis is None:
            kind = "tensor" if self._group_size() is None else "group"
            raise ValueError(f"{name} needs a per-channel QTensor; this one is per {kind}")
