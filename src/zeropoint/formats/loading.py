"""Bring a checkpoint into a model: plan against the header, read all, and only then change it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..embedding import QuantizedEmbedding
from ..float_linear import Linear
from ..modules import QuantizedLinear
from ..quantize import replace_modules
from .container import CheckpointError, Reader, dtype_name, progress_bar
from .embedding_info import EmbeddingInfo
from .header import AnyInfo, Header, info_of, qualified
from .slots import Slot, same_memory, slots_of, why_not_plain
from .values import check_values

_QUANTIZED = (QuantizedLinear, QuantizedEmbedding)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def load_into(
    model: nn.Module, reader: Reader, header: Header, device: torch.device, progress: bool
) -> nn.Module:
    """See :func:`zeropoint.formats.native.load`."""
    plan = _plan(model, reader.path, header)
    # Tensors made under inference mode could not be trained or changed later.
    with torch.inference_mode(False), torch.no_grad():
        tensors = {}
        needed = set(plan.sources.values())
        with progress_bar("loading", reader.file_bytes, progress) as bar:
            for name, info in reader.tensors.items():
                if name in needed:
                    tensors[name] = reader.tensor(name, header.sha256[name])
                else:  # a double of what the model has tied
                    reader.verify(name, header.sha256[name])
                bar.update(info.nbytes)
        for layer, entry in header.layers.items():
            for key in entry.tensors():
                name = qualified(layer, key)
                check_values(reader.path, layer, entry, key, tensors[plan.sources[name]])
        return plan.carry_out(model, tensors, device)


@dataclass
class _Plan:
    slots: dict[str, Slot]
    """Where each tensor goes, in the model or in a layer of ``replacements``."""
    sources: dict[str, str] = field(default_factory=dict)
    """Whose bytes each takes: its own, or those of the tensor it is tied to."""
    replacements: dict[str, nn.Module] = field(default_factory=dict)
    """Layers to exchange, each under one of its names, on the meta device."""
    devices: dict[int, torch.device] = field(default_factory=dict)
    """Where the tensors of a replacement go: where the old layer's weight is."""

    def carry_out(
        self, model: nn.Module, tensors: dict[str, Tensor], device: torch.device
    ) -> nn.Module:
        """Nothing is checked here, so that nothing fails with half the model changed; moves to
        other devices, which can run out of memory, come first."""
        destination: dict[str, torch.device] = {}
        for name, slot in self.slots.items():
            place = self.devices.get(id(slot.owner), slot.tensor.device)
            destination[name] = device if place.type == "meta" else place
        moved: dict[tuple[str, torch.device], Tensor] = {}
        for name, source in self.sources.items():
            key = (source, destination[name])
            if key not in moved:
                moved[key] = tensors[source].to(destination[name])
        placed: dict[tuple[str, torch.device], Tensor] = {}
        for name, slot in self.slots.items():
            key = (self.sources[name], destination[name])
            if key not in placed:
                placed[key] = _fill(slot, moved[key], key[1])
            elif same_memory(placed[key]) != same_memory(slot.tensor):
                _tie(slot, placed[key])
        return replace_modules(model, self.replacements, inplace=True)


def _fill(slot: Slot, value: Tensor, device: torch.device) -> Tensor:
    """Put a value into a slot; returns the tensor that holds it."""
    old = slot.tensor
    if old.device == device and not old.is_inference() and not _overlaps_itself(old):
        old.copy_(value)
        return old
    if slot.key in slot.owner._parameters:
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    # setattr rather than _parameters: recurrent layers keep a list of their weights beside it.
    setattr(slot.owner, slot.key, value)
    return value


def _tie(slot: Slot, tensor: Tensor) -> None:
    """Let a slot share a tensor that is in the model already."""
    is_parameter = slot.key in slot.owner._parameters
    if is_parameter and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad)
    elif not is_parameter and isinstance(tensor, nn.Parameter):
        tensor = tensor.detach()
    setattr(slot.owner, slot.key, tensor)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether several indices may be one element of memory (an expanded buffer)."""
    span = 1
    dims = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in dims:
        if size > 1:
            if stride < span:
                return True
            span = stride * (size - 1) + span
    return False


def _plan(model: nn.Module, path: Path, header: Header) -> _Plan:
    modules = dict(model.named_modules(remove_duplicate=False))
    fitted: dict[int, QuantizedLinear | QuantizedEmbedding] = {}
    plan = _Plan({})
    attention = {
        id(child): name
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    for layer, info in header.layers.items():
        old = modules.get(layer)
        if old is None:
            raise CheckpointError(path, "the model has no such layer", layer)
        if id(old) in attention:
            raise CheckpointError(
                path, "the model's MultiheadAttention reads this layer's float weight", layer
            )
        if id(old) in fitted:
            if info_of(fitted[id(old)]) != info:
                raise CheckpointError(
                    path, "the model uses this layer under another name, the file differs", layer
                )
            continue
        check_layer(path, layer, info, old)
        if isinstance(old, _QUANTIZED) and info_of(old) == info:
            fitted[id(old)] = old
            continue
        if any(getattr(old, hooks) for hooks in _HOOKS):
            raise CheckpointError(
                path, "the model's layer has hooks, which the quantized layer would drop", layer
            )
        new = fitted[id(old)] = info.build("meta")
        if isinstance(new, QuantizedEmbedding):
            new.padding_idx = old.padding_idx  # type: ignore[assignment]
        plan.replacements[layer] = new
        plan.devices[id(new)] = old.weight.device  # type: ignore[assignment]
    for name, module in modules.items():
        if name not in header.layers and (id(module) in fitted or isinstance(module, _QUANTIZED)):
            raise CheckpointError(
                path, "quantized in the model (maybe under another name), float in the file", name
            )
    replaced = {id(modules[name]) for name in plan.replacements}
    for name, slot in slots_of(path, model).items():
        if id(slot.owner) not in replaced:
            plan.slots[name] = slot
    for layer in header.layers:
        if id(modules[layer]) in replaced:
            owner = fitted[id(modules[layer])]
            for key in header.layers[layer].tensors():
                plan.slots[qualified(layer, key)] = Slot(owner, key)
    _check_transient(path, modules)
    _match(path, header, plan)
    return plan


def check_layer(path: Path, layer: str, info: AnyInfo, old: nn.Module) -> None:
    """Refuse a layer of the model that cannot become what the file says.

    Raises:
        CheckpointError: of another kind or size, or more than its parameters.
    """
    if isinstance(info, EmbeddingInfo):
        _check_table(path, layer, info, old)
        return
    kind = type(old).__name__
    if isinstance(old, QuantizedLinear):
        if type(old) is not QuantizedLinear:
            raise CheckpointError(path, f"the model has a {kind} of its own there", layer)
    elif not isinstance(old, nn.Linear):
        raise CheckpointError(path, f"a quantized Linear, but the model has a {kind} there", layer)
    else:
        _check_plain(path, layer, old, (nn.Linear.forward, Linear.forward), {"weight", "bias"})
    size = (old.out_features, old.in_features)
    if not isinstance(old, QuantizedLinear):
        size = tuple(old.weight.shape)  # type: ignore[assignment]
    _check_equal(
        path,
        layer,
        ("out_features", info.out_features, size[0]),
        ("in_features", info.in_features, size[1]),
        ("bias", info.bias, old.bias is not None),
    )


def _check_table(path: Path, layer: str, info: EmbeddingInfo, old: nn.Module) -> None:
    kind = type(old).__name__
    dtype: Any
    if isinstance(old, QuantizedEmbedding):
        if type(old) is not QuantizedEmbedding:
            raise CheckpointError(path, f"the model has a {kind} of its own there", layer)
        size, dtype = (old.num_embeddings, old.embedding_dim), old.output_dtype
    elif not isinstance(old, nn.Embedding):
        raise CheckpointError(
            path, f"a quantized embedding, but the model has a {kind} there", layer
        )
    else:
        _check_plain(path, layer, old, (nn.Embedding.forward,), {"weight"})
        if old.max_norm is not None:
            raise CheckpointError(
                path, "the model's Embedding has a max_norm, which changes what is looked up", layer
            )
        size, dtype = tuple(old.weight.shape), old.weight.dtype  # type: ignore[assignment]
    _check_equal(
        path,
        layer,
        ("num_embeddings", info.num_embeddings, size[0]),
        ("embedding_dim", info.embedding_dim, size[1]),
        ("dtype", info.dtype, str(dtype).removeprefix("torch.")),
    )


def _check_plain(
    path: Path, layer: str, old: nn.Module, forwards: tuple[Any, ...], held: set[str]
) -> None:
    """Refuse a float layer that is more than its parameters."""
    kind = type(old).__name__
    if isinstance(old.weight, Tensor) and (reason := why_not_plain(old.weight)):
        raise CheckpointError(path, f"its weight in the model: {reason}", layer)
    if (
        type(old).forward not in forwards
        or "forward" in old.__dict__
        or parametrize.is_parametrized(old)
        or set(old._parameters) != held
        or old._buffers
        or old._modules
    ):
        raise CheckpointError(
            path,
            f"the model's {kind} has a forward, parametrizations or state of its own, which a "
            "quantized layer would drop",
            layer,
        )


def _check_equal(path: Path, layer: str, *facts: tuple[str, Any, Any]) -> None:
    """Facts: what it is, in the file, in the model."""
    for where, got, expected in facts:
        if got != expected:
            raise CheckpointError(
                path, f"{where} is {expected} in the model, {got} in the file", layer
            )


def _check_transient(path: Path, modules: dict[str, nn.Module]) -> None:
    for prefix, module in modules.items():
        for key in module._non_persistent_buffers_set:
            buffer = module._buffers.get(key)
            if buffer is not None and buffer.is_meta:
                raise CheckpointError(
                    path,
                    "a non-persistent buffer on the model's meta device, which no file fills; "
                    "create the model with its buffers on a real device",
                    tensor=qualified(prefix, key),
                )


def _match(path: Path, header: Header, plan: _Plan) -> None:
    """Find the source of every slot. Raises where the file and the model do not fit."""
    held = header.tensors.keys() | header.aliases.keys()
    first: dict[Any, str] = {}  # memory in the model → name of the first held tensor there
    for name, slot in plan.slots.items():
        if name in held:
            first.setdefault(same_memory(slot.tensor), name)
    for name, slot in plan.slots.items():
        if reason := why_not_plain(slot.tensor):
            raise CheckpointError(path, f"in the model: {reason}", tensor=name)
        # What is one tensor in the model may have one name in the file.
        other = first.get(same_memory(slot.tensor))
        if other is None:
            raise CheckpointError(
                path, "missing from the file, the model has it", header.layer_of(name), name
            )
        tensor = header.tensors[header.source(name if name in held else other)]
        _check_tensor(path, header, name, tensor.dtype, tensor.shape, slot.tensor)
        source = header.tensors[header.source(other)]
        if header.sha256[tensor.name] != header.sha256[source.name]:
            raise CheckpointError(
                path,
                f"the model ties it to {other!r}, the file holds other values for it",
                header.layer_of(name),
                name,
            )
        plan.sources[name] = source.name
    for name in sorted(held - plan.slots.keys()):
        raise CheckpointError(
            path, "in the file, the model has no such tensor", header.layer_of(name), name
        )


def _check_tensor(
    path: Path, header: Header, name: str, dtype: str, shape: tuple[int, ...], target: Tensor
) -> None:
    for what, got, expected in (
        ("shape", list(shape), list(target.shape)),
        ("dtype", dtype, dtype_name(target.dtype) or str(target.dtype)),
    ):
        if got != expected:
            raise CheckpointError(
                path,
                f"{what} is {got} in the file, {expected} in the model",
                header.layer_of(name),
                name,
            )
