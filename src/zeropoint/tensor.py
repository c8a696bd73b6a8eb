"""``QTensor``: integers with a scale and a zero point. ``real = scale * (q - zero_point)``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .spec import PerChannel, PerTensor, QuantSpec

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""No scale is chosen below the smallest normal float32, so that ``1/scale`` stays finite."""

_RECIPROCAL_OVERFLOWS = 2.0**-128
"""The largest scale whose reciprocal is infinite in float32."""

SIGNED = {torch.int8: True, torch.uint8: False, torch.qint8: True, torch.quint8: False}


def broadcastable(per_channel: Tensor, axis: int, ndim: int) -> Tensor:
    """View a vector so that it broadcasts along ``axis`` of an ``ndim``-dimensional tensor."""
    shape = [1] * ndim
    shape[axis] = -1
    return per_channel.reshape(shape)


class QTensor:
    """Integers with a scale and a zero point: ``real = scale * (q - zero_point)``.

    A plain object that holds plain tensors, not a ``torch.Tensor`` subclass. Made by
    :func:`quantize_per_tensor` and :func:`quantize_per_channel`; the constructor takes integers
    that exist already.

    Args:
        int_repr: the integers, ``torch.int8`` or ``torch.uint8``, any shape.
        scale: positive and finite in float32, and so its reciprocal (above 2⁻¹²⁸). A float or 0-d
            tensor, or for per-channel a vector with one entry for each index along the channel
            axis. Stored as float32, the type the arithmetic uses.
        zero_point: an int, or integers of ``scale``'s shape, within the range of the integers.
            Stored as int32.
        axis: the channel axis; ``None`` means per tensor.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a shape, scale, zero point or axis that does not fit.

    >>> q = QTensor(torch.tensor([0, 128, 255], dtype=torch.uint8), 0.5, 128)
    >>> q.dequantize()
    tensor([-64.0000,   0.0000,  63.5000])
    >>> q[1:]
    QTensor([ 0.0000, 63.5000], dtype=uint8, scale=0.5, zero_point=128)
    """

    __slots__ = (
        "__weakref__",
        "_axis",
        "_int_repr",
        "_numbers",
        "_packed",
        "_scalars",
        "_scale",
        "_zero_point",
    )

    def __init__(
        self,
        int_repr: Tensor,
        scale: float | Tensor,
        zero_point: int | Tensor = 0,
        axis: int | None = None,
    ) -> None:
        if not isinstance(int_repr, Tensor) or int_repr.dtype not in (torch.int8, torch.uint8):
            got = int_repr.dtype if isinstance(int_repr, Tensor) else type(int_repr).__name__
            raise TypeError(f"int_repr must be a torch.int8 or torch.uint8 tensor, got {got}")
        device = int_repr.device
        # The dtype is named: a Python float would become torch.get_default_dtype() first.
        scale = torch.as_tensor(scale, dtype=torch.float32, device=device).detach()
        zero_point = torch.as_tensor(zero_point, device=device).detach()
        if zero_point.is_floating_point() or zero_point.dtype == torch.bool:
            raise TypeError(f"zero_point must hold integers, got {zero_point.dtype}")
        if axis is not None:
            if not isinstance(axis, int) or isinstance(axis, bool):
                raise TypeError(f"axis must be an int or None, got {type(axis).__name__}")
            if not -int_repr.ndim <= axis < int_repr.ndim:
                raise ValueError(
                    f"axis must be within [{-int_repr.ndim}, {int_repr.ndim - 1}] for a tensor of "
                    f"{int_repr.ndim} dimensions, got {axis}"
                )
            axis %= int_repr.ndim
        expected = () if axis is None else (int_repr.shape[axis],)
        if axis is None:
            scale, zero_point = (
                t.reshape(()) if t.numel() == 1 else t for t in (scale, zero_point)
            )
        for name, t in (("scale", scale), ("zero_point", zero_point)):
            if tuple(t.shape) != expected:
                raise ValueError(
                    f"{name} must have shape {expected} "
                    f"({'per tensor' if axis is None else f'per channel along axis {axis}'}), "
                    f"got {tuple(t.shape)}"
                )
        if not bool(_good(scale).all()):
            raise ValueError(
                "scale must be positive and finite in float32, and so must 1/scale; got "
                f"{float(scale[~_good(scale)].flatten()[0])}"
            )
        info = torch.iinfo(int_repr.dtype)
        if zero_point.numel() and not (
            info.min <= int(zero_point.min()) and int(zero_point.max()) <= info.max
        ):
            raise ValueError(
                f"zero_point must be within [{info.min}, {info.max}] for {int_repr.dtype}, got "
                f"{int(zero_point.min())}…{int(zero_point.max())}"
            )
        self._int_repr = int_repr
        self._scale = scale
        self._zero_point = zero_point.to(torch.int32)
        self._axis = axis
        self._packed: Any = None  # the hardware layout, kept by kernels.packed()
        self._scalars: Any = None  # scale and zero point as numbers, kept by scalars()
        self._numbers: Any = None  # the same, where their tensors are still to be made

    @classmethod
    def from_torch(cls, q: Tensor) -> QTensor:
        """Convert one of torch's own quantized tensors (``quint8`` or ``qint8``).

        torch keeps scales in float64 and computes with them in float32; ours are float32 from the
        start, so that the integers and the reals they stand for are the same.

        Raises:
            TypeError: not a quantized tensor, or of a dtype other than quint8 and qint8.
            ValueError: a quantization scheme that is not affine with integer zero points.
        """
        if not isinstance(q, Tensor) or not q.is_quantized:
            raise TypeError(f"q must be a quantized torch.Tensor, got {_describe(q)}")
        if q.dtype not in SIGNED:
            raise TypeError(f"q must be of torch.quint8 or torch.qint8, got {q.dtype}")
        scheme = q.qscheme()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that its accessors are deprecated
            if scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
                return cls(q.int_repr(), q.q_scale(), q.q_zero_point())
            if scheme in (torch.per_channel_affine, torch.per_channel_symmetric):
                return cls(
                    q.int_repr(),
                    q.q_per_channel_scales(),
                    q.q_per_channel_zero_points(),
                    q.q_per_channel_axis(),
                )
        raise ValueError(f"q must be per-tensor or per-channel affine, got {scheme}")

    @classmethod
    def _of(cls, integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> QTensor:
        """From parts of a QTensor, which are valid already."""
        q = cls.__new__(cls)
        q._int_repr, q._scale, q._zero_point, q._axis = integers, scale, zero_point, axis
        q._packed = q._scalars = q._numbers = None
        return q

    @classmethod
    def _of_numbers(cls, integers: Tensor, numbers: tuple[float, int]) -> QTensor:
        """From a valid scale and zero point per tensor, whose tensors are made when asked for: that
        takes longer than a small layer."""
        q = cls.__new__(cls)
        q._int_repr, q._numbers, q._axis = integers, numbers, None
        q._packed = q._scalars = None
        return q

    def __getattr__(self, name: str) -> Any:
        if name not in ("_scale", "_zero_point"):
            raise AttributeError(f"'QTensor' object has no attribute {name!r}")
        scale, zero_point = self._numbers
        device = self._int_repr.device
        self._scale = torch.scalar_tensor(scale, dtype=torch.float32, device=device)
        self._zero_point = torch.scalar_tensor(zero_point, dtype=torch.int32, device=device)
        self._numbers = None  # from here on the tensors count: they may be changed in place
        return self._scale if name == "_scale" else self._zero_point

    @classmethod
    def per_tensor(
        cls, integers: Tensor, scale: float | Tensor, zero_point: int | Tensor
    ) -> QTensor:
        """``QTensor(integers, scale, zero_point)``, quicker for what the arithmetic itself gives:
        0-d float32 and int32 tensors, or numbers, on the device of the integers."""
        if type(scale) is float:
            scale = torch.scalar_tensor(scale, dtype=torch.float32, device=integers.device)
        if type(zero_point) is int and -128 <= zero_point <= 255:
            zero_point = torch.scalar_tensor(zero_point, dtype=torch.int32, device=integers.device)
        if not isinstance(scale, Tensor) or not isinstance(zero_point, Tensor):
            return cls(integers, scale, zero_point)
        low = -128 if integers.dtype is torch.int8 else 0
        if (
            scale.dtype is torch.float32
            and zero_point.dtype is torch.int32
            and scale.ndim == zero_point.ndim == 0
            and not scale.requires_grad
            and scale.device == zero_point.device == integers.device
        ):
            q = cls._of(integers, scale, zero_point, None)
            s, z = q.scalars()
            if 2.0**-128 < s < float("inf") and low <= z <= low + 255:
                return q
        return cls(integers, scale, zero_point)

    def like(self, integers: Tensor) -> QTensor:
        """Other integers of the same dtype with this tensor's scale and zero point, per tensor."""
        self._require_per_tensor("like")
        q = QTensor._of(integers, self._scale, self._zero_point, None)
        q._scalars = self._scalars
        return q

    def scalars(self) -> tuple[float, int]:
        """``(q_scale(), q_zero_point())``, read from their tensors once and after a change."""
        scale, zero_point = self._scale, self._zero_point
        if scale.is_inference() or zero_point.is_inference():
            return scale.item(), zero_point.item()  # type: ignore[return-value]
        known, versions = self._scalars, (scale._version, zero_point._version)
        if known is None or known[0] != versions:
            known = self._scalars = (versions, (scale.item(), zero_point.item()))
        return known[1]

    # What torch's quantized tensors answer, under the same names.

    def int_repr(self) -> Tensor:
        """The integers themselves (not a copy): ``torch.int8`` or ``torch.uint8``."""
        return self._int_repr

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
        """``torch.per_tensor_affine`` or ``torch.per_channel_affine``."""
        return torch.per_tensor_affine if self._axis is None else torch.per_channel_affine

    def dequantize(self) -> Tensor:
        """The reals the integers stand for, float32: ``scale * (q - zero_point)``."""
        scale, zero_point = self._scale, self._zero_point
        if self._axis is not None:
            scale = broadcastable(scale, self._axis, self.ndim)
            zero_point = broadcastable(zero_point, self._axis, self.ndim)
        return (self._int_repr.to(torch.int32) - zero_point).to(torch.float32) * scale

    # What any tensor answers.

    @property
    def scale(self) -> Tensor:
        """The scale as stored: float32, 0-d or ``(channels,)``."""
        return self._scale

    @property
    def zero_point(self) -> Tensor:
        """The zero point as stored: int32, 0-d or ``(channels,)``."""
        return self._zero_point

    @property
    def axis(self) -> int | None:
        """The channel axis, or ``None`` if per tensor."""
        return self._axis

    @property
    def spec(self) -> QuantSpec:
        """The :class:`QuantSpec` these integers follow."""
        signed = self.dtype == torch.int8
        middle = 0 if signed else 128
        return QuantSpec(
            signed=signed,
            symmetric=bool((self._zero_point == middle).all()),
            granularity=PerTensor() if self._axis is None else PerChannel(self._axis),
        )

    @property
    def shape(self) -> torch.Size:
        return self._int_repr.shape

    @property
    def dtype(self) -> torch.dtype:
        """``torch.int8`` or ``torch.uint8``."""
        return self._int_repr.dtype

    @property
    def device(self) -> torch.device:
        return self._int_repr.device

    @property
    def ndim(self) -> int:
        return self._int_repr.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self._int_repr.numel()

    def __len__(self) -> int:
        return len(self._int_repr)

    def clone(self) -> QTensor:
        """A copy that shares no memory with this tensor."""
        return QTensor._of(
            self._int_repr.clone(), self._scale.clone(), self._zero_point.clone(), self._axis
        )

    def to(self, device: torch.device | str) -> QTensor:
        """The same integers, scale and zero point on ``device``."""
        return QTensor._of(
            self._int_repr.to(device),
            self._scale.to(device),
            self._zero_point.to(device),
            self._axis,
        )

    def __getitem__(self, index: Any) -> QTensor:
        """Index as a tensor. Integers are shared (views); scale and zero point follow the axis.

        Per channel, an index that selects one channel gives a per-tensor ``QTensor``; indices that
        rearrange the axes (tensors, ``None``, lists before the channel axis) raise ``IndexError``
        where the channel axis can no longer be told.
        """
        integers = self._int_repr[index]
        if self._axis is None:
            return QTensor._of(integers, self._scale, self._zero_point, None)
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is Ellipsis or isinstance(part, slice) or _is_int(part) for part in parts):
            if (
                self._axis == 0
                and len(parts) == 1
                and isinstance(parts[0], Tensor | list)
                and torch.as_tensor(parts[0]).ndim == 1
            ):
                return QTensor._of(integers, self._scale[parts[0]], self._zero_point[parts[0]], 0)
            raise IndexError(
                "a per-channel QTensor takes integers and slices, or one list or 1-d tensor along "
                f"channel axis 0; got {index!r} with the channel axis {self._axis}"
            )
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            fill = self.ndim - (len(parts) - 1)
            parts = parts[:at] + (slice(None),) * fill + parts[at + 1 :]
        parts = parts + (slice(None),) * (self.ndim - len(parts))
        along = parts[self._axis]
        axis = self._axis - sum(not isinstance(part, slice) for part in parts[: self._axis])
        return QTensor._of(
            integers,
            self._scale[along],
            self._zero_point[along],
            axis if isinstance(along, slice) else None,
        )

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """For ``copy``: the packed form is of this process and is made again when needed."""
        parts = ("_axis", "_int_repr", "_scale", "_zero_point")
        return None, {name: getattr(self, name) for name in parts} | {
            "_numbers": None,
            "_packed": None,
            "_scalars": None,
        }

    def __repr__(self) -> str:
        values = str(self.dequantize())
        body = values[len("tensor(") : -1].replace("\n" + " " * 7, "\n" + " " * 8)
        dtype = str(self.dtype).removeprefix("torch.")
        if self._axis is None:
            tail = f"scale={self.q_scale():.9g}, zero_point={self.q_zero_point()}"
        else:
            tail = (
                f"scale={_vector(self._scale)}, zero_point={_vector(self._zero_point)}, "
                f"axis={self._axis}"
            )
        return f"QTensor({body}, dtype={dtype}, {tail})"

    def _require_per_tensor(self, name: str) -> None:
        if self._axis is not None:
            raise ValueError(f"{name} needs a per-tensor QTensor; this one is per channel")

    def _require_per_channel(self, name: str) -> None:
        if self._axis is None:
            raise ValueError(f"{name} needs a per-channel QTensor; this one is per tensor")


def _good(scale: Tensor) -> Tensor:
    return (scale > _RECIPROCAL_OVERFLOWS) & scale.isfinite()


def _is_int(index: Any) -> bool:
    return not isinstance(index, bool | Tensor) and hasattr(index, "__index__")


def _describe(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _vector(values: Tensor) -> str:
    shown = [f"{v:.4g}" for v in values[:4].tolist()]
    return f"[{', '.join(shown)}{', …' if len(values) > 4 else ''}]"
