"""What each choice takes: seconds of the layers' calls in a batch, from kernels measured here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from glob import escape
from statistics import median
from typing import Any

import torch
from torch import nn

from ..interleave import interleave
from ..plan import MODES, ShapePlan, plan
from ..recipes import LayerRecipe
from ..running import call, evaluating
from .candidates import Candidates
from .numbers import FLOAT

_FORMS = {LayerRecipe(mode): form for form, mode in MODES.items()}


def group_seconds(
    model: nn.Module, batch: Any, candidates: Candidates, seconds: float, progress: bool
) -> list[dict[str, float]]:
    """Seconds of each group's calls in one batch, by each of its choices.

    Forms that :func:`zeropoint.plan` knows are its to time. Others are timed as it does it, in turn
    with the float layers, going through all layers of a shape so that weights come from where they
    come from in the model; the float time of the plan, times the ratio, is what counts.
    """
    names = [escape(name) for name in candidates.layers]
    found = plan(model, batch, include=names, seconds=seconds, progress=progress)
    times: dict[str, dict[str, float]] = {name: {} for name in candidates.layers}
    for shape in found.shapes:
        for label, value in _shape_seconds(shape, candidates, seconds / len(found.shapes)).items():
            for name in shape.layers:
                times[name][label] = value
    return [
        {
            label: sum(times[name].get(label, 0.0) for name in group)
            for label in candidates.available(group)
        }
        for group in candidates.groups
    ]


def _shape_seconds(shape: ShapePlan, candidates: Candidates, seconds: float) -> dict[str, float]:
    own = shape.times["float"].median / 1e6
    result = {FLOAT: own}
    others = []
    for label, recipe in candidates.labels.items():
        form = None if recipe is None else _FORMS.get(recipe)
        if form in shape.times:
            result[label] = shape.times[form].median / 1e6
        elif recipe is not None:
            others.append(label)
    layers: dict[str, list[nn.Module]] = {FLOAT: [candidates.layers[n] for n in shape.layers]}
    for label in others:
        built = [candidates.built[n].get(label) for n in shape.layers]
        if all(layer is not None for layer in built):
            layers[label] = built  # type: ignore[assignment]
    if len(layers) == 1:
        return result
    sums = dict.fromkeys(layers, 0.0)
    dtype = getattr(torch, shape.dtype)
    for rows, count in shape.calls:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(rows, shape.in_features, generator=generator).to(dtype)
        with torch.inference_mode():
            for layer in itertools.chain(*layers.values()):
                layer(x)  # packs its weight
            calls = {label: _cycle(many, x) for label, many in layers.items()}
            for label, seen in interleave(calls, seconds / len(shape.calls)).items():
                sums[label] += count * median(seen)
    return result | {x: own * sums[x] / sums[FLOAT] for x in layers if x != FLOAT}


def _cycle(layers: Sequence[nn.Module], x: torch.Tensor) -> Callable[[], Any]:
    following = itertools.cycle(layers).__next__
    return lambda: following()(x)


def model_seconds(model: nn.Module, batch: Any, seconds: float) -> float:
    """Median of one call of the model."""
    with torch.inference_mode(), evaluating(model):
        return median(interleave({"model": lambda: call(model, batch)}, seconds)["model"]) / 1e6


def relative_seconds(model: nn.Module, other: nn.Module, batch: Any, seconds: float) -> float:
    """Time of ``other`` by the time of ``model``, both in turn."""
    calls = {"model": lambda: call(model, batch), "other": lambda: call(other, batch)}
    with torch.inference_mode(), evaluating(model), evaluating(other):
        seen = interleave(calls, seconds)
    return median(seen["other"]) / median(seen["model"])
