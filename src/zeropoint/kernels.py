"""The C++ core: load it, pack weights for it, call it.

The core knows no torch: it gets addresses, shapes and strides. Which instruction set computes is
decided once, at import: the best that this CPU and its operating system enable, or a lower one by
the environment variable ``ZEROPOINT_ISA`` or :func:`force_isa`. ``reference`` is the lowest: no
kernel at all. Every one of them returns the bits of :mod:`zeropoint.reference`.
"""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as dispatch_modes

from .affine import quantize
from .spec import integer_range
from .tensor import QTensor

_core: ModuleType | None
_core_error: str | None = None
try:
    from . import _core  # type: ignore[no-redef, attr-defined]
except ImportError as error:
    _core = None
    _core_error = str(error)

REFERENCE = "reference"
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Between these float32(scale) and its reciprocal are finite.
_LEAST_SCALE, _LARGEST_SCALE = 2.0**-128 + 2.0**-150, 2.0**128 - 2.0**103

_LARGEST_GROUP = 1 << 20  # kMaxGroup of csrc/zeropoint.h

_active: str = REFERENCE
_enabled = False


def core_error() -> str | None:
    """Why the C++ core could not be loaded, or ``None`` if it was."""
    return _core_error


def available_isas() -> tuple[str, ...]:
    """Instruction sets that can compute here, best first; ``"reference"`` is always the last."""
    return (*(_core.available_isas() if _core is not None else ()), REFERENCE)


def active_isa() -> str:
    """The instruction set that computes now."""
    return _active


def _activate(name: str) -> None:
    global _active, _enabled
    if name not in available_isas():
        raise ValueError(f"isa must be one of {', '.join(available_isas())} here, got {name!r}")
    if name != REFERENCE:
        assert _core is not None
        _core.force_isa(name)
    _active, _enabled = name, name != REFERENCE


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Compute with another instruction set within a ``with`` block, in the whole process.

    Args:
        name: one of :func:`available_isas`; packed weights serve them all.

    Raises:
        ValueError: this machine cannot run it.

    >>> with force_isa("reference"):
    ...     active_isa()
    'reference'
    """
    before = _active
    _activate(name)
    try:
        yield
    finally:
        _activate(before)


def _activate_from_environment() -> None:
    wanted = os.environ.get("ZEROPOINT_ISA", "")
    best = available_isas()[0]
    if wanted and wanted not in available_isas():
        warnings.warn(
            f"ZEROPOINT_ISA={wanted!r} is not available here; using {best!r} "
            f"(available: {', '.join(available_isas())})",
            RuntimeWarning,
            stacklevel=2,
        )
        wanted = ""
    _activate(wanted or best)


_activate_from_environment()


def has_kernel(weight: QTensor) -> bool:
    """Whether the core can pack this weight. Groups of inputs with scales of their own it knows up
    to 4 bits; wider ones the reference computes. Without groups the integers take a byte each."""
    group_size = weight.group_size
    return group_size is None or (weight.bits <= 4 and group_size <= _LARGEST_GROUP)


def usable(x: Tensor, weight: QTensor) -> bool:
    """Whether the core computes for these tensors: it is loaded, all lie on the CPU, and there is a
    kernel for the weight."""
    return _enabled and x.is_cpu and weight._int_repr.is_cpu and has_kernel(weight)


def packed_usable(x: Tensor, weight: PackedWeight) -> bool:
    """The same for a :class:`PackedWeight`."""
    return _enabled and x.is_cpu and weight._packed is not None


class _Packed:
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
        assert _core is not None
        self.out_features, self.in_features = weight.shape
        self.bias_shape = (self.out_features,)
        if isinstance(weight, Tensor):
            self.sources, self.versions = (), None
            plain = weight.detach().contiguous()
            self.core = _core.PackedFloat(
                plain.data_ptr(), _TYPES[plain.dtype], self.out_features, self.in_features
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
            self.core = _core.PackedGroups(
                codes.data_ptr(),
                self.out_features,
                self.in_features,
                weight.group_size,
                scale.data_ptr(),
                _TYPES[scale.dtype],
                zero_codes.data_ptr(),
            )
            self.linear_quantized = None
        else:
            self.core = _core.PackedInt8(
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
        p = weight._packed = _Packed(weight)
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
        if _core is None or device.type != "cpu":
            return
        if isinstance(weight, QTensor) and not has_kernel(weight):
            return
        if isinstance(weight, QTensor):
            self._packed = _Packed(weight)
            self._packed.sources, self._packed.versions = (), None
            shape_only = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            scale, zero_point = weight._scale.clone(), weight._zero_point.clone()
            parts = (shape_only, scale, zero_point, weight._axis, weight._layout)
            self._plain = QTensor._of(*parts)
            self._plain._packed = self._packed
        elif weight.dtype in (torch.float32, torch.bfloat16):
            self._packed = _Packed(weight)
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
        return self._plain if self._packed is not None and _enabled else self.unpack()[0]

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


def _input(x: Tensor) -> tuple[Tensor, int, int]:
    """``(x, rows, stride)`` with unit stride along the last dimension, copied only if needed."""
    shape = x.shape
    if len(shape) == 2:
        rows, k = shape
        if x.is_contiguous():
            return x, rows, k
        if x.stride(1) == 1 and x.stride(0) >= k:
            return x, rows, x.stride(0)
    return x.contiguous(), shape[:-1].numel(), shape[-1]


def _bias(bias: Tensor) -> Tensor:
    if bias.dtype is torch.float32 and bias.is_contiguous():
        return bias
    return bias.to(torch.float32).contiguous()


def quick(kind: str, x: Any, weight: Any, bias: Any, *more: Any) -> Tensor | None:
    """The short way for what a model does all day; ``None`` where anything is out of the ordinary.

    Ordinary are a contiguous plain tensor of a type the core knows on the CPU, no gradient, nothing
    that records what is computed, a weight that is packed and current, a float32 bias, and shapes
    that fit.
    """
    if type(x) is not Tensor or x.requires_grad or not _enabled:
        return None
    if type(weight) is not QTensor:
        if type(weight) is not PackedWeight:
            return None
        if kind != "linear_float":  # there the caller looked
            if bias is not None:
                return None
            bias = weight._bias
    p, code, shape = weight._packed, _TYPES.get(x.dtype), x.shape
    if p is None or code is None or not shape or not x.is_cpu or not x.is_contiguous():
        return None
    k, got = p.in_features, shape[-1]
    # Under torch.jit.trace sizes are tensors, not int.
    if type(got) is not int or got != k or not p.current() or dispatch_modes():
        return None
    address = 0
    if bias is not None:
        if bias.shape != p.bias_shape or bias.dtype is not torch.float32 or bias.requires_grad:
            return None
        if not bias.is_contiguous():
            return None
        address = bias.data_ptr()
    # Sizes one by one, not as a tuple: torch parses them a third of a microsecond faster.
    if len(shape) == 2:
        rows = shape[0]
        y = x.new_empty(rows, p.out_features)
    else:
        rows = shape[:-1].numel()
        y = x.new_empty(*shape[:-1], p.out_features)
    getattr(p, kind)(
        x.data_ptr(), code, rows, k, address, y.data_ptr(), torch.get_num_threads(), *more
    )
    return y


_FLOAT32 = torch.empty(0, dtype=torch.float32)


def quick_integers(
    kind: str, q: QTensor, weight: Any, bias: Any, scale: Any = None, zero_point: Any = None
) -> Tensor | QTensor | None:
    """The short way for a ``QTensor``; ``None`` where anything is out of the ordinary.

    ``kind`` is ``"linear_integer"``, or ``"linear_quantized"`` with the output's scale and zero
    point as numbers, or both ``None`` for those of ``q``.
    """
    x = q._int_repr
    if type(x) is not Tensor or q._axis is not None or q._layout is not None or not _enabled:
        return None
    if type(weight) is not QTensor:
        if type(weight) is not PackedWeight or bias is not None:
            return None
        if weight.dtype.is_floating_point:
            return None
        bias = weight._bias
    p, shape = weight._packed, x.shape
    if p is None or not shape or not x.is_cpu or not x.is_contiguous():
        return None
    k, got = p.in_features, shape[-1]
    if type(got) is not int or got != k or not p.current() or dispatch_modes():
        return None
    address = 0
    if bias is not None:
        if bias.shape != p.bias_shape or bias.dtype is not torch.float32 or bias.requires_grad:
            return None
        if not bias.is_contiguous():
            return None
        address = bias.data_ptr()
    if len(shape) == 2:
        rows = shape[0]
        sizes: tuple[int, ...] = (rows, p.out_features)
    else:
        rows = shape[:-1].numel()
        sizes = (*shape[:-1], p.out_features)
    signed, threads = x.dtype is torch.int8, torch.get_num_threads()
    own = q._numbers or q.scalars()
    if kind == "linear_quantized" and p.linear_quantized is None:  # weights in groups
        return None
    if kind == "linear_integer":
        y = _FLOAT32.new_empty(*sizes)
        p.linear_integer(
            x.data_ptr(), signed, rows, k, *own, address, y.data_ptr(), threads, 0, 0, 0
        )
        return y
    if scale is zero_point is None:
        numbers = own
    elif type(scale) is float and type(zero_point) is int:
        if not _LEAST_SCALE < scale < _LARGEST_SCALE:
            return None
        if not (-128 <= zero_point <= 127 if signed else 0 <= zero_point <= 255):
            return None
        numbers = (scale, zero_point)
    else:
        return None
    y = x.new_empty(*sizes)
    p.linear_quantized(
        x.data_ptr(), signed, rows, k, *own, address, y.data_ptr(), *numbers, threads, 0
    )
    return q.like(y) if numbers is own and q._numbers is None else QTensor._of_numbers(y, numbers)


_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3}


class _Call:
    """The arguments that every call has, with the tensors behind the addresses kept alive."""

    def __init__(
        self,
        x: Tensor,
        p: Any,
        bias: Tensor | None,
        dtype: torch.dtype,
        activation: str | None,
        residual: Tensor | None,
    ) -> None:
        self.x, self.rows, self.stride = _input(x)
        self.y = self.x.new_empty((*self.x.shape[:-1], p.out_features), dtype=dtype)
        self.bias = None if bias is None else _bias(bias)
        self.bias_address = 0 if self.bias is None else self.bias.data_ptr()
        self.residual = None if residual is None else residual.to(dtype).contiguous()
        self.post = (
            _ACTIVATIONS[activation],
            0 if self.residual is None else self.residual.data_ptr(),
            p.out_features,
        )


def linear_float(
    kind: str,
    input: Tensor,
    weight: QTensor | PackedWeight,
    bias: Tensor | None,
    *more: Any,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Any of the float functions of :mod:`zeropoint.functional`, which has checked all arguments.

    ``kind`` is ``"linear_dynamic"``, ``"linear_weight_only"``, ``"linear_float"``, or
    ``"linear_static"`` with ``more`` its scale and zero point.
    """
    p = packed(weight) if isinstance(weight, QTensor) else weight._packed
    x = input if input.dtype in _TYPES else input.to(torch.float32)
    c = _Call(x, p, bias, x.dtype, activation, residual)
    getattr(p, kind)(
        c.x.data_ptr(),
        _TYPES[x.dtype],
        c.rows,
        c.stride,
        c.bias_address,
        c.y.data_ptr(),
        torch.get_num_threads(),
        *more,
        *c.post,
    )
    return c.y.to(input.dtype)


def linear_integer(
    input: QTensor,
    weight: QTensor,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See :func:`zeropoint.functional.linear_static`, ``QTensor`` input; float32 output."""
    p = packed(weight)
    c = _Call(input._int_repr, p, bias, torch.float32, activation, residual)
    p.core.linear_integer(
        c.x.data_ptr(),
        c.x.dtype is torch.int8,
        c.rows,
        c.stride,
        *input.scalars(),
        c.bias_address,
        c.y.data_ptr(),
        torch.get_num_threads(),
        *c.post,
    )
    return c.y


def linear_quantized(
    input: QTensor,
    weight: QTensor,
    bias: Tensor | None,
    output: tuple[float, int],
    activation: str | None = None,
) -> Tensor:
    """See :func:`zeropoint.functional.linear`, ``QTensor`` input; the integers of the output,
    whose scale and zero point are ``output``."""
    p = packed(weight)
    if p.linear_quantized is None:  # weights in groups
        y = linear_integer(input, weight, bias, activation)
        info = torch.iinfo(input.dtype)
        scale = torch.tensor(output[0], dtype=torch.float32)
        return quantize(y, scale, torch.tensor(output[1]), info.min, info.max).to(input.dtype)
    c = _Call(input._int_repr, p, bias, input.dtype, activation, None)
    p.core.linear_quantized(
        c.x.data_ptr(),
        c.x.dtype is torch.int8,
        c.rows,
        c.stride,
        *input.scalars(),
        c.bias_address,
        c.y.data_ptr(),
        *output,
        torch.get_num_threads(),
        c.post[0],
    )
    return c.y
