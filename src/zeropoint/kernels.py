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

    __slots__ = ("core", "sources", "versions")

    def __init__(self, weight: QTensor) -> None:
        assert _core is not None
        integers = weight._int_repr.contiguous()
        scale, zero_point = weight._scale.contiguous(), weight._zero_point.contiguous()
        out_features, in_features = integers.shape
        self.sources = (weight._int_repr, weight._scale, weight._zero_point)
        self.versions = _versions(self.sources)
        self.core = _core.PackedInt8(
            integers.data_ptr(),
            integers.dtype == torch.uint8,
            out_features,
            in_features,
            scale.data_ptr(),
            zero_point.data_ptr(),
            weight._axis is not None,
        )


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(-1 if t.is_inference() else t._version for t in tensors)


def packed(weight: QTensor) -> Any:
    """The weight's packed form, made at the first call and again when the weight was changed.

    A change is noticed by torch's version counters, which every in-place operation moves; writing
    through ``.data``, numpy or inside ``torch.inference_mode`` to an inference tensor goes unseen,
    as it does for autograd.
    """
    p = weight._packed
    if p is None or p.versions != _versions(p.sources):
        p = weight._packed = _Packed(weight)
    return p.core


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """``(x, rows, stride)`` with unit stride along the last dimension, copied only if needed."""
    k = x.shape[-1]
    if x.is_contiguous():
        return x, (x.numel() // k if k else x.shape[:-1].numel()), k
    if x.ndim == 2 and x.stride(1) == 1 and x.stride(0) >= k:
        return x, x.shape[0], x.stride(0)
    x = x.contiguous()
    return x, (x.numel() // k if k else x.shape[:-1].numel()), k


def _bias(bias: Tensor | None) -> tuple[Tensor | None, int]:
    if bias is None:
        return None, 0
    if bias.dtype != torch.float32 or not bias.is_contiguous():
        bias = bias.to(torch.float32).contiguous()
    return bias, bias.data_ptr()


def _float_input(x: Tensor) -> tuple[Tensor, int]:
    code = _TYPES.get(x.dtype)
    return (x.to(torch.float32), 0) if code is None else (x, code)


def linear_dynamic(input: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """See :func:`zeropoint.functional.linear_dynamic`."""
    core = packed(weight)
    x, code = _float_input(input)
    x, rows, stride = _rows(x)
    bias, bias_address = _bias(bias)
    y = torch.empty((*x.shape[:-1], core.out_features), dtype=x.dtype)
    core.linear_dynamic(
        x.data_ptr(), code, rows, stride, bias_address, y.data_ptr(), torch.get_num_threads()
    )
    return y if y.dtype == input.dtype else y.to(input.dtype)


def linear_static(
    input: Tensor, weight: QTensor, bias: Tensor | None, scale: float, zero_point: int
) -> Tensor:
    """See :func:`zeropoint.functional.linear_static`, float input."""
    core = packed(weight)
    x, code = _float_input(input)
    x, rows, stride = _rows(x)
    bias, bias_address = _bias(bias)
    y = torch.empty((*x.shape[:-1], core.out_features), dtype=x.dtype)
    core.linear_static(
        x.data_ptr(),
        code,
        rows,
        stride,
        scale,
        zero_point,
        bias_address,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y if y.dtype == input.dtype else y.to(input.dtype)


def linear_weight_only(input: Tensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """See :func:`zeropoint.functional.linear_weight_only`."""
    core = packed(weight)
    x, code = _float_input(input)
    x, rows, stride = _rows(x)
    bias, bias_address = _bias(bias)
    y = torch.empty((*x.shape[:-1], core.out_features), dtype=x.dtype)
    core.linear_weight_only(
        x.data_ptr(), code, rows, stride, bias_address, y.data_ptr(), torch.get_num_threads()
    )
    return y if y.dtype == input.dtype else y.to(input.dtype)


def linear_integer(input: QTensor, weight: QTensor, bias: Tensor | None) -> Tensor:
    """See :func:`zeropoint.functional.linear_static`, ``QTensor`` input; float32 output."""
    core = packed(weight)
    q, rows, stride = _rows(input._int_repr)
    bias, bias_address = _bias(bias)
    y = torch.empty((*q.shape[:-1], core.out_features), dtype=torch.float32)
    core.linear_integer(
        q.data_ptr(),
        q.dtype == torch.int8,
        rows,
        stride,
        float(input._scale),
        int(input._zero_point),
        bias_address,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def linear_quantized(input: QTensor, weight: QTensor, bias: Tensor | None, output: QTensor) -> None:
    """See :func:`zeropoint.functional.linear`, ``QTensor`` input; fills ``output``."""
    core = packed(weight)
    q, rows, stride = _rows(input._int_repr)
    bias, bias_address = _bias(bias)
    core.linear_quantized(
        q.data_ptr(),
        q.dtype == torch.int8,
        rows,
        stride,
        float(input._scale),
        int(input._zero_point),
        bias_address,
        output._int_repr.data_ptr(),
        float(output._scale),
        int(output._zero_point),
        torch.get_num_threads(),
    )


def unpack(weight: QTensor) -> Tensor:
    """The integers back from the packed form: ``torch.int8`` or ``torch.uint8``, a new tensor."""
    core = packed(weight)
    integers = torch.empty(weight.shape, dtype=weight.dtype)
    core.unpack(integers.data_ptr())
    return integers
