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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.container import CheckpointError
from ..formats.header import VERSIONS, LayerInfo, qualified
from ..formats.values import check_values
from ..modules import QuantizedLinear
from ..quantize import quantize
from ..recipes import LayerRecipe, Recipe, get_recipe
from ..replace import replace_modules, tie_weights

try:
    from transformers import PreTrainedModel
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from .layer_table import check_fits, detach, forget_ties, in_table, inside, table
except ImportError as error:
    raise ImportError(
        f"zeropoint.integrations.transformers needs transformers 5 or newer ({error}); "
        "pip install 'zeropoint[transformers]'"
    ) from error

__all__ = ["ZeropointConfig", "make_savable"]

METHOD = "zeropoint"
"""``quant_method`` in ``config.json``."""

_VERSION = "1"
_NOTE = (
    "Weights of quantized layers are integers with a last axis of length 1. Import "
    "zeropoint.integrations.transformers before loading."
)


@register_quantization_config(METHOD)
class ZeropointConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a model, and in a saved folder what it was quantized to.

    Args:
        recipe: as :func:`zeropoint.quantize` takes it: a name, a :class:`zeropoint.Recipe`, a
            :class:`zeropoint.LayerRecipe`, or one of the latter two as their ``to_dict`` gives
            them.
        include: glob patterns of the layers to consider; default all.
        exclude: glob patterns of layers to leave float. ``*`` also matches dots.
        modules_to_not_convert: the same in transformers' manner: names of modules, whole or their
            last parts (``"lm_head"``, ``"layers.0"``), that stay float with all inside them.
        calibration: sample batches, for recipes that need them. They are not saved.

    Raises:
        TypeError, ValueError: no recipe, or patterns that are not strings.

    >>> ZeropointConfig("int4", exclude="lm_head").to_dict()["exclude"]
    ['lm_head']
    """

    def __init__(
        self,
        recipe: str | Recipe | LayerRecipe | dict[str, Any] | None = "int8-dynamic",
        *,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        modules_to_not_convert: str | Iterable[str] | None = None,
        calibration: Iterable[Any] | None = None,
    ) -> None:
        self.quant_method: Any = METHOD
        if isinstance(recipe, dict):
            kind = Recipe if "default" in recipe else LayerRecipe
            recipe = kind.from_dict(recipe)
        self.recipe = None if recipe is None else get_recipe(recipe)
        self.include = _strings("include", include)
        self.exclude = _strings("exclude", exclude)
        self.modules_to_not_convert = _strings("modules_to_not_convert", modules_to_not_convert)
        self.calibration = calibration
        self.layers: dict[str, Any] | None = None
        self.tied: dict[str, str] = {}

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, all but the calibration data."""
        result: dict[str, Any] = {
            "quant_method": METHOD,
            "version": _VERSION,
            "recipe": None if self.recipe is None else self.recipe.to_dict(),
            "include": self.include,
            "exclude": self.exclude,
            "modules_to_not_convert": self.modules_to_not_convert,
        }
        if self.layers is not None:
            result |= {"layers": self.layers, "tied": self.tied, "note": _NOTE}
        return copy.deepcopy(result)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError, ValueError: not what :meth:`to_dict` gives, or of another version.
        """
        known = dict(config_dict)
        version = known.pop("version", _VERSION)
        if version != _VERSION:
            raise ValueError(
                f"quantization_config: version must be {_VERSION!r}, got {version!r}; "
                "a newer zeropoint may read it"
            )
        for key in ("quant_method", "note"):
            known.pop(key, None)
        layers, tied = known.pop("layers", None), known.pop("tied", {})
        if not isinstance(layers, dict | None) or not isinstance(tied, dict):
            raise TypeError("quantization_config: layers and tied must be JSON objects")
        config = cls(**known)
        config.layers, config.tied = copy.deepcopy(layers), dict(tied)
        return (config, kwargs) if return_unused_kwargs else config

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZeropointConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> ZeropointConfig:
        # transformers copies configs often; sample data need not follow.
        result = type(self).from_dict(self.to_dict())
        result.calibration = self.calibration
        return result


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
        self._infos: dict[str, LayerInfo] = {}
        self._shapes: dict[str, torch.Size] = {}

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
            name: LayerInfo.from_dict(path, name, copy.deepcopy(entry), VERSIONS[-1])
            for name, entry in entries.items()
        }
        built: dict[int, QuantizedLinear] = {}
        replacements: dict[str, nn.Module] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            key = in_table(name, infos, model.base_model_prefix)
            if key is None:
                continue
            check_fits(path, name, infos[key], module)
            self._infos[name] = infos[key]
            if id(module) not in built:
                layer = built[id(module)] = infos[key].build("meta")
                layer.weight = layer.weight.unsqueeze(-1)
                replacements[name] = layer
        if infos and not self._infos:
            raise CheckpointError(
                path, f"none of its {len(infos)} quantized layers is in {type(model).__name__}"
            )
        replace_modules(model, replacements, inplace=True)
        forget_ties(model)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if self.pre_quantized:
            self._check_loaded(model)
        else:
            self._quantize(model)
        return model

    def _quantize(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        away = [n for n, p in model.named_parameters() if p.is_meta]
        if away:
            raise ValueError(f"device_map puts {away[0]!r} on disk; quantizing needs it in memory")
        if config.recipe is None:
            raise ValueError("recipe must be given to quantize a float model, got None")
        exclude = [*(config.exclude or ()), *inside(model, config.modules_to_not_convert or ())]
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
        for name, info in self._infos.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            if id(layer) in done:
                continue
            done.add(id(layer))
            for key, (_, shape) in info.tensors().items():
                tensor: Tensor = layer._buffers[key]  # type: ignore[assignment]
                if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False):
                    raise CheckpointError(
                        path, "missing from the files", name, qualified(name, key)
                    )
                # Detached: transformers' mark on the tensor would go with every copy.
                tensor = tensor.detach()
                tensor = tensor.squeeze(-1) if key == "weight" else tensor
                # A model's own rules may widen what is in its modules; that is undone exactly.
                expected = getattr(info.build("meta"), key).dtype
                if tensor.is_floating_point() and expected.is_floating_point:
                    tensor = tensor.to(expected)
                if tensor.dtype != expected or tuple(tensor.shape) != shape:
                    raise CheckpointError(
                        path,
                        f"must be {expected} {list(shape)}, is {tensor.dtype} {list(tensor.shape)}",
                        name,
                        qualified(name, key),
                    )
                check_values(path, name, info, key, tensor)
                layer._buffers[key] = tensor
        self._tie(path, model)
        detach(model)

    def _tie(self, path: Path, model: PreTrainedModel) -> None:
        tied, prefix = self.quantization_config.tied, model.base_model_prefix
        by_key = {
            in_table(name, self.quantization_config.layers or {}, prefix): name
            for name in self._infos
        }
        for name, owner in tied.items():
            if name not in by_key or owner not in by_key:
                continue  # of a part that this model does not have
            layer, to = (model.get_submodule(by_key[n]) for n in (name, owner))
            for key in ("weight", "scale", "zero_point", "input_factor"):
                one, other = layer._buffers[key], to._buffers[key]
                if (one is None) != (other is None) or (
                    one is not None and other is not None and not torch.equal(one, other)
                ):
                    raise CheckpointError(
                        path, f"tied to {owner!r}, but holds other values", name, key
                    )
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
            for key in LayerInfo.of(model.get_submodule(name)).tensors():
                full = qualified(name, key)
                tensor = state[full]
                # Of tied layers each gets its bytes, so that each is found again.
                tensor = tensor.clone() if tensor.data_ptr() in seen else tensor
                seen.add(tensor.data_ptr())
                state[full] = tensor.unsqueeze(-1) if key == "weight" else tensor
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Float layers of the values that the integers stand for."""
        floats: dict[str, nn.Module] = {
            name: module.dequantize().to(dtype)
            for name, module in model.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        return replace_modules(model, floats, inplace=True)


def make_savable(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``save_pretrained`` write a model that :func:`zeropoint.quantize` made.

    For models quantized by other means than ``from_pretrained``: by a plan, by what a search found,
    with calibration data of their own. Call it after quantizing and before saving; without it,
    transformers saves integers as if they were float weights.

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
    if other is not None and not isinstance(other, ZeropointQuantizer):
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
    return model


def _strings(argument: str, value: str | Iterable[str] | None) -> list[str] | None:
    if value is None:
        return None
    values = [value] if isinstance(value, str) else list(value)
    for item in values:
        if not isinstance(item, str):
            raise TypeError(f"{argument} must hold strings, got {type(item).__name__}")
    return values
