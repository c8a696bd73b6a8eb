"""Models that torchao quantized, read in memory. See docs/interop.md.

torchao keeps integers in tensor subclasses. Those of 0.18 that compute on CPUs are read by their
public attributes: ``Int8Tensor`` (``Int8WeightOnlyConfig``, ``Int8DynamicActivationInt8Weight…``,
``Int8StaticActivationInt8Weight…``) and ``IntxUnpackedToInt8Tensor`` (``IntxWeightOnlyConfig``,
``Int8DynamicActivationIntxWeightConfig``; 2 to 8 bits). This file does not import torchao.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import Mode
from ..tensor import QTensor
from .container import CheckpointError
from .contents import Contents, LayerContents
from .header import qualified

__all__ = ["CheckpointError", "read"]

_WHERE = Path("(the torchao model)")
_PER_TOKEN = "int8_asym_per_token"


def read(source: nn.Module | Mapping[str, Tensor]) -> Contents:
    """What a model, or a state dict, quantized by ``torchao.quantization.quantize_`` holds.

    Args:
        source: it is not changed, and its integers are copied.

    Returns:
        The layers: integers, scales and zero points as torchao has them, so that dequantized
        weights are equal. ``act_pre_scale`` becomes the layer's ``input_factor``. All other tensors
        are as they are.

    Raises:
        TypeError: neither a module nor a mapping of tensors.
        CheckpointError: no layer that torchao quantized; a kind of its tensors, or an activation,
            that zeropoint has not: names the layer.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise TypeError(
            f"source must be a torch.nn.Module or map names to tensors, got {type(source).__name__}"
        )
    layers: dict[str, LayerContents] = {}
    notes: set[str] = set()
    for name, tensor in state.items():
        layer = name.removesuffix("weight").removesuffix(".")
        kind = _kind(tensor)
        if kind is None:
            continue
        if name != qualified(layer, "weight") or tensor.ndim != 2:
            raise CheckpointError(_WHERE, f"a {kind} that is no Linear layer's weight", tensor=name)
        layers[layer] = _layer(layer, kind, tensor, state.get(qualified(layer, "bias")), notes)
    if not layers:
        raise CheckpointError(_WHERE, "it holds no weight that torchao quantized")
    own = {qualified(layer, key) for layer in layers for key in ("weight", "bias")}
    tensors = {name: tensor.detach() for name, tensor in state.items() if name not in own}
    return Contents(_WHERE, "torchao", layers, tensors, notes=tuple(sorted(notes)))


def _kind(tensor: Tensor) -> str | None:
    """The name of a tensor's class, if that is torchao's."""
    if isinstance(tensor, nn.Parameter):
        tensor = tensor.data
    cls = type(tensor)
    return cls.__name__ if cls.__module__.partition(".")[0] == "torchao" else None


def _layer(
    name: str, kind: str, tensor: Any, bias: Tensor | None, notes: set[str]
) -> LayerContents:
    def fail(reason: str) -> CheckpointError:
        return CheckpointError(_WHERE, reason, name)

    def part(key: str) -> Tensor | None:
        value = getattr(tensor, key, None)
        if value is not None and not isinstance(value, Tensor):
            raise fail(f"{key} must be a tensor, got {type(value).__name__}")
        return None if value is None else value.detach()

    mode: Mode = "weight-only"
    qparams = None
    factor = part("act_pre_scale") if kind == "Int8Tensor" else None
    if kind == "Int8Tensor":
        bits = 8
        if tensor.act_quant_kwargs is not None:
            static = part("act_quant_scale"), part("act_quant_zero_point")
            mode, qparams = _activations(tensor.act_quant_kwargs, *static, fail, notes)
        if factor is not None:
            factor = factor.to(torch.float32)
            if factor.numel() not in (1, tensor.shape[1]):
                raise fail(f"act_pre_scale of shape {tuple(factor.shape)}")
            factor = factor.reshape(-1).expand(tensor.shape[1]).clone()
    elif kind == "IntxUnpackedToInt8Tensor":
        digits = str(tensor.target_dtype).removeprefix("torch.int")
        bits = int(digits) if digits.isdecimal() else 0
        if not 2 <= bits <= 8:
            raise fail(f"weights of 2 to 8 bits can be read, got {tensor.target_dtype}")
        if tensor.activation_quantization is not None:
            how = getattr(tensor.activation_quantization, "value", tensor.activation_quantization)
            if how != _PER_TOKEN:
                raise fail(f"activations quantized as {how!r}; {_PER_TOKEN!r} can be read")
            mode = "dynamic"
    else:
        raise fail(f"a {kind}; Int8Tensor and IntxUnpackedToInt8Tensor can be read")
    rows, columns = tensor.shape
    integers, scale, zero_point = part("qdata"), part("scale"), part("zero_point")
    if integers is None or scale is None:
        raise fail("it holds no qdata or no scale")
    if integers.shape != (rows, columns):
        raise fail(f"qdata must have shape {(rows, columns)}, got {tuple(integers.shape)}")
    integers, scale = integers.clone(), scale.clone()
    zero_point = (torch.zeros_like(scale) if zero_point is None else zero_point).to(torch.int32)
    try:
        block = tuple(tensor.block_size)
        if block == (rows, columns):
            weight = QTensor(integers, scale.reshape(()), zero_point.reshape(()), bits=bits)
        elif block == (1, columns):
            per = scale.reshape(rows), zero_point.reshape(rows)
            weight = QTensor(integers, *per, axis=0, bits=bits)
        elif block[:1] == (1,) and len(block) == 2:
            weight = QTensor(integers, scale, zero_point, bits=bits, group_size=block[1])
        else:
            raise ValueError(f"blocks of {block} are neither rows nor runs within them")
        contents = LayerContents(
            weight, None if bias is None else bias.detach(), mode, qparams, None, factor
        )
        contents.build()
    except (TypeError, ValueError, RuntimeError) as error:
        raise fail(str(error)) from None
    return contents


def _activations(
    how: Any, scale: Tensor | None, zero_point: Tensor | None, fail: Any, notes: set[str]
) -> tuple[Mode, Any]:
    """The mode of an Int8Tensor with quantized activations, and their scale and zero point."""
    if scale is None:
        kind = str(getattr(how, "mapping_type", "")), str(getattr(how, "granularity", ""))
        if "ASYMMETRIC" not in kind[0] or "PerRow" not in kind[1]:
            notes.add(
                "torchao quantizes activations about zero or by tensor; zeropoint's dynamic layers "
                "give each row a scale and zero point, which is as fine or finer"
            )
        return "dynamic", None
    if scale.numel() != 1 or (zero_point is not None and zero_point.numel() != 1):
        raise fail(f"static activations by tensor can be read, got {tuple(scale.shape)} scales")
    zero_point = torch.zeros(()) if zero_point is None else zero_point
    if not bool(zero_point.isfinite().all()):
        raise fail(f"the activations' zero point must be finite, got {zero_point.item()}")
    # torchao's are signed, zeropoint's unsigned: integers and zero point are both raised.
    zero = int(zero_point.item())
    return "static", (float(scale.item()), zero + 128)
