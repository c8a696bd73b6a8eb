"""``torch.ops.quantized``, as far as it is about Linear layers: the same names and arguments.

Packed parameters are a :class:`zeropoint.PackedWeight`. Results of ``linear`` and ``linear_relu``
differ from torch's by one step at most, and rarely (docs/agreement_with_torch.md). The dynamic ones
quantize the input as torch does, over the range of the whole tensor, so that a row's result depends
on the batch around it; :func:`zeropoint.functional.linear_dynamic` looks at each row alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import functional, kernels
from ..kernels import PackedWeight
from ..tensor import QTensor

_SMALLEST = 6.1e-5
"""torch chooses no scale below this, so that it survives in float16."""


def linear_prepack(W: QTensor | Tensor, B: Tensor | None = None) -> PackedWeight:
    """Lay a quantized weight out for the hardware, once.

    Args:
        W: ``(out_features, in_features)``, per tensor or per channel along axis 0; a
            :class:`zeropoint.QTensor` or one of torch's.
        B: bias, ``(out_features,)`` floating point, or ``None``.

    Raises:
        TypeError: ``W`` is not quantized.
        ValueError: a shape or an axis that does not fit.

    >>> W = QTensor(torch.ones(2, 3, dtype=torch.int8), 0.5)
    >>> linear_unpack(linear_prepack(W))[0].int_repr().shape
    torch.Size([2, 3])
    """
    W = own("W", W)
    return kernels.prepack(W, None if B is None else B.detach().to(torch.float32))


def linear_unpack(W_prepack: PackedWeight) -> tuple[QTensor, Tensor | None]:
    """The weight and the bias that :func:`linear_prepack` took, the same bits."""
    _require_packed(W_prepack)
    return kernels.unpack(W_prepack)  # type: ignore[return-value]


def linear(
    X: QTensor | Tensor, W_prepack: PackedWeight, Y_scale_i: float, Y_zero_point_i: int
) -> QTensor:
    """``Y = X Wᵀ + b`` on integers.

    Args:
        X: ``(*, in_features)``, quantized per tensor; a :class:`zeropoint.QTensor` or one of
            torch's.
        W_prepack: of :func:`linear_prepack`.
        Y_scale_i, Y_zero_point_i: of the output.

    Returns:
        ``(*, out_features)`` of ``X``'s integer type.

    Raises:
        TypeError: ``X`` is not quantized, or ``W_prepack`` not packed.
        ValueError: shapes that do not fit, a scale or zero point out of range.

    >>> X = QTensor(torch.tensor([[12, 14, 16]], dtype=torch.uint8), 0.5, 10)  # 1, 2, 3
    >>> W = linear_prepack(QTensor(torch.ones(1, 3, dtype=torch.int8), 0.5))
    >>> linear(X, W, 0.25, 100)
    QTensor([[3.]], dtype=uint8, scale=0.25, zero_point=100)
    """
    return _linear(X, W_prepack, Y_scale_i, Y_zero_point_i, None)


def linear_relu(
    X: QTensor | Tensor, W_prepack: PackedWeight, Y_scale_i: float, Y_zero_point_i: int
) -> QTensor:
    """As :func:`linear`, then ``max(y, 0)``."""
    return _linear(X, W_prepack, Y_scale_i, Y_zero_point_i, "relu")


def linear_dynamic(X: Tensor, W_prepack: PackedWeight, reduce_range: bool = False) -> Tensor:
    """``Y = X Wᵀ + b`` for floats, which are quantized on the way over the range of all of ``X``.

    Args:
        X: ``(*, in_features)`` floating point, finite.
        W_prepack: of :func:`linear_prepack`.
        reduce_range: quantize ``X`` to 7 bits instead of 8. torch asks for that where its kernels
            could saturate; here they cannot, but the results are to be the same.

    Returns:
        ``(*, out_features)`` float32, those of torch's fbgemm but for the rounding of float32. Its
        other engines round the input differently where ``x / scale`` is halfway between integers;
        qnnpack ignores ``reduce_range``.

    Raises:
        TypeError: ``X`` is not floating point.
        ValueError: NaN or Inf in ``X``, shapes that do not fit.
    """
    _require_packed(W_prepack)
    return dynamic(X, W_prepack, None, reduce_range, None)


def linear_relu_dynamic(X: Tensor, W_prepack: PackedWeight, reduce_range: bool = False) -> Tensor:
    """As :func:`linear_dynamic`, then ``max(y, 0)``."""
    _require_packed(W_prepack)
    return dynamic(X, W_prepack, None, reduce_range, "relu")


def choose_qparams(X: Tensor, reduce_range: bool) -> tuple[float, int]:
    """Scale and zero point of a tensor as torch's dynamic operators choose them: over its range,
    widened to hold 0, in float64, with the zero point that errs less at the ends.

    The rule is ``ChooseQuantizationParams`` of ATen/native/quantized/cpu/QuantUtils.h.
    """
    steps = 127 if reduce_range else 255
    low, high = (t.item() for t in X.aminmax()) if X.numel() else (0.0, 0.0)
    if not math.isfinite(high - low):  # aminmax lets NaN through
        raise ValueError(f"X must be finite, its values reach from {low} to {high}")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / steps
    narrow = _float32(scale)
    if narrow == 0.0 or 1.0 / narrow == float("inf") or _float32(1.0 / narrow) == float("inf"):
        scale = 0.1
    if scale < _SMALLEST:
        before = _float32(scale)
        scale = _float32(_SMALLEST)
        if low == 0.0:
            high = _float32(scale * steps)
        elif high == 0.0:
            low = -_float32(scale * steps)
        else:
            wider = _float32(scale / before)
            low, high = _float32(low * wider), _float32(high * wider)
    from_low, from_high = -low / scale, steps - high / scale
    zero_point = from_low if -abs(low / scale) < steps - abs(high / scale) else from_high
    return _float32(scale), round(min(max(zero_point, 0.0), float(steps)))


def _linear(
    X: QTensor | Tensor, packed: PackedWeight, scale: float, zero_point: int, activation: str | None
) -> QTensor:
    _require_packed(packed)
    y = functional.linear(
        own("X", X), packed, None, float(scale), int(zero_point), activation=activation
    )
    assert isinstance(y, QTensor)
    return y


def dynamic(
    X: Tensor,
    weight: QTensor | PackedWeight,
    bias: Tensor | None,
    reduce_range: bool,
    activation: str | None,
) -> Tensor:
    """:func:`linear_dynamic` for a weight in either form."""
    if not isinstance(X, Tensor) or not X.is_floating_point():
        got = X.dtype if isinstance(X, Tensor) else type(X).__name__
        raise TypeError(f"X must be a floating-point tensor, got {got}")
    X = X.detach().to(torch.float32)
    scale, zero_point = choose_qparams(X, reduce_range)
    return functional.linear_static(X, weight, bias, scale, zero_point, activation=activation)


def own(name: str, q: QTensor | Tensor) -> QTensor:
    """A QTensor of what is quantized; ``name`` is the argument's, for the error."""
    if isinstance(q, Tensor) and q.is_quantized:
        return QTensor.from_torch(q)
    if not isinstance(q, QTensor):
        got = f"a tensor of {q.dtype}" if isinstance(q, Tensor) else type(q).__name__
        raise TypeError(f"{name} must be quantized, a QTensor or torch's, got {got}")
    return q


def _require_packed(packed: object) -> None:
    if not isinstance(packed, PackedWeight):
        raise TypeError(
            f"W_prepack must be what linear_prepack returned, got {type(packed).__name__}"
        )


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
