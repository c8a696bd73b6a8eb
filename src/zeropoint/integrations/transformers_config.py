"""``ZeropointConfig``: the ``quantization_config`` of a transformers model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..recipes import LayerRecipe, Recipe, get_recipe

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
        include: glob patterns of the layers to consider, embeddings among them where the recipe
            has them quantized; default all.
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


def _strings(argument: str, value: str | Iterable[str] | None) -> list[str] | None:
    if value is None:
        return None
    values = [value] if isinstance(value, str) else list(value)
    for item in values:
        if not isinstance(item, str):
            raise TypeError(f"{argument} must hold strings, got {type(item).__name__}")
    return values
