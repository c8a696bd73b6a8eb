"""Cures: which there are for a layer, in which order, and what each of them mends, measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import escape
from typing import Any

from torch import nn

from ..calibrate import OBSERVERS, Observer, calibrate
from ..modules import QuantizedLinear
from ..recipes import LayerRecipe, Recipe
from ..spec import WEIGHT_INT8, PerChannel, PerGroup, PerTensor, QuantSpec
from .causes import activations_lose
from .numbers import LayerDiagnosis
from .variants import changed_input

GROUPS = (128, 64, 32, 16)
"""Sizes of groups that are tried, the coarsest first."""
HOPELESS_DB = 1.0
"""A cure that gains less on the layer alone is not tried in the model."""


@dataclass(frozen=True)
class Candidate:
    """A cure to be tried: in words, and as a recipe; ``None`` keeps the layer float."""

    text: str
    recipe: LayerRecipe | None


def candidates(layer: LayerDiagnosis, observers: Mapping[str, float]) -> list[Candidate]:
    """What may mend a layer, by the bytes it costs; at equal bytes, the nearest to what it has.

    Args:
        layer: its numbers.
        observers: see :func:`kind_of`; the best of them is a candidate.
    """
    now = layer.recipe
    found: list[Candidate] = []
    smooth = "smooth" not in now.method and "awq" not in now.method
    if activations_lose(layer):
        if observers:
            best = max(observers, key=lambda name: observers[name])
            if best != now.observer:
                found.append(Candidate(f"range by {best}", replace(now, observer=best)))
        if smooth and layer.outlier_count:
            found.append(Candidate("smoothing", replace(now, method=("smooth", *now.method))))
        if now.mode == "static":
            found.append(Candidate("a range for each row (dynamic)", replace(now, mode="dynamic")))
        found.append(Candidate("float activations (weight-only)", replace(now, mode="weight-only")))
    coarse = [
        spec
        for spec in _finer(now.weight, layer.in_features)
        if _bits_a_weight(spec, layer.in_features) < 32
    ]
    coarse.sort(key=lambda spec: _bits_a_weight(spec, layer.in_features))
    mode = "weight-only" if activations_lose(layer) else now.mode
    found += [Candidate(_words(s), replace(now, weight=s, mode=mode)) for s in coarse]
    return [*found, Candidate("float", None)]


def _finer(spec: QuantSpec, in_features: int) -> list[QuantSpec]:
    """Specs with finer steps: smaller groups, then 8 bits."""
    found = []
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else in_features
    if spec.bits < 8:
        found += [replace(spec, granularity=PerGroup(g)) for g in GROUPS if g < size]
        eight = _bits_a_weight(WEIGHT_INT8, in_features)
        found = [s for s in found if _bits_a_weight(s, in_features) < eight]
        found.append(WEIGHT_INT8)
    elif spec.granularity == PerTensor():
        found.append(replace(spec, granularity=PerChannel(0)))
    return found


def _bits_a_weight(spec: QuantSpec, in_features: int) -> float:
    """With its share of scales and zero points, to tell which spec costs more."""
    if not isinstance(spec.granularity, PerGroup):
        return spec.bits + 64 / in_features
    zero_point = 0 if spec.symmetric else 8
    return spec.bits + (8 * spec.scale_dtype.itemsize + zero_point) / spec.granularity.size


def _words(spec: QuantSpec) -> str:
    if isinstance(spec.granularity, PerGroup):
        return f"{spec.bits} bits in groups of {spec.granularity.size}"
    return f"{spec.bits} bits per channel"


def overridden(recipe: Recipe, cures: Mapping[str, LayerRecipe | None]) -> Recipe:
    """The recipe with other choices for some layers, by their exact names."""
    overrides = (*((escape(n), r) for n, r in cures.items()), *recipe.overrides)
    return Recipe(recipe.default, overrides, recipe.embeddings)


class _Every:
    """An observer that lets every kind of observer see."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self.kinds: dict[str, Observer] = {name: kind() for name, kind in OBSERVERS.items()}
        self._layer = layer

    def observe(self, x: Any) -> None:
        x = changed_input(self._layer, x)
        for observer in self.kinds.values():
            observer.observe(x)


def ranges(
    model: nn.Module,
    layers: Mapping[str, QuantizedLinear],
    recipes: Mapping[str, LayerRecipe],
    calibration: list[Any],
    progress: bool,
) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What each observer chooses for static layers: layer → observer → scale and zero point.

    One pass over the calibration data, whatever the number of observers.
    """
    every = {name: _Every(layers[name]) for name in recipes}
    calibrate(model, every, calibration, progress)  # type: ignore[arg-type]
    return {
        name: {
            kind: observer.qparams(recipe.activation)
            for kind, observer in every[name].kinds.items()
            if not observer.is_empty
        }
        for name, recipe in recipes.items()
    }


def with_range(layer: QuantizedLinear, scale: Any, zero_point: Any) -> QuantizedLinear:
    """The same static layer with another range; all else is shared."""
    other = copy.copy(layer)
    other.__dict__["_buffers"] = dict(layer._buffers) | {
        "input_scale": scale,
        "input_zero_point": zero_point,
    }
    return other


def gain(before: float, after: float) -> float:
    """dB; infinite where nothing is left to gain on."""
    return math.inf if after == math.inf else after - before
