"""A transformers model's quantized layers: as a table in its ``config.json``, found again by name,
and kept from what transformers does to weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from ..embedding import QuantizedEmbedding
from ..formats.embedding_info import EmbeddingInfo
from ..formats.header import AnyInfo, info_of
from ..formats.loading import check_layer
from ..modules import QuantizedLinear
from ..packed_linear import PackedLinear

OURS = (QuantizedLinear, QuantizedEmbedding)
"""Layers that these folders hold."""

SHARED = ("weight", "scale", "zero_point", "input_factor")
"""What layers of one weight share, of what they have."""


def table(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The layer table, and which layers use the integers of which others."""
    layers: dict[str, Any] = {}
    tied: dict[str, str] = {}
    first: dict[int, tuple[str, int]] = {}  # address of a weight → who had it first
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLinear):
            raise ValueError(
                f"layer {name!r} is packed; zeropoint.unpack_model gives back what can be saved"
            )
        if type(module) not in OURS:
            weight = module._buffers.get("weight")
            if weight is not None and not weight.is_floating_point():
                raise ValueError(
                    f"layer {name!r}: a {type(module).__name__} cannot be saved in a transformers "
                    "folder, only QuantizedLinear and QuantizedEmbedding"
                )
            continue
        info, weight = info_of(module), module._buffers["weight"]
        assert info is not None
        assert weight is not None
        layers[name] = info.to_dict()
        owner, identity = first.setdefault(weight.data_ptr(), (name, id(module)))
        if identity != id(module):
            tied[name] = owner
    return layers, tied


def shared_buffers(layer: nn.Module) -> dict[str, Tensor]:
    """What a layer holds of it."""
    return {key: b for key in SHARED if (b := layer._buffers.get(key)) is not None}


_WIDER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
}


def widen(layer: nn.Module) -> None:
    """Give an empty layer room for floats of a wider type than its own. transformers casts what it
    reads to the type it finds, and would round what does not belong there without a word."""
    for key, buffer in layer._buffers.items():
        if buffer is not None and buffer.dtype in _WIDER:
            layer._buffers[key] = buffer.to(_WIDER[buffer.dtype])


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats in their own type again, if they are exact in it; else the tensor as it is."""
    if not (tensor.is_floating_point() and dtype.is_floating_point):
        return tensor
    narrow = tensor.to(dtype)
    return narrow if bool(((narrow == tensor) | tensor.isnan()).all()) else tensor


def kind_of_weight(layer: Any) -> tuple[Any, ...]:
    """Equal for layers that can share one."""
    shapes = {key: (b.shape, b.dtype) for key, b in shared_buffers(layer).items()}
    return shapes, layer.bits, layer.group_size, getattr(layer, "rotation", 1)


def is_found_by_tie(model: PreTrainedModel, name: str, tied: dict[str, str]) -> bool:
    """Whether a folder need not hold a tied layer's integers, since it holds those of another,
    which whoever loads the folder loads as well: with a head, or without it."""
    owner = tied.get(name)
    base = model.base_model_prefix
    return owner is not None and (not hasattr(model, base) or owner.startswith(f"{base}."))


def detach(model: PreTrainedModel) -> None:
    """Keep transformers from changing quantized layers: by its ties, or by its conversions from the
    layout of a float checkpoint and back, which know of no scales."""
    forget_ties(model)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # Saving would look up those of the architecture.
        conversions = []
    model._weight_conversions = [  # type: ignore[assignment]
        c for c in conversions if not isinstance(c, WeightConverter)
    ]


def forget_ties(model: PreTrainedModel) -> None:
    """Forget the ties of quantized layers, so that transformers neither makes nor breaks them.

    Where only one side of a tie is quantized, or the sides hold other integers, the config no
    longer says that embeddings are tied."""
    layers = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, OURS)}
    ties: dict[str, str] = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        ours = [layers.get(name.rpartition(".")[0]) for name in (target, source)]
        if ours == [None, None]:
            continue
        del ties[target]
        one, other = ours
        if one is None or other is None or not _share(one.weight, other.weight):
            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    module.config.tie_word_embeddings = False


def _share(one: Tensor, other: Tensor) -> bool:
    # Not filled yet, as the config is that of the folder, which says what they will be.
    return one.is_meta or other.is_meta or one.data_ptr() == other.data_ptr()


def in_table(name: str, table: dict[str, Any], prefix: str) -> str | None:
    """The entry of a module, or ``None``. A model with a head and the one without it, whose modules
    lack the prefix, load each other's folders."""
    for key in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if key in table:
            return key
    return None


def fitting(path: Path, name: str, info: AnyInfo, module: nn.Module) -> AnyInfo:
    """The entry as it is for this module of the model. Rows of a table come out in the dtype that
    the model is loaded in, as those of a float table do.

    Raises:
        CheckpointError: it can be no entry of this module.
    """
    if isinstance(info, EmbeddingInfo) and isinstance(module, nn.Embedding):
        info = replace(info, dtype=str(module.weight.dtype).removeprefix("torch."))
    check_layer(path, name, info, module)
    return info


def inside(
    model: nn.Module, modules: Iterable[str], kinds: tuple[type[nn.Module], ...]
) -> list[str]:
    """The layers of these kinds that are or lie in modules of these names, or of names that end
    so."""
    layers = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kinds)]
    result: list[str] = []
    for module in modules:
        found = [name for name in layers if f".{module}." in f".{name}."]
        if not found:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"modules_to_not_convert: no {names} layer is in a module {module!r}")
        result += found
    return result
