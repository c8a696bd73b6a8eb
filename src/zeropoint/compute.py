"""What the functions compute where torch does not watch: by the kernels, or by the reference.

One rule says which: the C++ kernel where the core is loaded and every tensor lies on the CPU,
:mod:`zeropoint.reference` everywhere else. Both give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, reference
from .affine import quantize
from .checks import (
    TORCHS_ACTIVATIONS,
    check,
    check_activation,
    check_post,
    check_shapes,
    check_static,
    name_of,
    needs_gradient,
)
from .kernels import PackedWeight
from .tensor import QTensor


def compute(
    kind: str,
    input: Tensor,
    weight: Any,
    bias: Tensor | None,
    qparams: tuple[Any, ...],
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Check and compute ``linear_dynamic``, ``linear_weight_only``, or ``linear_static`` with
    ``qparams`` the input's scale and zero point: float in, float out."""
    check(input, weight, bias, quantized_input=kind == "linear_static")
    check_post(input, weight, activation, residual)
    if qparams:
        qparams = (float(qparams[0]), int(qparams[1]))
        check_static(*qparams)
    return _linear_float(kind, qparams, input, weight, bias, activation, residual)


def _linear_float(
    kind: str, qparams: Any, input: Any, weight: Any, bias: Any, activation: Any, residual: Any
) -> Tensor:
    """By the kernel or by its definition, with gradients where asked for."""
    if needs_gradient(input, bias):
        y = _StraightThrough.apply(input, weight, bias, (kind, qparams))
        y = TORCHS_ACTIVATIONS[activation](y)
        return y if residual is None else y + residual
    if kernels.usable(input, weight):
        return kernels.linear_float(
            kind, input, weight, bias, *qparams, activation=activation, residual=residual
        )
    definition: Any = getattr(reference, kind)
    if qparams:
        s = torch.tensor(qparams[0], dtype=torch.float32, device=input.device)
        z = torch.tensor(qparams[1], dtype=torch.int32, device=input.device)

        def definition(x: Tensor, w: QTensor, b: Tensor | None) -> Tensor:
            return reference.linear_static(x, s, z, w, b)

    return _rows(input, definition, weight, bias, activation, residual, input.dtype)


def compute_integer(
    input: QTensor,
    weight: Any,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Check and compute :func:`linear_static` of a ``QTensor``."""
    check(input, weight, bias)
    check_post(input, weight, activation, residual)
    if kernels.usable(input.int_repr(), weight):
        return kernels.linear_integer(input, weight, bias, activation, residual)
    return _rows(input.int_repr(), _reference_integer(input), weight, bias, activation, residual)


def compute_quantized(
    input: QTensor,
    weight: QTensor,
    bias: Tensor | None,
    scale: float | Tensor | None,
    zero_point: int | Tensor | None,
    activation: str | None,
) -> QTensor:
    """Check and compute :func:`linear` of a ``QTensor``."""
    check(input, weight, bias)
    check_activation(activation)
    if scale is None and zero_point is None:
        like = input
    else:  # an empty QTensor checks the output's scale and zero point
        like = QTensor.per_tensor(
            input._int_repr.new_empty(0),
            input.scale if scale is None else scale,
            input.zero_point if zero_point is None else zero_point,
        )
    if kernels.usable(input._int_repr, weight):
        return like.like(kernels.linear_quantized(input, weight, bias, like.scalars(), activation))
    y = _rows(input._int_repr, _reference_integer(input), weight, bias, activation, None)
    info = torch.iinfo(input.dtype)
    integers = quantize(y, like.scale, like.zero_point, info.min, info.max)
    return like.like(integers.to(input.dtype))


def compute_packed(
    input: Any,
    weight: PackedWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """Check and compute :func:`linear` with a packed float weight and any bias."""
    if not isinstance(input, Tensor) or not input.is_floating_point():
        raise TypeError(f"input must be a floating-point tensor, got {name_of(input)}")
    check_shapes(input, weight, bias)
    check_post(input, weight, activation, residual)
    if needs_gradient(input, bias):
        plain, _ = weight.unpack()
        y = TORCHS_ACTIVATIONS[activation](F.linear(input, plain, bias))  # type: ignore[arg-type]
        return y if residual is None else y + residual
    operand = weight.operand()
    if kernels.packed_usable(input, weight):
        return kernels.linear_float(
            "linear_float", input, weight, bias, activation=activation, residual=residual
        )
    return _rows(input, reference.linear_float, operand, bias, activation, residual, input.dtype)


class _StraightThrough(torch.autograd.Function):
    """Gradients to input and bias as if activations were not quantized (the straight-through
    estimator of Bengio et al. 2013, https://arxiv.org/abs/1308.3432): ``grad_x = grad_y ·
    dequantize(A)``, and ``grad_b`` is the sum of ``grad_y`` over the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QTensor, bias: Tensor | None, how: Any) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        plain_bias = None if bias is None else bias.detach()
        kind, qparams = how
        return _linear_float(kind, qparams, x.detach(), weight, plain_bias, None, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.weight.dequantize().to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_b = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1]).sum(0)
            grad_b = grad_b.to(ctx.bias_dtype)
        return grad_x, None, grad_b, None


def _reference_integer(input: QTensor) -> Any:
    return lambda q, w, b: reference.linear_integer(q, input.scale, input.zero_point, w, b)


def _rows(
    x: Tensor,
    function: Any,
    weight: Any,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Apply a reference function, which knows rows only, to an input of any leading shape."""
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    y = reference.activate(function(rows, weight, bias), activation)
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    if residual is not None:
        # To the result's dtype first: that is the type the kernels read.
        y = y + residual.to(dtype).to(torch.float32)
    return y.to(dtype)
