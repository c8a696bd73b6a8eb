"""Hugging Face transformers: ``from_pretrained`` that quantizes, ``save_pretrained`` of integers.

Importing this module registers :class:`ZeropointConfig` and its quantizer with transformers,
through ``register_quantization_config`` and ``register_quantizer``. See docs/transformers.md.

In a saved folder ``config.json`` holds the table of quantized layers, and the safetensors files
hold their buffers as they are, with one exception: a weight has a last axis of length 1. Where this
module was not imported, transformers passes over the table, makes float layers and fills them by
name. To it integers are weights like any other: it is the shape that stops it.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..embedding import QuantizedEmbedding
from ..formats.container import CheckpointError
from ..formats.header import VERSIONS, AnyInfo, info_from_dict, info_of, qualified
from ..formats.values import check_values
from ..quantize import quantize
from ..replace import allow_saving, replace_modules, tie_weights

try:
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer, register_quantizer

    from .layer_table import (
        OURS,
        SHARED,
        detach,
        fitting,
        forget_ties,
        in_table,
        inside,
        is_found_by_tie,
        kind_of_weight,
        narrowed,
        shared_buffers,
        table,
        widen,
    )
    from .transformers_config import METHOD, ZeropointConfig
except ImportError as error:
    raise ImportError(
        f"zeropoint.integrations.transformers needs transformers 5 or newer ({error}); "
        "pip install 'zeropoint[transformers]'"
    ) from error

__all__ = ["ZeropointConfig", "make_savable"]


@register_quantizer(METHOD)
class ZeropointQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model with a :class:`ZeropointConfig`."""

    quantization_config: ZeropointConfig

    def __init__(self, quantization_config: ZeropointConfig, **kwargs: Any) -> None:
        # A copy: one config may serve several models, and each gets a table of its own.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        if self.pre_quantized and self.quantization_config.layers is None:
            raise ValueError(
                "the model's quantization_config holds no table of layers: its weights were not "
                "saved by save_pretrained. Remove it from config.json, and pass "
                "quantization_config=ZeropointConfig(...) to quantize"
            )
        self._infos: dict[str, AnyInfo] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._ties: dict[str, str] = {}  # layer → whose integers it uses, by their names here

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """What a tensor of a file is cast to: never a float to an integer, which is refused later,
        when all is loaded."""
        if dtype is not None and not dtype.is_floating_point:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        """Put empty quantized layers where the table says, for transformers to fill."""
        if not self.pre_quantized:
            return model
        path = Path(str(model.config.name_or_path))
        entries = self.quantization_config.layers or {}
        infos = {
            name: info_from_dict(path, name, copy.deepcopy(entry), VERSIONS[-1])
            for name, entry in entries.items()
        }
        built: dict[int, nn.Module] = {}
        replacements: dict[str, nn.Module] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            key = in_table(name, infos, model.base_model_prefix)
            if key is None:
                continue
            info = self._infos[name] = fitting(path, name, infos[key], module)
            if id(module) not in built:
                layer = built[id(module)] = info.build("meta")
                if isinstance(layer, QuantizedEmbedding):
                    layer.padding_idx = module.padding_idx  # type: ignore[assignment]
                layer.weight = layer.weight.unsqueeze(-1)
                widen(layer)
                replacements[name] = layer
        if infos and not self._infos:
            raise CheckpointError(
                path, f"none of its {len(infos)} quantized layers is in {type(model).__name__}"
            )
        replace_modules(model, replacements, inplace=True)
        forget_ties(model)
        self._find_ties(path, model)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if self.pre_quantized:
            self._check_loaded(model)
        else:
            self._quantize(model)
        _let_parts_be_saved(model)
        return model

    def _quantize(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        away = [n for n, p in model.named_parameters() if p.is_meta]
        if away:
            raise ValueError(f"device_map puts {away[0]!r} on disk; quantizing needs it in memory")
        if config.recipe is None:
            raise ValueError("recipe must be given to quantize a float model, got None")
        kinds = (nn.Linear,) if config.recipe.embeddings is None else (nn.Linear, nn.Embedding)
        left = inside(model, config.modules_to_not_convert or (), kinds)
        exclude = [*(config.exclude or ()), *left]
        calibration, config.calibration = config.calibration, None
        quantize(
            model,
            config.recipe,
            calibration=calibration,
            include=config.include,
            exclude=exclude or None,
            inplace=True,
        )
        detach(model)
        config.layers, config.tied = table(model)

    def _check_loaded(self, model: PreTrainedModel) -> None:
        path = Path(str(model.config.name_or_path))
        for name, held in model.state_dict().items():
            # Early transformers 5 fill whatever they are given where there is a quantizer.
            if held.shape != self._shapes.get(name, held.shape):
                raise CheckpointError(
                    path,
                    f"shape is {list(held.shape)} in the files, {list(self._shapes[name])} by "
                    "config.json",
                    tensor=name,
                )
        done: set[int] = set()
        left_out: set[str] = set()
        for name, info in self._infos.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, OURS)
            if id(layer) in done:
                continue
            done.add(id(layer))
            if name in self._ties and not any(
                _is_loaded(b) for b in shared_buffers(layer).values()
            ):
                left_out.add(name)
            made = info.build("meta")
            for key, (_, shape) in info.tensors().items():
                tensor: Tensor = layer._buffers[key]  # type: ignore[assignment]
                in_file = name not in left_out or key not in SHARED
                if in_file and not _is_loaded(tensor):
                    raise CheckpointError(
                        path, "missing from the files", name, qualified(name, key)
                    )
                # Detached: transformers' mark on the tensor would go with every copy.
                tensor = tensor.detach()
                tensor = tensor.squeeze(-1) if key == "weight" else tensor
                expected = getattr(made, key).dtype
                tensor = narrowed(tensor, expected) if in_file else tensor.to(expected)
                if tensor.dtype != expected or tuple(tensor.shape) != shape:
                    raise CheckpointError(
                        path,
                        f"must be {expected} {list(shape)}, is {tensor.dtype} {list(tensor.shape)}",
                        name,
                        qualified(name, key),
                    )
                if in_file:
                    check_values(path, name, info, key, tensor)
                layer._buffers[key] = tensor
        self._tie(path, model, left_out)
        detach(model)

    def _find_ties(self, path: Path, model: PreTrainedModel) -> None:
        config, prefix = self.quantization_config, model.base_model_prefix
        by_key = {in_table(name, config.layers or {}, prefix): name for name in self._infos}
        for name, owner in config.tied.items():
            if not isinstance(owner, str) or not {name, owner} <= (config.layers or {}).keys():
                reason = f"tied to {str(owner)[:80]!r}, but one of them is no quantized layer"
                raise CheckpointError(path, reason, name)
            if name in by_key and owner in by_key:  # else of a part that this model does not have
                self._ties[by_key[name]] = by_key[owner]
        if self._ties:
            left_out = [rf"^{re.escape(name)}\." for name in self._ties]
            known = getattr(model, "_keys_to_ignore_on_load_missing", None)
            model._keys_to_ignore_on_load_missing = [*(known or ()), *left_out]  # type: ignore[assignment]

    def _tie(self, path: Path, model: PreTrainedModel, left_out: set[str]) -> None:
        for name, owner in self._ties.items():
            if owner in self._ties:
                raise CheckpointError(path, f"tied to {owner!r}, which is tied itself", name)
            layer, to = model.get_submodule(name), model.get_submodule(owner)
            if kind_of_weight(layer) != kind_of_weight(to):
                raise CheckpointError(
                    path, f"tied to {owner!r}, whose weight is of another kind", name
                )
            ones, others = shared_buffers(layer), shared_buffers(to)
            if name not in left_out and not all(torch.equal(ones[k], others[k]) for k in ones):
                raise CheckpointError(path, f"tied to {owner!r}, but holds other values", name)
            tie_weights(layer, to)  # type: ignore[arg-type]

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> Any:
        """What ``save_pretrained`` writes. It writes ``config.json`` afterwards, so that the table
        is of the layers as they are now."""
        config = self.quantization_config
        config.layers, config.tied = table(model)
        model.config.quantization_config = config
        detach(model)
        state = model.state_dict()
        seen: set[int] = set()
        for name in config.layers:
            info = info_of(model.get_submodule(name))
            assert info is not None
            left_out = is_found_by_tie(model, name, config.tied)
            for key in info.tensors():
                full = qualified(name, key)
                if left_out and key in SHARED:
                    del state[full]
                    continue
                tensor = state[full]
                # Of a layer used twice each name gets its bytes, so that each is found again.
                tensor = tensor.clone() if tensor.data_ptr() in seen else tensor
                seen.add(tensor.data_ptr())
                state[full] = tensor.unsqueeze(-1) if key == "weight" else tensor
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Float layers of the values that the integers stand for; tied ones share them."""
        if isinstance(dtype, str):  # as a config has it once the model was saved
            dtype = getattr(torch, dtype)
        floats: dict[str, nn.Module] = {}
        first: dict[int, nn.Module] = {}  # address of the integers → who got their floats
        for name, module in model.named_modules():
            if isinstance(module, OURS):
                layer = floats[name] = module.dequantize().to(dtype)
                owner = first.setdefault(module.weight.data_ptr(), layer)
                if owner.weight.dtype == layer.weight.dtype:  # type: ignore[union-attr]
                    layer.weight = owner.weight  # type: ignore[assignment]
        for module in model.modules():
            if module is not model and _is_ours(module):
                del module.hf_quantizer
        return replace_modules(model, floats, inplace=True)


def make_savable(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``save_pretrained`` write a model that :func:`zeropoint.quantize` made.

    For models quantized by other means than ``from_pretrained``: by a plan, by what a search found,
    with calibration data of their own. Call it after quantizing and before saving; until then
    ``save_pretrained`` raises, since it would write integers as if they were float weights.

    Args:
        model: a transformers model with quantized layers. It is changed in place, and keeps
            computing what it did.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: it has no quantized layers, or is quantized by another library.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    other = getattr(model, "hf_quantizer", None)
    if other is not None and not _is_ours(model):
        raise ValueError(f"model is quantized already, by {type(other).__name__}")
    config = ZeropointConfig(None)
    config.layers, config.tied = table(model)
    if not config.layers:
        raise ValueError("model has no quantized layers; quantize it first")
    quantizer = ZeropointQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, METHOD  # type: ignore[assignment]
    detach(model)
    _let_parts_be_saved(model)
    return model


def _let_parts_be_saved(model: PreTrainedModel) -> None:
    """A model's parts, such as the body below its head, are saved by themselves at times."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or not any(
            isinstance(m, OURS) for m in part.modules()
        ):
            continue
        if part is not model and getattr(part, "hf_quantizer", None) is None:
            config = ZeropointConfig(None)
            config.layers, config.tied = table(part)
            part.hf_quantizer = ZeropointQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
        if _is_ours(part):
            allow_saving(part)


def _is_ours(model: nn.Module) -> bool:
    return isinstance(getattr(model, "hf_quantizer", None), ZeropointQuantizer)


def _is_loaded(tensor: Tensor | None) -> bool:
    return (
        tensor is not None
        and not tensor.is_meta
        and bool(getattr(tensor, "_is_hf_initialized", False))
    )
