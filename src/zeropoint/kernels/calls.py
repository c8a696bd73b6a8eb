"""Calls of the core: addresses, shapes and strides of arguments that were checked before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..affine import quantize
from ..tensor import QTensor
from .isas import TYPES, state
from .weights import PackedWeight, has_kernel, packed


def usable(x: Tensor, weight: QTensor) -> bool:
    """Whether the core computes for these tensors: it is loaded, all lie on the CPU, and there is a
    kernel for the weight."""
    return state.enabled and x.is_cpu and weight._int_repr.is_cpu and has_kernel(weight)


def packed_usable(x: Tensor, weight: PackedWeight) -> bool:
    """The same for a :class:`PackedWeight`."""
    return state.enabled and x.is_cpu and weight._packed is not None


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
    x = input if input.dtype in TYPES else input.to(torch.float32)
    c = _Call(x, p, bias, x.dtype, activation, residual)
    getattr(p, kind)(
        c.x.data_ptr(),
        TYPES[x.dtype],
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
