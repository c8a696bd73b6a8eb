"""Calls that torch watches, which go by the operators of :mod:`zeropoint.ops`, as it sees those."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch.compiler import is_compiling

from . import kernels
from .checks import TORCHS_ACTIVATIONS, check, check_post, needs_gradient, own
from .kernels import PackedWeight
from .tensor import QTensor

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def recorded(x: Any) -> bool:
    """Whether torch watches what is done to ``x`` (it compiles, exports, traces, or a dispatch mode
    is on), or ``x`` is a subclass that may hold no memory. Then an operator of
    :mod:`zeropoint.ops` must stand for the kernel, which torch cannot see."""
    return is_compiling() or (
        isinstance(x, Tensor)
        and (
            type(x) not in _PLAIN
            or kernels.dispatch_modes() > 0
            or _get_tracing_state() is not None
        )
    )


def record(
    kind: str,
    input: Any,
    weight: Any,
    bias: Tensor | None,
    qparams: tuple[Any, ...],
    activation: str | None,
    residual: Tensor | None,
) -> Any:
    """By the operator of that name (:mod:`zeropoint.ops`): same checks, same bits."""
    if not is_compiling() and _get_tracing_state() is not None:
        raise RuntimeError("torch.jit.trace cannot see zeropoint's layers; use torch.export")
    ops, x = torch.ops.zeropoint, input
    layout: dict[str, Any] = {}
    floats = kind in ("linear_dynamic", "linear_weight_only", "linear_float")
    weight = own(weight)
    if not isinstance(weight, PackedWeight):
        check(input, weight, bias, quantized_input=not floats)
    elif _is_exporting():
        raise RuntimeError(
            "a packed weight cannot be exported: its layout is this machine's. Unpack the model "
            "first (zeropoint.unpack_model)"
        )
    check_post(input, weight, activation, residual)
    if isinstance(input, QTensor):
        x, qparams = input._int_repr, (input._scale, input._zero_point, *qparams)
    types = (torch.float32, torch.int32) * 2
    qparams = tuple(
        q if isinstance(q, Tensor) and q.dtype is t else torch.as_tensor(q, dtype=t)
        for q, t in zip(qparams, types, strict=False)
    )
    if isinstance(weight, PackedWeight):
        if kind == "linear_quantized":
            raise TypeError("weight must be a QTensor, not packed, where torch compiles")
        scale, zero_point = qparams or (None, None)
        out = weight.shape[0]
        arguments = [x, bias, weight.handle, out, kind, scale, zero_point]
        op = ops.linear_packed
    else:
        arguments = [x, weight._int_repr, weight._scale, weight._zero_point, bias, *qparams]
        if weight._layout is not None:
            bits, signed, (_, k), group_size = weight._layout
            layout = {"bits": bits, "signed": signed, "group_size": group_size, "in_features": k}
        if kind == "linear_quantized":
            integers = ops.linear_quantized(*arguments, activation, **layout)
            return QTensor._of(integers, qparams[2], qparams[3], None)
        op = getattr(ops, kind)
    if needs_gradient(input, bias):
        y = TORCHS_ACTIVATIONS[activation](op(*arguments, **layout))
        return y if residual is None else y + residual
    return op(*arguments, activation, residual, **layout)
