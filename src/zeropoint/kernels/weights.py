"""Weights in the layout of the hardware, made once."""

from __future__ import annotations

import copy
import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..spec import integer_range
from ..tensor import QTensor
from .isas import TYPES, core, state

LARGEST_GROUP = {True: 1 << 20, False: 1 << 16}
"""Of up to four bits, and of more: ``kMaxGroup``, ``kMaxBytesGroup`` of csrc/zeropoint.h."""


def has_kernel(weight: QTensor) -> bool:
    """Whether the core can pack this weight: groups must not be so long that sums overflow."""
    group_size = weight.group_size
    return group_size is None or group_size <= LARGEST_GROUP[weight.bits <= 4]


class Packed:
    """A weight in the layout of the hardware, with what tells whether it is still current."""

    __slots__ = (
        "bias_shape",
        "core",
        "in_features",
        "linear_dynamic",
        "linear_float",
        "linear_integer",
        "linear_quantized",
        "linear_static",
        "linear_weight_only",
        "out_features",
        "sources",
        "versions",
    )

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...] | None

    def __init__(self, weight: QTensor | Tensor) -> None:
        assert core is not None
        self.out_features, self.in_features = weight.shape
        self.bias_shape = (self.out_features,)
        if isinstance(weight, Tensor):
            self.sources, self.versions = (), None
            plain = weight.detach().contiguous()
            self.core = core.PackedFloat(
                plain.data_ptr(), TYPES[plain.dtype], self.out_features, self.in_features
            )
            self.linear_float = self.core.linear_float
            return
        integers = weight.int_repr().contiguous()
        scale, zero_point = weight._scale.contiguous(), weight._zero_point.contiguous()
        qmin, _ = integer_range(weight.bits, integers.dtype is torch.int8)
        self.sources = (weight._int_repr, weight._scale, weight._zero_point)
        # Inference tensors have no version counter: what was packed from them stays.
        watched = not any(t.is_inference() for t in self.sources)
        self.versions = tuple(t._version for t in self.sources) if watched else None
        if weight.group_size is not None:
            codes = integers if qmin == 0 else (integers - qmin).to(torch.uint8)
            zero_codes = zero_point.to(torch.int32) - qmin
            self.core = core.PackedGroups(
                codes.data_ptr(),
                weight.bits,
                self.out_features,
                self.in_features,
                weight.group_size,
                scale.data_ptr(),
                TYPES[scale.dtype],
                zero_codes.data_ptr(),
            )
            self.linear_quantized = None
        else:
            self.core = core.PackedInt8(
                integers.data_ptr(),
                integers.dtype == torch.uint8,
                self.out_features,
                self.in_features,
                scale.data_ptr(),
                zero_point.data_ptr(),
                weight._axis is not None,
            )
            self.linear_quantized = self.core.linear_quantized
        self.linear_dynamic = self.core.linear_dynamic
        self.linear_integer = self.core.linear_integer
        self.linear_static = self.core.linear_static
        self.linear_weight_only = self.core.linear_weight_only

    def current(self) -> bool:
        if self.versions is None:
            return True
        a, b, c = self.sources
        return self.versions == (a._version, b._version, c._version)


def packed(weight: QTensor) -> Any:
    """The weight's packed form, made at the first call and again when the weight was changed.

    A change is noticed by torch's version counters, which every in-place operation moves; writing
    through ``.data``, numpy or inside ``torch.inference_mode`` to an inference tensor goes unseen,
    as it does for autograd.
    """
    p = weight._packed
    if p is None or not p.current():
        p = weight._packed = Packed(weight)
    return p


class PackedWeight:
    """A weight and its bias in the layout of the hardware, and in no other.

    Made by :func:`prepack`; taken by the functions of :mod:`zeropoint.functional` in the weight's
    place. Where the core is missing it holds the weight as it came.
    """

    __slots__ = ("__weakref__", "_bias", "_packed", "_plain", "dtype", "handle", "shape")

    def __init__(self, weight: QTensor | Tensor, bias: Tensor | None = None) -> None:
        self._number()
        self.shape, self.dtype = weight.shape, weight.dtype
        self._bias = bias
        self._packed: Any = None
        # A quantized weight's scales and zero points are small; of its integers only the shape is
        # kept, as one element that is repeated.
        self._plain: QTensor | Tensor = weight
        device = weight._int_repr.device if isinstance(weight, QTensor) else weight.device
        if core is None or device.type != "cpu":
            return
        if isinstance(weight, QTensor) and not has_kernel(weight):
            return
        if isinstance(weight, QTensor):
            self._packed = Packed(weight)
            self._packed.sources, self._packed.versions = (), None
            shape_only = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            scale, zero_point = weight._scale.clone(), weight._zero_point.clone()
            parts = (shape_only, scale, zero_point, weight._axis, weight._layout)
            self._plain = QTensor._of(*parts)
            self._plain._packed = self._packed
        elif weight.dtype in (torch.float32, torch.bfloat16):
            self._packed = Packed(weight)
            self._plain = torch.zeros((), dtype=weight.dtype).expand(weight.shape)

    @property
    def bias(self) -> Tensor | None:
        """``(out_features,)`` or ``None``."""
        return self._bias

    @property
    def is_packed(self) -> bool:
        """Whether there is a packed form, and no other; else the weight is held as it came."""
        return self._packed is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight, scales and padding included; 0 where nothing is packed."""
        return 0 if self._packed is None else self._packed.core.nbytes

    def operand(self) -> QTensor | Tensor:
        """What computes: the packed form where the core is active, else the weight itself."""
        return self._plain if self._packed is not None and state.enabled else self.unpack()[0]

    def unpack(self) -> tuple[QTensor | Tensor, Tensor | None]:
        """The weight and the bias that were packed: the same bits, in new memory."""
        plain = self._plain
        if self._packed is None:
            return plain, self._bias
        values = torch.empty(self.shape, dtype=self.dtype)
        self._packed.core.unpack(values.data_ptr())
        if isinstance(plain, QTensor):
            if plain.group_size is not None:  # codes, which begin at 0
                values += integer_range(plain.bits, self.dtype is torch.int8)[0]
            parts = (values, plain._scale, plain._zero_point, plain._axis)
            return QTensor._of_plain(*parts, plain.bits, plain.group_size), self._bias
        return values, self._bias

    def _number(self) -> None:
        self.handle = next(_numbers)
        _by_handle[self.handle] = self

    def with_bias(self, bias: Tensor | None) -> PackedWeight:
        """The same packed weight, not copied, beside another bias."""
        new = copy.copy(self)
        new._bias = bias
        return new

    def __copy__(self) -> PackedWeight:
        new = object.__new__(PackedWeight)
        new._number()
        new.shape, new.dtype, new._bias = self.shape, self.dtype, self._bias
        new._packed, new._plain = self._packed, self._plain
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        # What is packed never changes, and so serves the copy too.
        new = self.with_bias(copy.deepcopy(self._bias, memo))
        if self._packed is None:
            new._plain = copy.deepcopy(self._plain, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, self.unpack()

    def __repr__(self) -> str:
        return (
            f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"bias={self._bias is not None}, nbytes={self.nbytes})"
        )


_numbers = itertools.count()
_by_handle: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()


def packed_by_handle(handle: int) -> PackedWeight:
    """The living :class:`PackedWeight` of this ``handle``: a number that compiled code can hold.

    Raises:
        RuntimeError: it is of another process, or gone.
    """
    packed = _by_handle.get(handle)
    if packed is None:
        raise RuntimeError(
            f"packed weight {handle} is not in this process any more: what was compiled with a "
            "packed weight can be used only where and while that weight lives"
        )
    return packed


def prepack(weight: QTensor | Tensor, bias: Tensor | None = None) -> PackedWeight:
    """Lay a weight out for the hardware, once.

    Args:
        weight: ``(out_features, in_features)``: a :class:`QTensor` per tensor, per channel along
            axis 0 or per group, or float32 or bfloat16.
        bias: ``(out_features,)`` floating point, or ``None``; kept beside it.

    Returns:
        A :class:`PackedWeight`; :func:`unpack` is the exact inverse.

    Raises:
        TypeError: a weight of another type.
        ValueError: a shape or an axis that does not fit.

    >>> packed = prepack(torch.ones(2, 3), torch.zeros(2))
    >>> unpack(packed)[0].equal(torch.ones(2, 3))
    True
    """
    if not isinstance(weight, QTensor) and not (
        isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.bfloat16)
    ):
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a QTensor, torch.float32 or torch.bfloat16, got {got}")
    axis = weight.axis if isinstance(weight, QTensor) else None
    if weight.ndim != 2 or axis not in (None, 0):
        raise ValueError(
            "weight must have shape (out_features, in_features), per tensor, per group or per "
            f"channel along axis 0; got shape {tuple(weight.shape)}, axis {axis}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    return PackedWeight(weight, bias)


def unpack(packed: PackedWeight) -> tuple[QTensor | Tensor, Tensor | None]:
    """The weight and the bias that :func:`prepack` took: the same bits, in new memory."""
    return packed.unpack()
