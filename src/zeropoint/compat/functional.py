"""``torch.ao.nn.quantized.functional``, as far as it is about Linear layers."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..tensor import QTensor
from .ops import own

__all__ = ["linear"]


def linear(
    input: QTensor | Tensor,
    weight: QTensor | Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    zero_point: int | None = None,
) -> QTensor:
    """``y = x Aᵀ + b`` on integers; the weight's packing is remembered on the weight.

    Args:
        input: ``(*, in_features)``, quantized per tensor; a :class:`zeropoint.QTensor` or torch's.
        weight: ``(out_features, in_features)``, per tensor or per channel along axis 0.
        bias: ``(out_features,)`` floating point, or ``None``.
        scale, zero_point: of the output; those of ``input`` where ``None``.

    Raises:
        TypeError: ``input`` or ``weight`` is not quantized.
        ValueError: shapes that do not fit, a scale or zero point out of range.

    >>> import torch
    >>> x = QTensor(torch.tensor([[12, 14]], dtype=torch.uint8), 0.5, 10)  # 1, 2
    >>> linear(x, QTensor(torch.ones(1, 2, dtype=torch.int8), 1.0))
    QTensor([[3.]], dtype=uint8, scale=0.5, zero_point=10)
    """
    x, w = own("input", input), own("weight", weight)
    return functional.linear(x, w, bias, scale, zero_point)  # type: ignore[return-value]
