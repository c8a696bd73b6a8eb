"""A transformers model's quantized layers: as a table in its ``config.json``, found again by name,
and kept from what transformers does to weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from ..formats.container import CheckpointError
from ..formats.header import LayerInfo
from ..modules import QuantizedLinear
from ..packed_linear import PackedLinear


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
        if type(module) is not QuantizedLinear:
            weight = module._buffers.get("weight")
            if weight is not None and not weight.is_floating_point():
                raise ValueError(
                    f"layer {name!r}: a {type(module).__name__} cannot be saved in a transformers "
                    "folder, only QuantizedLinear"
                )
            continue
        layers[name] = LayerInfo.of(module).to_dict()
        owner, identity = first.setdefault(module.weight.data_ptr(), (name, id(module)))
        if identity != id(module):
            tied[name] = owner
    return layers, tied


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
    layers = {
        n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedLinear)
    }
    ties: dict[str, str] = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        ours = [name.rpartition(".")[0] in layers for name in (target, source)]
        if not any(ours):
            continue
        del ties[target]
        if not all(ours):  # a head with integers of its own, an embedding in floats
            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    module.config.tie_word_embeddings = False


def in_table(name: str, table: dict[str, Any], prefix: str) -> str | None:
    """The entry of a module, or ``None``. A model with a head and the one without it, whose modules
    lack the prefix, load each other's folders."""
    for key in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if key in table:
            return key
    return None


def check_fits(path: Path, name: str, info: LayerInfo, module: nn.Module) -> None:
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            path, f"a quantized Linear, but the model has a {type(module).__name__} there", name
        )
    got = (*module.weight.shape, module.bias is not None)
    expected = (info.out_features, info.in_features, info.bias)
    if got != expected:
        raise CheckpointError(
            path,
            f"out_features, in_features, bias: {expected} in config.json, {got} in the model",
            name,
        )


def inside(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """The Linear layers that are or lie in modules of these names, or of names that end so."""
    linears = [
        n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)
    ]
    result: list[str] = []
    for module in modules:
        found = [name for name in linears if f".{module}." in f".{name}."]
        if not found:
            raise ValueError(f"modules_to_not_convert: no Linear layer is in a module {module!r}")
        result += found
    return result
