"""Every layer as every choice would make it, and which layers move together."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import escape
from typing import Any

from torch import nn

from ..calibrate import DEFAULT_OBSERVER
from ..quantize import quantize
from ..recipes import RECIPES, LayerRecipe, Recipe, get_recipe
from ..running import model_bytes
from ..spec import PerGroup, PerTensor
from ..walk import Selection
from .numbers import FLOAT


@dataclass
class Candidates:
    """What the allocation chooses from.

    Args:
        labels: label → recipe of each choice; ``None`` is float, which is always one, and the last.
        layers: name → float layer, in the order of the model.
        groups: names of the layers that share a weight, in the order of the model.
        built: name → label → the layer as this choice makes it.
        left: name → reason of the layers that no choice fits.
    """

    labels: dict[str, LayerRecipe | None]
    layers: dict[str, nn.Linear] = field(default_factory=dict)
    groups: list[tuple[str, ...]] = field(default_factory=list)
    built: dict[str, dict[str, nn.Module]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def available(self, group: tuple[str, ...]) -> list[str]:
        """Labels that every layer of the group can get."""
        return [x for x in self.labels if all(x in self.built[n] or x == FLOAT for n in group)]

    def drop(self, name: str, label: str) -> None:
        """Take a choice away from a layer."""
        del self.built[name][label]
        if not self.built[name]:
            self.leave(name, "every choice for it gives values that are not finite")

    def leave(self, name: str, reason: str) -> None:
        """Leave a layer float, and with it those that share its weight."""
        for group in self.groups:
            if name in group:
                for member in group:
                    self.layers.pop(member, None)
                    self.built.pop(member, None)
                    self.left[member] = reason
        self.groups = [group for group in self.groups if name not in group]

    def recipe(self, labels: Sequence[str]) -> Recipe:
        """As :func:`zeropoint.quantize` takes it: the label of each group by the layers' names."""
        overrides = tuple(
            (escape(name), self.labels[label])
            for group, label in zip(self.groups, labels, strict=True)
            for name in group
            if label != FLOAT
        )
        return Recipe(None, overrides)


def label_choices(
    choices: Iterable[str | LayerRecipe | Recipe | None],
) -> dict[str, LayerRecipe | None]:
    """Label → recipe: the name in ``RECIPES`` where there is one, else :func:`short`.

    Raises:
        TypeError, ValueError: something that is no choice, or a recipe with patterns; no choice.

    >>> list(label_choices(["int8-dynamic", LayerRecipe("weight-only"), None]))
    ['int8-dynamic', 'int8-weight-only', 'float']
    """
    if isinstance(choices, str | LayerRecipe | Recipe):
        choices = [choices]
    names = {recipe.default: name for name, recipe in RECIPES.items() if not recipe.overrides}
    found: dict[str, LayerRecipe | None] = {}
    for choice in choices:
        if choice is None or choice == FLOAT:
            continue
        recipe = get_recipe(choice)
        if recipe.overrides or recipe.default is None or recipe.embeddings is not None:
            raise ValueError(
                f"choices must be the same for all layers and leave embeddings, got {choice!r}"
            )
        label = names.get(recipe.default) or short(recipe.default)
        if found.get(label, recipe.default) != recipe.default:  # they differ in something rare
            label = str(recipe.default)
        found[label] = recipe.default
    if not found:
        raise ValueError("choices must hold something else than float")
    return {**found, FLOAT: None}


def short(recipe: LayerRecipe) -> str:
    """A few letters that tell a recipe from others.

    >>> short(RECIPES["int4-weight-only"].default)
    'uint4 g32 weight-only'
    """
    spec = recipe.weight
    parts = [f"{'int' if spec.signed else 'uint'}{spec.bits}"]
    if isinstance(spec.granularity, PerGroup):
        parts.append(f"g{spec.granularity.size}")
    elif isinstance(spec.granularity, PerTensor):
        parts.append("per tensor")
    parts += [recipe.mode, *getattr(recipe, "method", ())]
    if recipe.mode == "static" and recipe.observer != DEFAULT_OBSERVER:
        parts.append(recipe.observer)
    return " ".join(parts)


def needs_calibration(recipe: LayerRecipe | None) -> bool:
    """Whether the layer is made with sample data."""
    if recipe is None:
        return False
    return recipe.mode == "static" or bool(getattr(recipe, "needs_calibration", False))


def build(
    model: nn.Module,
    labels: dict[str, LayerRecipe | None],
    calibration: Sequence[Any],
    include: Any,
    exclude: Any,
    progress: bool,
) -> Candidates:
    """Quantize the whole model by each choice and keep its layers.

    Raises:
        ValueError: no choice fits any layer, or sample data is needed and there is none.
    """
    fits = Selection(model, include, exclude, lambda names: True)
    if not fits.chosen:
        told = "; ".join(f"{name or '(the model)'}: {why}" for name, why in fits.left.items())
        raise ValueError(f"there is no Linear layer that can be quantized: {told or 'none at all'}")
    result = Candidates(labels)
    modules = dict(model.named_modules())
    reasons: dict[str, str] = {}
    found: dict[str, dict[str, nn.Module]] = {}
    for label, recipe in labels.items():
        if recipe is None:
            continue
        needed = needs_calibration(recipe)
        if needed and not calibration:
            raise ValueError(f"the choice {label!r} needs calibration data, and there is none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nothing was quantized: told below
            quantized = quantize(
                model,
                Recipe(recipe),
                calibration=calibration if needed else None,
                include=include,
                exclude=exclude,
                progress=progress,
            )
        layers = dict(quantized.named_modules())
        summary: Any = quantized.quantization
        for name in summary.quantized:
            if isinstance(modules.get(name), nn.Linear):
                found.setdefault(name, {})[label] = layers[name]
        reasons.update(summary.left)
    shared: dict[int, list[str]] = {}
    for name, module in modules.items():
        if name in found and isinstance(module, nn.Linear):
            result.layers[name] = module
            result.built[name] = found[name]
            shared.setdefault(id(module.weight), []).append(name)
    result.groups = [tuple(names) for names in shared.values()]
    result.left = {name: why for name, why in reasons.items() if name not in found}
    return result


def group_bytes(model: nn.Module, candidates: Candidates) -> list[dict[str, int]]:
    """Bytes of each group's state by each of its choices, as ``state_dict`` holds it.

    A float weight that something else uses too costs nothing: it is there in any case.
    """
    ours = {id(layer) for layer in candidates.layers.values()}
    elsewhere = {
        id(p) for m in model.modules() if id(m) not in ours for p in m._parameters.values()
    }
    result = []
    for group in candidates.groups:
        floats = [candidates.layers[name] for name in group]
        sizes = {}
        for label in candidates.available(group):
            if label == FLOAT:
                kept = {id(p): p for x in floats for p in x.parameters() if id(p) not in elsewhere}
                sizes[label] = sum(p.numel() * p.element_size() for p in kept.values())
            else:
                layers = nn.ModuleList([candidates.built[name][label] for name in group])
                sizes[label] = model_bytes(layers)
        result.append(sizes)
    return result
