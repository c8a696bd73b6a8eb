"""Arguments of the functions: torch's own tensors converted, what does not fit refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import PackedWeight
from .layout import LARGEST_SCALE, LEAST_SCALE
from .tensor import QTensor


def needs_gradient(x: Any, bias: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and (x.requires_grad or (isinstance(bias, Tensor) and bias.requires_grad))
        and torch.is_grad_enabled()
    )


def own(x: Any) -> Any:
    """Convert torch's own quantized tensors; pass everything else through."""
    if isinstance(x, Tensor) and x.is_quantized:
        return QTensor.from_torch(x)
    return x


def operands(weight: Any, bias: Any) -> tuple[Any, Any]:
    """Weight and bias as they compute: packed ones taken apart, torch's converted."""
    if isinstance(weight, PackedWeight):
        return weight.operand(), own_bias(weight, bias)
    return own(weight), bias


def own_bias(weight: Any, bias: Any) -> Any:
    if not isinstance(weight, PackedWeight):
        return bias
    if bias is not None:
        raise TypeError("bias must be None: the packed weight has its own")
    return weight._bias


def name_of(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def check(input: Any, weight: Any, bias: Any, quantized_input: bool = True) -> None:
    if not isinstance(weight, QTensor):
        raise TypeError(f"weight must be a QTensor, got {name_of(weight)}")
    if isinstance(input, QTensor):
        if not quantized_input:
            raise TypeError(
                "input must be a floating-point tensor, got a QTensor, which linear and "
                "linear_static take"
            )
    elif not (isinstance(input, Tensor) and input.is_floating_point()):
        raise TypeError(
            f"input must be {'a QTensor or ' if quantized_input else ''}a floating-point tensor, "
            f"got {name_of(input)}"
        )
    if weight.ndim != 2 or weight.axis not in (None, 0):
        raise ValueError(
            "weight must have shape (out_features, in_features), per tensor, per group or per "
            f"channel along axis 0; got shape {tuple(weight.shape)}, axis {weight.axis}"
        )
    if isinstance(input, QTensor) and input.axis is not None:
        raise ValueError(f"input must be quantized per tensor, got per channel, axis {input.axis}")
    if isinstance(input, QTensor) and input._layout is not None:
        raise ValueError(
            f"input must be of 8 bits, per tensor, got {input.bits} bits"
            + (f" in groups of {input.group_size}" if input.group_size is not None else "")
        )
    check_shapes(input, weight, bias)


def check_shapes(input: Any, weight: Any, bias: Any) -> None:
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


TORCHS_ACTIVATIONS: dict[str | None, Any] = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def check_activation(activation: str | None) -> str | None:
    if activation not in TORCHS_ACTIVATIONS:
        raise ValueError(f"activation must be 'relu', 'gelu', 'silu' or None, got {activation!r}")
    return activation


def check_post(input: Any, weight: Any, activation: Any, residual: Any) -> None:
    check_activation(activation)
    if residual is None:
        return
    shape = (*input.shape[:-1], weight.shape[0])
    if not isinstance(residual, Tensor) or not residual.is_floating_point():
        raise TypeError(f"residual must be a floating-point tensor, got {name_of(residual)}")
    if tuple(residual.shape) != shape:
        raise ValueError(f"residual must have shape {shape}, got {tuple(residual.shape)}")


def check_static(scale: float, zero_point: int) -> None:
    if not LEAST_SCALE < scale < LARGEST_SCALE:
        raise ValueError(
            f"input_scale must be positive and finite in float32, and so must 1/scale; got {scale}"
        )
    if not 0 <= zero_point <= 255:
        raise ValueError(f"input_zero_point must be within [0, 255], got {zero_point}")
