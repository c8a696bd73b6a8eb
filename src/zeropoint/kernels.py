"""The C++ core: load it, pack weights for it, call it.

The core knows no torch: it gets addresses, shapes and strides. Which instruction set computes is
decided once, at import: the best that this CPU and its operating system enable, or a lower one by
the environment variable ``ZEROPOINT_ISA`` or :func:`force_isa`. ``reference`` is the lowest: no
kernel at all. Every one of them returns the bits of :mod:`zeropoint.reference`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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


def usable(x: Tensor, weight: QTensor) -> bool:
    """Whether the core computes for these tensors: it is loaded and all lie on the CPU."""
    return _enabled and x.is_cpu and weight._int_repr.is_cpu


class _Packed:
    """A weight in the layout of the hardware, with what tells whether it is still current."""

    __slots__ = (
        "bias_shape",
        "core",
        "in_features",
        "linear_dynamic",
        "linear_static",
        "linear_weight_only",
        "out_features",
        "sources",
        "versions",
    )

    def __init__(self, weight: QTensor) -> None:
        assert _core is not None
        integers = weight._int_repr.contiguous()
        scale, zero_point = weight._scale.contiguous(), weight._zero_point.contiguous()
        self.out_features, self.in_features = integers.shape
        self.bias_shape = (self.out_features,)
        self.sources = (weight._int_repr, weight._scale, weight._zero_point)
        # Inference tensors have no version counter: what was packed from them stays.
        watched = not any(t.is_inference() for t in self.sources)
        self.versions = tuple(t._version for t in self.sources) if watched else None
        self.core = _core.PackedInt8(
            integers.data_ptr(),
            integers.dtype == torch.uint8,
            self.out_features,
            self.in_features,
            scale.data_ptr(),
            zero_point.data_ptr(),
            weight._axis is not None,
        )
        self.linear_dynamic = self.core.linear_dynamic
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

    Ordinary are a contiguous plain tensor of a type the core knows on the CPU, no gradient, a
    weight that is packed and current, a float32 bias, and shapes that fit.
    """
    if type(x) is not Tensor or type(weight) is not QTensor or x.requires_grad or not _enabled:
        return None
    p, code, shape = weight._packed, _TYPES.get(x.dtype), x.shape
    if p is None or code is None or not shape or not x.is_cpu or not x.is_contiguous():
        return None
    k = p.in_features
    if shape[-1] != k or not p.current():
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


def linear_float(
    kind: str, input: Tensor, weight: QTensor, bias: Tensor | None, *more: Any
) -> Tensor:
    """Any of the float functions of :mod:`zeropoint.functional`, which has checked all arguments.

    ``kind`` is ``"linear_dynamic"``, ``"linear_weight_only"``, or ``"linear_static"`` with ``more``
    its scale and zero point.
    """
    p = packed(weight)
    x, rows, stride = _input(input if input.dtype in _TYPES else input.to(torch.float32))
    b = None if bias is None else _bias(bias)
    y = x.new_empty((*x.shape[:-1], p.out_features))
    address = 0 if b is None else b.data_ptr()
    getattr(p, kind)(
        x.data_ptr(),
        _TYPES[x.dtype],
        rows,
        stride,
        address,
        y.data_ptr(),
        torch.get_num_threads(),
        *more,
    )
    return y.to(input.dtype)


def linear_integer(input: QTensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """See :func:`zeropoint.functional.linear_static`, ``QTensor`` input; float32 output."""
    p = packed(weight)
    q, rows, stride = _input(input._int_repr)
    b = None if bias is None else _bias(bias)
    y = q.new_empty((*q.shape[:-1], p.out_features), dtype=torch.float32)
    p.core.linear_integer(
        q.data_ptr(),
        q.dtype is torch.int8,
        rows,
        stride,
        float(input._scale),
        int(input._zero_point),
        0 if b is None else b.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
        0,
        0,
        0,
    )
    return y


def linear_quantized(input: QTensor, weight: QTensor, bias: Tensor | None, output: QTensor) -> None:
    """See :func:`zeropoint.functional.linear`, ``QTensor`` input; fills ``output``."""
    p = packed(weight)
    q, rows, stride = _input(input._int_repr)
    b = None if bias is None else _bias(bias)
    p.core.linear_quantized(
        q.data_ptr(),
        q.dtype is torch.int8,
        rows,
        stride,
        float(input._scale),
        int(input._zero_point),
        0 if b is None else b.data_ptr(),
        output._int_repr.data_ptr(),
        float(output._scale),
        int(output._zero_point),
        torch.get_num_threads(),
        0,
    )


def unpack(weight: QTensor) -> Tensor:
    """The integers back from the packed form: ``torch.int8`` or ``torch.uint8``, a new tensor."""
    integers = torch.empty(weight.shape, dtype=weight.dtype)
    packed(weight).core.unpack(integers.data_ptr())
    return integers
