"""``linear`` on float and on quantized tensors: the short way, or the operators where torch watches
(:mod:`zeropoint.recording`), or the long way (:mod:`zeropoint.compute`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import kernels
from .checks import (
    TORCHS_ACTIVATIONS,
    check_activation,
    check_static,
    name_of,
    operands,
    own,
    own_bias,
)
from .compute import compute, compute_integer, compute_packed, compute_quantized
from .kernels import PackedWeight
from .recording import record, recorded
from .tensor import QTensor


def linear(
    input: Tensor | QTensor,
    weight: Tensor | QTensor | PackedWeight,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    zero_point: int | Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor | QTensor:
    """``y = activation(x Aᵀ + b) + residual`` on float or quantized tensors.

    ==================  ====================  =====================================================
    input               weight                result
    ==================  ====================  =====================================================
    ``Tensor``          ``Tensor``            ``torch.nn.functional.linear``
    ``Tensor``          packed float          the same sum as one fused multiply-add chain
    ``QTensor``         ``QTensor``           ``QTensor`` of ``input``'s dtype, with ``scale`` and
                                              ``zero_point`` where given, else those of ``input``
    ``Tensor``          ``QTensor``           ``Tensor``: float activations × dequantized weights
    ==================  ====================  =====================================================

    torch's own quantized tensors (``quint8``, ``qint8``) are accepted and converted. The weight's
    packing for the hardware is remembered on the :class:`QTensor` and dropped when its tensors are
    changed in place. A :class:`PackedWeight` stands for the weight and the bias it was made of.

    Args:
        input: ``(*, in_features)``; a ``QTensor`` must be per tensor, uint8 or int8.
        weight: ``(out_features, in_features)``; a ``QTensor`` must be int8 or uint8, per tensor or
            per channel along axis 0, zero points allowed.
        bias: ``(out_features,)`` floating point, or ``None``.
        scale, zero_point: of the output, for a ``QTensor`` input only.
        activation: ``"relu"``, ``"gelu"`` (by the error function) or ``"silu"``, fused.
        residual: of the result's shape, added last; not with a ``QTensor`` input.

    Raises:
        TypeError: a combination that the table does not have.
        ValueError: shapes that do not fit, a granularity that is not supported.

    >>> import torch
    >>> x = QTensor(torch.tensor([[10, 12]], dtype=torch.uint8), 0.5, 10)  # [[0, 1]]
    >>> w = QTensor(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), 0.25)  # [[¼, ½], [¾, 1]]
    >>> linear(x, w)
    QTensor([[0.5000, 1.0000]], dtype=uint8, scale=0.5, zero_point=10)
    """
    if type(input) is QTensor and activation is residual and not is_dynamo_compiling():  # both None
        q = kernels.quick_integers("linear_quantized", input, weight, bias, scale, zero_point)
        if q is not None:
            return q
    if isinstance(weight, PackedWeight) and weight.dtype.is_floating_point:
        if scale is not None or zero_point is not None:
            raise TypeError("scale and zero_point are for a QTensor input with a QTensor weight")
        bias = own_bias(weight, bias)
        if activation is residual and not is_dynamo_compiling():  # both None
            y = kernels.quick("linear_float", input, weight, bias)
            if y is not None:
                return y
        if recorded(input):
            return record("linear_float", input, weight, bias, (), activation, residual)
        return compute_packed(input, weight, bias, activation, residual)
    input, weight = own(input), own(weight)
    integers = isinstance(weight, QTensor | PackedWeight)
    if isinstance(input, QTensor):
        if not integers:
            raise TypeError(f"weight must be a QTensor when input is one, got {name_of(weight)}")
        if residual is not None:
            raise TypeError("residual is for float results; with a QTensor input it must be None")
        if recorded(input._int_repr):
            scale = input._scale if scale is None else scale
            zero_point = input._zero_point if zero_point is None else zero_point
            bias, qparams = own_bias(weight, bias), (scale, zero_point)
            return record("linear_quantized", input, weight, bias, qparams, activation, None)
        weight, bias = operands(weight, bias)
        return compute_quantized(input, weight, bias, scale, zero_point, activation)  # type: ignore[arg-type]
    if scale is not None or zero_point is not None:
        raise TypeError("scale and zero_point are for a QTensor input; input is a float tensor")
    if integers:
        return linear_weight_only(input, weight, bias, activation=activation, residual=residual)  # type: ignore[arg-type]
    y = F.linear(input, weight, bias)  # type: ignore[arg-type]
    y = TORCHS_ACTIVATIONS[check_activation(activation)](y)
    return y if residual is None else y + residual


def linear_static(
    input: Tensor | QTensor,
    weight: QTensor | PackedWeight,
    bias: Tensor | None = None,
    input_scale: float | Tensor | None = None,
    input_zero_point: int | Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
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
        activation, residual: as :func:`linear`.

    Raises:
        TypeError, ValueError: as :func:`linear`.
    """
    if type(input) is QTensor:
        if (
            input_scale is input_zero_point is activation is residual  # all None
            and not is_dynamo_compiling()
        ):
            y = kernels.quick_integers("linear_integer", input, weight, bias)
            if y is not None:
                return y  # type: ignore[return-value]
    elif (
        type(input_scale) is float
        and type(input_zero_point) is int
        and activation is residual  # both None
        and not is_dynamo_compiling()
    ):
        check_static(input_scale, input_zero_point)
        y = kernels.quick("linear_static", input, weight, bias, input_scale, input_zero_point)
        if y is not None:
            return y
    input = own(input)
    qparams = (input_scale, input_zero_point)
    if isinstance(input, QTensor):
        if input_scale is not None or input_zero_point is not None:
            raise TypeError("input_scale and input_zero_point are for a float input")
        if recorded(input._int_repr):
            bias = own_bias(weight, bias)
            return record("linear_integer", input, weight, bias, (), activation, residual)
        operand, bias = operands(weight, bias)
        return compute_integer(input, operand, bias, activation, residual)
    if isinstance(input, Tensor) and (input_scale is None or input_zero_point is None):
        raise TypeError("input_scale and input_zero_point are needed for a float input")
    if recorded(input):
        bias = own_bias(weight, bias)
        return record("linear_static", input, weight, bias, qparams, activation, residual)
    operand, bias = operands(weight, bias)
    return compute("linear_static", input, operand, bias, qparams, activation, residual)


def linear_dynamic(
    input: Tensor,
    weight: QTensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Float activations, quantized row by row on the fly, × integer weights.

    Each row gets its own scale and zero point (:func:`zeropoint.reference.quantize_rows`), so that
    a row's result does not depend on the batch around it. A row holding NaN or ±Inf is NaN.

    Args:
        input: ``(*, in_features)`` floating point.
        weight: ``(out_features, in_features)``, per tensor or per channel along axis 0.
        bias: ``(out_features,)`` floating point, or ``None``.
        activation, residual: as :func:`linear`.

    Returns:
        ``(*, out_features)`` of ``input``'s dtype.

    Raises:
        TypeError, ValueError: as :func:`linear`.
    """
    if activation is residual and not is_dynamo_compiling():  # both None
        y = kernels.quick("linear_dynamic", input, weight, bias)
        if y is not None:
            return y
    if recorded(input):
        bias = own_bias(weight, bias)
        return record("linear_dynamic", input, weight, bias, (), activation, residual)
    weight, bias = operands(weight, bias)
    return compute("linear_dynamic", input, weight, bias, (), activation, residual)


def linear_weight_only(
    input: Tensor,
    weight: QTensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Float activations × dequantized weights: nothing but the weights loses precision.

    Args, returns and raises as :func:`linear_dynamic`.
    """
    if activation is residual and not is_dynamo_compiling():  # both None
        y = kernels.quick("linear_weight_only", input, weight, bias)
        if y is not None:
            return y
    if recorded(input):
        bias = own_bias(weight, bias)
        return record("linear_weight_only", input, weight, bias, (), activation, residual)
    weight, bias = operands(weight, bias)
    return compute("linear_weight_only", input, weight, bias, (), activation, residual)
