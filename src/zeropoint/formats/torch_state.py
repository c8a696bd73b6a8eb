"""What a model of ``torch.ao.quantization`` holds, by the names of its modules.

A state dict, a whole model and a TorchScript archive say the same in three ways; here they become
one: quantized Linear layers, plain tensors, scales of activations, and what is left, with reasons.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..tensor import QTensor
from .torch_archive import Foreign

Qparams = tuple[float, int]
"""A scale and a zero point."""


@dataclass(frozen=True)
class Packed:
    """The parameters of a quantized Linear layer, as ``linear_unpack`` returns them."""

    weight: Any
    bias: Any


@dataclass(frozen=True)
class TorchLinear:
    """A Linear layer that torch quantized.

    Attributes:
        weight: ``(out_features, in_features)``, int8, per tensor or per channel along axis 0.
        bias: float32 ``(out_features,)`` or ``None``.
        output: scale and zero point of its output; ``None`` where its activations are quantized on
            the fly.
        reduce_range: whether torch quantizes its activations on the fly to 7 bits instead of 8.
        torch_class: the class that the file names, or ``None``: a state dict names none.
    """

    weight: QTensor
    bias: Tensor | None
    output: Qparams | None
    reduce_range: bool = True
    torch_class: str | None = None

    @property
    def is_dynamic(self) -> bool:
        return self.output is None

    @property
    def relu(self) -> bool:
        """Whether a ReLU is known to be fused to it."""
        return self.torch_class is not None and self.torch_class.endswith("LinearReLU")


@dataclass
class TorchState:
    """What a file or model of ``torch.ao.quantization`` holds.

    Attributes:
        kind: ``"state dict"``, ``"model"`` or ``"TorchScript"``.
        layers: name → quantized Linear layer, in the file's order.
        tensors: name → plain tensor, as a float model's ``state_dict`` names them.
        dequantized: name → what it was, of those tensors that were quantized.
        left: name → reason, of what has no place in a float model.
        qparams: name of a module → scale and zero point of its output, in the file's order.
        inputs: name of a layer → scale and zero point of its input, where the file says so.
        key: of the file's dictionary, where it holds several things.
    """

    kind: str
    layers: dict[str, TorchLinear] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dequantized: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    qparams: dict[str, Qparams] = field(default_factory=dict)
    inputs: dict[str, Qparams] = field(default_factory=dict)
    key: Any = None


_PACKED = re.compile(r"(?:(.*)\.)?_packed_params\._packed_params")
_IN_PACKED = re.compile(r"(?:(.*)\.)?_packed_params\.(weight|bias)")
_EMBEDDING = re.compile(r"(?:(.*)\.)?_packed_params\._packed_weight")
_PACKED_DTYPE = re.compile(r"(?:.*\.)?_packed_params\.dtype")
_SCALE = re.compile(r"((?:.*[._])?)scale((?:_\d+)?)")


def interpret(
    kind: str,
    entries: Mapping[str, Any],
    versions: Mapping[str, Any],
    classes: Mapping[str, str],
) -> TorchState:
    """Sort what a model holds.

    Args:
        kind: see :class:`TorchState`.
        entries: name → :class:`Packed`, ``Tensor``, :class:`QTensor`, :class:`Foreign`, a number,
            or anything else; named as in a state dict of torch's.
        versions: name of a module → version of its part of the state dict, where known.
        classes: name of a module → its class, where known.

    Raises:
        ValueError: a layer's parameters do not fit each other.
    """
    state = TorchState(kind)
    rest = dict(entries)
    rest.update(_older_layouts(rest))
    _take_qparams(state, rest)
    for name, value in entries_of(rest):
        if isinstance(value, Packed):
            match = _PACKED.fullmatch(name)
            if match is None:
                state.left[name] = "packed parameters of an operator, which belong to no layer"
            else:
                _take_linear(state, match[1] or "", value, versions, classes)
        elif (match := _EMBEDDING.fullmatch(name)) is not None:
            _dequantize(state, name, f"{match[1]}.weight" if match[1] else "weight", value)
        elif isinstance(value, QTensor | Foreign):
            _dequantize(state, name, name, value)
        elif isinstance(value, Tensor):
            state.tensors[name] = value
        elif value is not None and _PACKED_DTYPE.fullmatch(name) is None:
            state.left[name] = f"no tensor but {_describe(value)}"
    for source, (scale, zero_point) in state.qparams.items():
        if source not in state.layers:
            state.left[source] = f"scale {scale:.6g} and zero point {zero_point} of an activation"
    return state


def entries_of(rest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries that are not removed (``Ellipsis``)."""
    return ((name, value) for name, value in rest.items() if value is not ...)


def _older_layouts(entries: dict[str, Any]) -> dict[str, Any]:
    """Versions 1 and 2 of torch's layer kept weight and bias apart; here they become version 3."""
    changed: dict[str, Any] = {}
    for name, value in entries.items():
        if not isinstance(value, QTensor) or value.ndim != 2:
            continue
        layer, _, key = name.rpartition(".")
        if key != "weight":
            continue
        if layer == "_packed_params" or layer.endswith("._packed_params"):
            packed = f"{layer}._packed_params"
        elif _name(layer, "scale") in entries and _name(layer, "zero_point") in entries:
            packed = _name(layer, "_packed_params._packed_params")
        else:
            continue
        bias = _name(layer, "bias")
        changed |= {name: ..., packed: Packed(value, entries.get(bias))}
        if bias in entries:
            changed[bias] = ...
    return changed


def _take_qparams(state: TorchState, entries: dict[str, Any]) -> None:
    """Scales and zero points of activations: ``quant.scale`` is of the module ``quant``; a model
    traced by FX has ``fc1_input_scale_0``, named after the operator it was made for."""
    for name in list(entries):
        match = _SCALE.fullmatch(name)
        if match is None:
            continue
        partner = f"{match[1]}zero_point{match[2]}"
        scale, zero_point = _number(entries[name]), _number(entries.get(partner))
        if scale is None or type(zero_point) is not int:
            continue
        entries[name] = entries[partner] = ...
        is_module = not match[2] and not match[1].endswith("_")
        state.qparams[match[1].rstrip(".") if is_module else name] = (float(scale), zero_point)


def _take_linear(
    state: TorchState,
    layer: str,
    packed: Packed,
    versions: Mapping[str, Any],
    classes: Mapping[str, str],
) -> None:
    weight, bias = packed.weight, packed.bias
    if isinstance(weight, Tensor):  # torch's dynamic layers in float16 keep float weights
        state.tensors[_name(layer, "weight")] = weight
        if bias is not None:
            state.tensors[_name(layer, "bias")] = bias
        state.dequantized[_name(layer, "weight")] = "weights in float16"
        state.qparams.pop(layer, None)
        return
    if isinstance(weight, Foreign):
        state.left[layer] = weight.reason
        return
    if (
        not isinstance(weight, QTensor)
        or weight.ndim != 2
        or weight.axis not in (None, 0)
        or not (bias is None or (isinstance(bias, Tensor) and bias.shape == weight.shape[:1]))
    ):
        raise ValueError(f"layer {layer!r}: its packed parameters are not those of a Linear layer")
    torch_class = classes.get(layer)
    version = versions.get(layer)
    output = state.qparams.get(layer)
    if torch_class is not None:
        dynamic = ".dynamic." in torch_class
    else:
        # Dynamic layers have an output scale too, which is not used and always 1.
        dynamic = (isinstance(version, int) and version >= 4) or output in (None, (1.0, 0))
    if dynamic:
        state.qparams.pop(layer, None)
    state.layers[layer] = TorchLinear(
        weight,
        None if bias is None else bias.detach().to(torch.float32),
        None if dynamic else output,
        not isinstance(version, int) or version >= 4,
        torch_class,
    )
    traced = re.escape(layer.replace(".", "_")) + r"_input_scale_\d+"
    for source, qparams in state.qparams.items():
        if re.fullmatch(traced, source):
            state.inputs.setdefault(layer, qparams)


def _dequantize(state: TorchState, name: str, target: str, value: Any) -> None:
    if isinstance(value, QTensor):
        kind = "int8" if value.dtype == torch.int8 else "uint8"
        state.tensors[target] = value.dequantize()
        state.dequantized[target] = (
            f"{kind} {'per tensor' if value.axis is None else 'per channel'}"
        )
    elif isinstance(value, Foreign) and value.values is not None:
        state.tensors[target] = value.values
        state.dequantized[target] = value.reason
    else:
        reason = value.reason if isinstance(value, Foreign) else _describe(value)
        state.left[name] = f"quantized in a way that is not read: {reason}"


def _number(value: Any) -> float | int | None:
    """A scale or zero point, which torch keeps as a number or as a tensor of one element."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return value if type(value) in (float, int) else None


def _name(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key


def _describe(value: Any) -> str:
    return f"a {type(value).__name__}"
