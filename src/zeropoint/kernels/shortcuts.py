"""The short way of a call, for what a model does all day."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as dispatch_modes

from ..layout import LARGEST_SCALE, LEAST_SCALE
from ..tensor import QTensor
from .isas import TYPES, core, state
from .weights import PackedWeight


def quick(kind: str, x: Any, weight: Any, bias: Any, *more: Any) -> Tensor | None:
    """The short way for what a model does all day; ``None`` where anything is out of the ordinary.

    Ordinary are a contiguous plain tensor of a type the core knows on the CPU, no gradient, nothing
    that records what is computed, a weight that is packed and current, a float32 bias, and shapes
    that fit.
    """
    if type(x) is not Tensor or x.requires_grad or not state.enabled:
        return None
    if type(weight) is not QTensor:
        if type(weight) is not PackedWeight:
            return None
        if kind != "linear_float":  # there the caller looked
            if bias is not None:
                return None
            bias = weight._bias
    p, code, shape = weight._packed, TYPES.get(x.dtype), x.shape
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


def quick_transform(x: Any, factor: Tensor, size: int) -> Tensor | None:
    """:func:`zeropoint.input_transform.transform_input` by the core; ``None`` where anything is out
    of the ordinary: as :func:`quick`, whose checks are written out again. ``size`` must fit the
    factor."""
    if type(x) is not Tensor or x.requires_grad or not state.enabled or dispatch_modes():
        return None
    code, shape = TYPES.get(x.dtype), x.shape
    if code is None or not shape or not x.is_cpu or not x.is_contiguous():
        return None
    k = shape[-1]
    if type(k) is not int or factor.shape != (k,) or not factor.is_cpu:
        return None
    if factor.dtype is not torch.float32 or not factor.is_contiguous():
        return None
    y = torch.empty_like(x)
    rows = shape[0] if len(shape) == 2 else shape[:-1].numel()
    core.transform_input(  # type: ignore[union-attr]
        x.data_ptr(),
        code,
        rows,
        k,
        k,
        factor.data_ptr(),
        size,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


_FLOAT32 = torch.empty(0, dtype=torch.float32)


def quick_integers(
    kind: str, q: QTensor, weight: Any, bias: Any, scale: Any = None, zero_point: Any = None
) -> Tensor | QTensor | None:
    """The short way for a ``QTensor``; ``None`` where anything is out of the ordinary.

    The checks are those of :func:`quick`, written out: a call more would be a fortieth of all.
    ``kind`` is ``"linear_integer"``, or ``"linear_quantized"`` with the output's scale and zero
    point as numbers, or both ``None`` for those of ``q``.
    """
    x = q._int_repr
    if type(x) is not Tensor or q._axis is not None or q._layout is not None or not state.enabled:
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
        if not LEAST_SCALE < scale < LARGEST_SCALE:
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
