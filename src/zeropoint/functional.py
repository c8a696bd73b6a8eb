"""``linear`` on float and on quantized tensors.

One rule says what computes: the C++ kernel where the core is loaded and every tensor lies on the
CPU, :mod:`zeropoint.reference` everywhere else. Both give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _get_tracing_state
from torch.compiler import is_compiling, is_dynamo_compiling

from . import kernels, reference
from .affine import quantize
from .kernels import PackedWeight
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

    >>> x = QTensor(torch.tensor([[10, 12]], dtype=torch.uint8), 0.5, 10)  # [[0, 1]]
    >>> w = QTensor(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), 0.25)  # [[¼, ½], [¾, 1]]
    >>> linear(x, w)
    QTensor([[0.5000, 1.0000]], dtype=uint8, scale=0.5, zero_point=10)
    """
    if isinstance(weight, PackedWeight) and weight.dtype.is_floating_point:
        if scale is not None or zero_point is not None:
            raise TypeError("scale and zero_point are for a QTensor input with a QTensor weight")
        bias = _own_bias(weight, bias)
        if activation is residual and not is_dynamo_compiling():  # both None
            y = kernels.quick("linear_float", input, weight, bias)
            if y is not None:
                return y
        if recorded(input):
            return record("linear_float", input, weight, bias, (), activation, residual)
        return compute_packed(input, weight, bias, activation, residual)
    input, weight = _own(input), _own(weight)
    integers = isinstance(weight, QTensor | PackedWeight)
    if isinstance(input, QTensor):
        if not integers:
            raise TypeError(f"weight must be a QTensor when input is one, got {_name(weight)}")
        if residual is not None:
            raise TypeError("residual is for float results; with a QTensor input it must be None")
        if recorded(input._int_repr):
            scale = input._scale if scale is None else scale
            zero_point = input._zero_point if zero_point is None else zero_point
            bias, qparams = _own_bias(weight, bias), (scale, zero_point)
            return record("linear_quantized", input, weight, bias, qparams, activation, None)
        weight, bias = _operands(weight, bias)
        return compute_quantized(input, weight, bias, scale, zero_point, activation)  # type: ignore[arg-type]
    if scale is not None or zero_point is not None:
        raise TypeError("scale and zero_point are for a QTensor input; input is a float tensor")
    if integers:
        return linear_weight_only(input, weight, bias, activation=activation, residual=residual)  # type: ignore[arg-type]
    y = F.linear(input, weight, bias)  # type: ignore[arg-type]
    y = _TORCHS_ACTIVATIONS[_activation(activation)](y)
    return y if residual is None else y + residual


def compute_quantized(
    input: QTensor,
    weight: QTensor,
    bias: Tensor | None,
    scale: float | Tensor | None,
    zero_point: int | Tensor | None,
    activation: str | None,
) -> QTensor:
    """Check and compute :func:`linear` of a ``QTensor``."""
    _check(input, weight, bias)
    _activation(activation)
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
        raise TypeError(f"input must be a floating-point tensor, got {_name(input)}")
    _check_shapes(input, weight, bias)
    _check_post(input, weight, activation, residual)
    if _needs_gradient(input, bias):
        plain, _ = weight.unpack()
        return linear(input, plain, bias, activation=activation, residual=residual)  # type: ignore[return-value]
    operand = weight.operand()
    if kernels.packed_usable(input, weight):
        return kernels.linear_float(
            "linear_float", input, weight, bias, activation=activation, residual=residual
        )
    return _rows(input, reference.linear_float, operand, bias, activation, residual, input.dtype)


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
    if (
        type(input_scale) is float
        and type(input_zero_point) is int
        and activation is residual  # both None
        and not is_dynamo_compiling()
    ):
        _check_static(input_scale, input_zero_point)
        y = kernels.quick("linear_static", input, weight, bias, input_scale, input_zero_point)
        if y is not None:
            return y
    input = _own(input)
    qparams = (input_scale, input_zero_point)
    if isinstance(input, QTensor):
        if input_scale is not None or input_zero_point is not None:
            raise TypeError("input_scale and input_zero_point are for a float input")
        if recorded(input._int_repr):
            bias = _own_bias(weight, bias)
            return record("linear_integer", input, weight, bias, (), activation, residual)
        operand, bias = _operands(weight, bias)
        return compute_integer(input, operand, bias, activation, residual)
    if isinstance(input, Tensor) and (input_scale is None or input_zero_point is None):
        raise TypeError("input_scale and input_zero_point are needed for a float input")
    if recorded(input):
        bias = _own_bias(weight, bias)
        return record("linear_static", input, weight, bias, qparams, activation, residual)
    operand, bias = _operands(weight, bias)
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
        bias = _own_bias(weight, bias)
        return record("linear_dynamic", input, weight, bias, (), activation, residual)
    weight, bias = _operands(weight, bias)
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
        bias = _own_bias(weight, bias)
        return record("linear_weight_only", input, weight, bias, (), activation, residual)
    weight, bias = _operands(weight, bias)
    return compute("linear_weight_only", input, weight, bias, (), activation, residual)


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
    floats = kind in ("linear_dynamic", "linear_weight_only", "linear_float")
    weight = _own(weight)
    if not isinstance(weight, PackedWeight):
        _check(input, weight, bias, quantized_input=not floats)
    elif _is_exporting():
        raise RuntimeError(
            "a packed weight cannot be exported: its layout is this machine's. Unpack the model "
            "first (zeropoint.unpack_model)"
        )
    _check_post(input, weight, activation, residual)
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
        if kind == "linear_quantized":
            integers = ops.linear_quantized(*arguments, activation)
            return QTensor._of(integers, qparams[2], qparams[3], None)
        op = getattr(ops, kind)
    if _needs_gradient(input, bias):
        y = _TORCHS_ACTIVATIONS[activation](op(*arguments))
        return y if residual is None else y + residual
    return op(*arguments, activation, residual)


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
    _check(input, weight, bias, quantized_input=kind == "linear_static")
    _check_post(input, weight, activation, residual)
    if qparams:
        qparams = (float(qparams[0]), int(qparams[1]))
        _check_static(*qparams)
    return _linear_float(kind, qparams, input, weight, bias, activation, residual)


def _linear_float(
    kind: str, qparams: Any, input: Any, weight: Any, bias: Any, activation: Any, residual: Any
) -> Tensor:
    """By the kernel or by its definition, with gradients where asked for."""
    if _needs_gradient(input, bias):
        y = _StraightThrough.apply(input, weight, bias, (kind, qparams))
        y = _TORCHS_ACTIVATIONS[activation](y)
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
    _check(input, weight, bias)
    _check_post(input, weight, activation, residual)
    if kernels.usable(input.int_repr(), weight):
        return kernels.linear_integer(input, weight, bias, activation, residual)
    return _rows(input.int_repr(), _reference_integer(input), weight, bias, activation, residual)


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


def _operands(weight: Any, bias: Any) -> tuple[Any, Any]:
    """Weight and bias as they compute: packed ones taken apart, torch's converted."""
    if isinstance(weight, PackedWeight):
        return weight.operand(), _own_bias(weight, bias)
    return _own(weight), bias


def _own_bias(weight: Any, bias: Any) -> Any:
    if not isinstance(weight, PackedWeight):
        return bias
    if bias is not None:
        raise TypeError("bias must be None: the packed weight has its own")
    return weight._bias


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
    _check_shapes(input, weight, bias)


def _check_shapes(input: Any, weight: Any, bias: Any) -> None:
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


_TORCHS_ACTIVATIONS: dict[str | None, Any] = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def _activation(activation: str | None) -> str | None:
    if activation not in _TORCHS_ACTIVATIONS:
        raise ValueError(f"activation must be 'relu', 'gelu', 'silu' or None, got {activation!r}")
    return activation


def _check_post(input: Any, weight: Any, activation: Any, residual: Any) -> None:
    _activation(activation)
    if residual is None:
        return
    shape = (*input.shape[:-1], weight.shape[0])
    if not isinstance(residual, Tensor) or not residual.is_floating_point():
        raise TypeError(f"residual must be a floating-point tensor, got {_name(residual)}")
    if tuple(residual.shape) != shape:
        raise ValueError(f"residual must have shape {shape}, got {tuple(residual.shape)}")


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
