"""``QTensor``: integers with a scale and a zero point. ``real = scale * (q - zero_point)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import codec, indexing
from .layout import Layout, broadcastable, expand_groups, normalized, pack, unpack
from .spec import PerChannel, PerGroup, PerTensor, QuantSpec, integer_range
from .torch_names import TorchNames

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""No scale is chosen below the smallest normal float32, so that ``1/scale`` stays finite."""


class QTensor(TorchNames):
    """Integers with a scale and a zero point: ``real = scale * (q - zero_point)``.

    A plain object that holds plain tensors, not a ``torch.Tensor`` subclass. Made by
    :func:`quantize_per_tensor`, :func:`quantize_per_channel` and :func:`quantize_per_group`; the
    constructor takes integers that exist already. Below 8 bits they are stored packed
    (:mod:`zeropoint.codec`).

    Args:
        int_repr: the integers, ``torch.int8`` or ``torch.uint8``, any shape.
        scale: positive and finite in float32, and so its reciprocal (above 2⁻¹²⁸). A float or 0-d
            tensor; for per-channel a vector with one entry for each index along the channel
            axis; for groups of shape ``(*int_repr.shape[:-1], groups)``. Stored as float32, the
            type the arithmetic uses; for groups bfloat16 and float16 stay as they are.
        zero_point: an int, or integers of ``scale``'s shape, within the range of the integers.
            Stored as int32; for groups int8 and uint8 stay as they are.
        axis: the channel axis; ``None`` means per tensor.
        bits: width of the integers, 2 to 8.
        group_size: entries along the last axis that share a scale; ``None`` means no groups. The
            last group may be shorter.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a shape, scale, zero point or axis that does not fit; an integer that ``bits``
            cannot hold.

    >>> q = QTensor(torch.tensor([0, 128, 255], dtype=torch.uint8), 0.5, 128)
    >>> q.dequantize()
    tensor([-64.0000,   0.0000,  63.5000])
    >>> q[1:]
    QTensor([ 0.0000, 63.5000], dtype=uint8, scale=0.5, zero_point=128)
    """

    __slots__ = (
        "__weakref__",
        "_axis",
        "_int_repr",  # as stored: packed codes below 8 bits
        "_layout",  # None for 8 bits without groups
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
        *,
        bits: int = 8,
        group_size: int | None = None,
    ) -> None:
        if not isinstance(int_repr, Tensor) or int_repr.dtype not in (torch.int8, torch.uint8):
            got = int_repr.dtype if isinstance(int_repr, Tensor) else type(int_repr).__name__
            raise TypeError(f"int_repr must be a torch.int8 or torch.uint8 tensor, got {got}")
        layout = Layout.of(int_repr.shape, int_repr.dtype == torch.int8, bits, group_size)
        qparams = normalized(layout, int_repr.device, scale, zero_point, axis)
        if bits < 8:
            qmin, qmax = integer_range(bits, layout.signed)
            if int_repr.numel() and not (qmin <= int_repr.min() and int_repr.max() <= qmax):
                raise ValueError(
                    f"int_repr must be within [{qmin}, {qmax}] for {bits} bits, got "
                    f"{int(int_repr.min())}…{int(int_repr.max())}"
                )
            int_repr = pack(int_repr, bits)
        self._int_repr = int_repr
        self._scale, self._zero_point, self._axis = qparams
        self._layout = layout.kept()
        self._packed: Any = None  # the hardware layout, kept by kernels.packed()
        self._scalars: Any = None  # scale and zero point as numbers, kept by scalars()
        self._numbers: Any = None  # the same, where their tensors are still to be made

    @classmethod
    def from_packed(
        cls,
        codes: Tensor,
        shape: Sequence[int],
        scale: float | Tensor,
        zero_point: int | Tensor,
        axis: int | None = None,
        *,
        bits: int,
        signed: bool = False,
        group_size: int | None = None,
    ) -> QTensor:
        """From integers that are packed already; ``codes`` is not copied.

        Args:
            codes: uint8 ``(*shape[:-1], bytes)``, as :func:`zeropoint.codec.pack` gives them.
            shape: of the integers.
            scale, zero_point, axis, bits, group_size: as of the class, with ``bits`` below 8.
            signed: whether the integers are, that is, what code 0 stands for.

        Raises:
            TypeError, ValueError: as the class; codes of another shape, or padding that is not
                zero.
        """
        layout = Layout.of(torch.Size(shape), signed, bits, group_size)
        shape = layout.shape
        row = codec.packed_size(shape[-1] if shape else 1, bits)
        if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"codes must be a torch.uint8 tensor, got {got}")
        if bits == 8 or codes.shape != (*shape[:-1], row):
            raise ValueError(
                f"codes must have shape {(*shape[:-1], row)} for {bits} bits (below 8) and "
                f"integers of shape {tuple(shape)}, got {tuple(codes.shape)}"
            )
        if not codec.padding_is_zero(codes, bits, shape[-1] if shape else 1):
            raise ValueError("codes must have zero bits after the last code of each row")
        return cls._of(codes, *normalized(layout, codes.device, scale, zero_point, axis), layout)

    @classmethod
    def _of(
        cls,
        integers: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        axis: int | None,
        layout: Layout | None = None,
    ) -> QTensor:
        """From parts of a QTensor, which are valid already."""
        q = cls.__new__(cls)
        q._int_repr, q._scale, q._zero_point, q._axis = integers, scale, zero_point, axis
        q._layout = layout
        q._packed = q._scalars = q._numbers = None
        return q

    @classmethod
    def _of_plain(
        cls,
        integers: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        axis: int | None,
        bits: int,
        group_size: int | None,
    ) -> QTensor:
        """The same, with the integers one a byte, to be packed."""
        layout = Layout(bits, integers.dtype == torch.int8, integers.shape, group_size)
        stored = integers if bits == 8 else pack(integers, bits)
        return cls._of(stored, scale, zero_point, axis, layout.kept())

    @classmethod
    def _of_numbers(cls, integers: Tensor, numbers: tuple[float, int]) -> QTensor:
        """From a valid scale and zero point per tensor, whose tensors are made when asked for: that
        takes longer than a small layer."""
        q = cls.__new__(cls)
        q._int_repr, q._numbers, q._axis = integers, numbers, None
        q._packed = q._scalars = q._layout = None
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
        if self._layout is not None:
            raise ValueError(f"like needs a QTensor of 8 bits; this one has {self._layout.bits}")
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

    # More that torch's quantized tensors answer, under the same names.

    def int_repr(self) -> Tensor:
        """The integers, ``torch.int8`` or ``torch.uint8``: of 8 bits themselves, not a copy; below,
        where they are stored packed, taken out."""
        layout = self._layout
        if layout is None or layout.bits == 8:
            return self._int_repr
        return unpack(self._int_repr, layout)

    def dequantize(self) -> Tensor:
        """The reals the integers stand for, float32: ``scale * (q - zero_point)``."""
        scale, zero_point = self._scale, self._zero_point
        if self._axis is not None:
            scale = broadcastable(scale, self._axis, self.ndim)
            zero_point = broadcastable(zero_point, self._axis, self.ndim)
        elif self.group_size is not None:
            sizes = self.group_size, self.shape[-1]
            scale = expand_groups(scale.to(torch.float32), *sizes)
            zero_point = expand_groups(zero_point.to(torch.int32), *sizes)
        return (self.int_repr().to(torch.int32) - zero_point).to(torch.float32) * scale

    # What any tensor answers.

    @property
    def scale(self) -> Tensor:
        """The scale as stored: float32, 0-d or ``(channels,)``; or ``(…, groups)``, which may be
        bfloat16 or float16."""
        return self._scale

    @property
    def zero_point(self) -> Tensor:
        """The zero point as stored: int32, 0-d or ``(channels,)``; or ``(…, groups)``, which may be
        int8 or uint8."""
        return self._zero_point

    @property
    def axis(self) -> int | None:
        """The channel axis, or ``None`` if not per channel."""
        return self._axis

    @property
    def bits(self) -> int:
        """Width of the integers, 2 to 8."""
        return 8 if self._layout is None else self._layout.bits

    @property
    def group_size(self) -> int | None:
        """Entries along the last axis that share a scale, or ``None`` if not per group."""
        return None if self._layout is None else self._layout.group_size

    @property
    def spec(self) -> QuantSpec:
        """The :class:`QuantSpec` these integers follow."""
        signed, bits = self.dtype == torch.int8, self.bits
        middle = 0 if signed else 1 << (bits - 1)
        granularity: PerTensor | PerChannel | PerGroup
        if self.group_size is not None:
            granularity = PerGroup(self.group_size)
        else:
            granularity = PerTensor() if self._axis is None else PerChannel(self._axis)
        symmetric = bool((self._zero_point == middle).all())
        return QuantSpec(bits, signed, symmetric, granularity, self._scale.dtype)

    @property
    def shape(self) -> torch.Size:
        return self._int_repr.shape if self._layout is None else self._layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of :meth:`int_repr`: ``torch.int8`` or ``torch.uint8``."""
        if self._layout is None:
            return self._int_repr.dtype
        return torch.int8 if self._layout.signed else torch.uint8

    @property
    def device(self) -> torch.device:
        return self._int_repr.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d QTensor")
        return self.shape[0]

    def clone(self) -> QTensor:
        """A copy that shares no memory with this tensor."""
        return QTensor._of(
            self._int_repr.clone(),
            self._scale.clone(),
            self._zero_point.clone(),
            self._axis,
            self._layout,
        )

    def to(self, device: torch.device | str) -> QTensor:
        """The same integers, scale and zero point on ``device``."""
        return QTensor._of(
            self._int_repr.to(device),
            self._scale.to(device),
            self._zero_point.to(device),
            self._axis,
            self._layout,
        )

    def __getitem__(self, index: Any) -> QTensor:
        """Index as a tensor. Scale and zero point follow. Integers are shared (views); below 8 bits
        only where the last axis is left whole.

        Per channel, an index that selects one channel gives a per-tensor ``QTensor``; indices that
        rearrange the axes (tensors, ``None``, lists before the channel axis) raise ``IndexError``
        where the channel axis can no longer be told. Per group, a slice along the last axis begins
        with a group or lies within one, and an integer there leaves entries that each have a scale
        of their own (groups of 1).
        """
        layout, qparams = self._layout, (self._scale, self._zero_point, self._axis, self.group_size)
        scale, zero_point, axis, group_size = indexing.follow(index, self.shape, qparams)
        if layout is None:
            return QTensor._of(self._int_repr[index], scale, zero_point, axis)
        if layout.bits == 8 or not indexing.keeps_rows(index, self.ndim):
            integers = self.int_repr()[index]
            return QTensor._of_plain(integers, scale, zero_point, axis, layout.bits, group_size)
        codes = self._int_repr[index]
        shape = torch.Size((*codes.shape[:-1], layout.shape[-1]))
        return QTensor._of(codes, scale, zero_point, axis, layout._replace(shape=shape))

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """For ``copy``: the packed form is of this process and is made again when needed."""
        parts = ("_axis", "_int_repr", "_layout", "_scale", "_zero_point")
        return None, {name: getattr(self, name) for name in parts} | {
            "_numbers": None,
            "_packed": None,
            "_scalars": None,
        }

    def __repr__(self) -> str:
        values = str(self.dequantize())
        body = values[len("tensor(") : -1].replace("\n" + " " * 7, "\n" + " " * 8)
        dtype = f"{'int' if self.dtype == torch.int8 else 'uint'}{self.bits}"
        vectors = f"scale={_vector(self._scale)}, zero_point={_vector(self._zero_point)}"
        if self.group_size is not None:
            tail = f"{vectors}, group_size={self.group_size}"
        elif self._axis is None:
            tail = f"scale={self.q_scale():.9g}, zero_point={self.q_zero_point()}"
        else:
            tail = f"{vectors}, axis={self._axis}"
        return f"QTensor({body}, dtype={dtype}, {tail})"


def _vector(values: Tensor) -> str:
    values = values.flatten()
    shown = [f"{v:.4g}" for v in values[:4].tolist()]
    return f"[{', '.join(shown)}{', …' if len(values) > 4 else ''}]"
