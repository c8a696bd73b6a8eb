"""``linear`` on float and on quantized tensors.

One rule says what computes: the C++ kernel where the core is loaded and every tensor lies on the
CPU, :mod:`zeropoint.reference` everywhere else. Both give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, reference
from .tensor import QTensor, quantize


def linear(
    input: Tensor | QTensor,
    weight: Tensor | QTensor,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    zero_point: int | Tensor | None = None,
) -> Tensor | QTensor:
    """``y = x Aᵀ + b`` on float or quantized tensors.

    ==================  ============  =============================================================
    input               weight        result
    ==================  ============  =============================================================
    ``Tensor``          ``Tensor``    ``torch.nn.functional.linear``
    ``QTensor``         ``QTensor``   ``QTensor`` of ``input``'s dtype, with ``scale`` and
                                      ``zero_point`` where given, else those of ``input``
    ``Tensor``          ``QTensor``   ``Tensor``: float activations × dequantized weights
    ==================  ============  =============================================================

    torch's own quantized tensors (``quint8``, ``qint8``) are accepted and converted. The weight's
    packing for the hardware is remembered on the :class:`QTensor` and dropped when its tensors are
    changed in place.

    Args:
        input: ``(*, in_features)``; a ``QTensor`` must be per tensor, uint8 or int8.
        weight: ``(out_features, in_features)``; a ``QTensor`` must be int8 or uint8, per tensor or
            per channel along axis 0, zero points allowed.
        bias: ``(out_features,)`` floating point, or ``None``.
        scale, zero_point: of the output, for a ``QTensor`` input only.

    Raises:
        TypeError: a combination that the table does not have.
        ValueError: shapes that do not fit, a granularity that is not supported.

    >>> x = QTensor(torch.tensor([[10, 12]], dtype=torch.uint8), 0.5, 10)  # [[0, 1]]
    >>> w = QTensor(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), 0.25)  # [[¼, ½], [¾, 1]]
    >>> linear(x, w)
    QTensor([[0.5000, 1.0000]], dtype=uint8, scale=0.5, zero_point=10)
    """
    input, weight = _own(input), _own(weight)
    if isinstance(input, QTensor):
        if not isinstance(weight, QTensor):
            raise TypeError(f"weight must be a QTensor when input is one, got {_name(weight)}")
        return _linear_quantized(input, weight, bias, scale, zero_point)
    if scale is not None or zero_point is not None:
        raise TypeError("scale and zero_point are for a QTensor input; input is a float tensor")
    if isinstance(weight, QTensor):
        return linear_weight_only(input, weight, bias)
    return F.linear(input, weight, bias)


def _linear_quantized(
    input: QTensor,
    weight: QTensor,
    bias: Tensor | None,
    scale: float | Tensor | None,
    zero_point: int | Tensor | None,
) -> QTensor:
    _check(input, weight, bias)
    integers = input.int_repr().new_empty((*input.shape[:-1], weight.shape[0]))
    out = QTensor.per_tensor(
        integers,
        input.scale if scale is None else scale,
        input.zero_point if zero_point is None else zero_point,
    )
    if kernels.usable(input.int_repr(), weight):
        kernels.linear_quantized(input, weight, bias, out)
        return out
    y = _rows(input.int_repr(), _reference_integer(input), weight, bias)
    info = torch.iinfo(out.dtype)
    out.int_repr().copy_(quantize(y, out.scale, out.zero_point, info.min, info.max))
    return out


def linear_static(
    input: Tensor | QTensor,
    weight: QTensor,
    bias: Tensor | None = None,
    input_scale: float | Tensor | None = None,
    input_zero_point: int | Tensor | None = None,
) -> Tensor:
    """Integer activations × integer weights, float out.

    A ``QTensor`` input brings its own scale and zero point, and the result is float32. A float
    input is quantized to unsigned 8 bits with ``input_scale`` and ``input_zero_point`` on the way,
    and the result has its dtype; ±Inf clamps, and a row holding NaN is NaN throughout.

    Args:
        input: ``(*, in_features)``.
        weight: ``(out_features, in_features)``, per tensor or per channel along axis 0.
        bias: ``(out_features,)`` floating point, or ``None``.
        input_scale: positive; input_zero_point: within [0, 255]. For a float input only.

    Raises:
        TypeError, ValueError: as :func:`linear`.
    """
    if type(input_scale) is float and type(input_zero_point) is int:
        _check_static(input_scale, input_zero_point)
        y = kernels.quick("linear_static", input, weight, bias, input_scale, input_zero_point)
        if y is not None:
            return y
    input, weight = _own(input), _own(weight)
    _check(input, weight, bias)
    if isinstance(input, QTensor):
        if input_scale is not None or input_zero_point is not None:
            raise TypeError("input_scale and input_zero_point are for a float input")
        if kernels.usable(input.int_repr(), weight):
            return kernels.linear_integer(input, weight, bias)
        return _rows(input.int_repr(), _reference_integer(input), weight, bias)
    if input_scale is None or input_zero_point is None:
        raise TypeError("input_scale and input_zero_point are needed for a float input")
    scale, zero_point = float(input_scale), int(input_zero_point)
    _check_static(scale, zero_point)
    if _needs_gradient(input, bias):
        return _StraightThrough.apply(input, weight, linear_static, bias, scale, zero_point)
    if kernels.usable(input, weight):
        return kernels.linear_float("linear_static", input, weight, bias, scale, zero_point)
    s = torch.tensor(scale, dtype=torch.float32, device=input.device)
    z = torch.tensor(zero_point, dtype=torch.int32, device=input.device)
    return _rows(
        input, lambda x, w, b: reference.linear_static(x, s, z, w, b), weight, bias, input.dtype
    )


def linear_dynamic(input: Tensor, weight: QTensor, bias: Tensor | None = None) -> Tensor:
    """Float activations, quantized row by row on the fly, × integer weights.

    Each row gets its own scale and zero point (:func:`zeropoint.reference.quantize_rows`), so that
    a row's result does not depend on the batch around it. A row holding NaN or ±Inf is NaN.

    Args:
        input: ``(*, in_features)`` floating point.
        weight: ``(out_features, in_features)``, per tensor or per channel along axis 0.
        bias: ``(out_features,)`` floating point, or ``None``.

    Returns:
        ``(*, out_features)`` of ``input``'s dtype.

    Raises:
        TypeError, ValueError: as :func:`linear`.
    """
    y = kernels.quick("linear_dynamic", input, weight, bias)
    if y is not None:
        return y
    if _needs_gradient(input, bias):
        return _StraightThrough.apply(input, weight, linear_dynamic, bias)
    weight = _own(weight)
    _check(input, weight, bias, quantized_input=False)
    if kernels.usable(input, weight):
        return kernels.linear_float("linear_dynamic", input, weight, bias)
    return _rows(input, reference.linear_dynamic, weight, bias, input.dtype)


def linear_weight_only(input: Tensor, weight: QTensor, bias: Tensor | None = None) -> Tensor:
    """Float activations × dequantized weights: nothing but the weights loses precision.

    Args, returns and raises as :func:`linear_dynamic`.
    """
    y = kernels.quick("linear_weight_only", input, weight, bias)
    if y is not None:
        return y
    if _needs_gradient(input, bias):
        return _StraightThrough.apply(input, weight, linear_weight_only, bias)
    weight = _own(weight)
    _check(input, weight, bias, quantized_input=False)
    if kernels.usable(input, weight):
        return kernels.linear_float("linear_weight_only", input, weight, bias)
    return _rows(input, reference.linear_weight_only, weight, bias, input.dtype)


class _StraightThrough(torch.autograd.Function):
    """Gradients to input and bias as if activations were not quantized (the straight-through
    estimator of Bengio et al. 2013, https://arxiv.org/abs/1308.3432): ``grad_x = grad_y ·
    dequantize(A)``, and ``grad_b`` is the sum of ``grad_y`` over the rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: QTensor, function: Any, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        return function(x.detach(), weight, None if bias is None else bias.detach(), *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _own(ctx.weight).dequantize().to(grad.dtype)
        if ctx.needs_input_grad[3]:
            grad_b = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1]).sum(0)
            grad_b = grad_b.to(ctx.bias_dtype)
        return grad_x, None, None, grad_b, *[None] * (len(ctx.needs_input_grad) - 4)


def _needs_gradient(x: Any, bias: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and (x.requires_grad or (isinstance(bias, Tensor) and bias.requires_grad))
        and torch.is_grad_enabled()
    )


def _own(x: Any) -> Any:
    """Convert torch's own quantized tensors; pass everything else through."""
    if isinstance(x, Tensor) and x.is_quantized:
        return QTensor.from_torch(x)
    return x


def _name(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _check(input: Any, weight: Any, bias: Any, quantized_input: bool = True) -> None:
    if not isinstance(weight, QTensor):
        raise TypeError(f"weight must be a QTensor, got {_name(weight)}")
    if isinstance(input, QTensor):
        if not quantized_input:
            raise TypeError(
                "input must be a floating-point tensor, got a QTensor, which linear and "
                "linear_static take"
            )
    elif not (isinstance(input, Tensor) and input.is_floating_point()):
        raise TypeError(
            f"input must be {'a QTensor or ' if quantized_input else ''}a floating-point tensor, "
            f"got {_name(input)}"
        )
    if weight.ndim != 2 or weight.axis not in (None, 0):
        raise ValueError(
            "weight must have shape (out_features, in_features), per tensor or per channel along "
            f"axis 0; got shape {tuple(weight.shape)}, axis {weight.axis}"
        )
    if isinstance(input, QTensor) and input.axis is not None:
        raise ValueError(f"input must be quantized per tensor, got per channel, axis {input.axis}")
    if input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input must have shape (*, {weight.shape[1]}) for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(input.shape)}"
        )
    if bias is not None and (
        not isinstance(bias, Tensor)
        or not bias.is_floating_point()
        or tuple(bias.shape) != (weight.shape[0],)
    ):
        got = f"{tuple(bias.shape)} of {bias.dtype}" if isinstance(bias, Tensor) else repr(bias)
        raise ValueError(
            f"bias must be a floating-point tensor of shape ({weight.shape[0]},), got {got}"
        )


def _check_static(scale: float, zero_point: int) -> None:
    # The bounds within which float32(scale) and its reciprocal are finite, as QTensor asks.
    if not 2.0**-128 + 2.0**-150 < scale < 2.0**128 - 2.0**103:
        raise ValueError(
            f"input_scale must be positive and finite in float32, and so must 1/scale; got {scale}"
        )
    if not 0 <= zero_point <= 255:
        raise ValueError(f"input_zero_point must be within [0, 255], got {zero_point}")


def _reference_integer(input: QTensor) -> Any:
    return lambda q, w, b: reference.linear_integer(q, input.scale, input.zero_point, w, b)


def _rows(
    x: Tensor,
    function: Any,
    weight: QTensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Apply a reference function, which knows rows only, to an input of any leading shape."""
    y = function(
        x.detach().reshape(-1, x.shape[-1])
        if x.numel()
        else x.new_zeros(x.shape[:-1].numel(), x.shape[-1]),
        weight,
        bias,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0]).to(dtype)
