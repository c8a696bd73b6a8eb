"""``diagnose``: find out which layers lose what, why, and what mends it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..calibrate import progress_bar
from ..recipes import LayerRecipe, Recipe, get_recipe
from ..running import pick_output
from ..splits import rows
from .cache import Cache, fingerprint
from .causes import culprits
from .cures import overridden
from .damages import Damages, Meter
from .inputs import Watch
from .layer_numbers import layer_numbers
from .metrics import Metric
from .numbers import Cause, Damage, Diagnosis, LayerDiagnosis
from .samples import Sample, batches_of, extent, sample, whole_batches
from .switching import Forward, ready, run, switched
from .trials import Clinic, cause
from .variants import build, chosen, computed

BUDGET = 16.0
"""What a diagnosis may cost, in runs of the model over all the data."""
_FIXED = 3.0  # the pass that watches the layers, their statistics, the float runs
_CALIBRATING = 8.0  # what observers cost, which see every value, and trying others
TREATED = 0.25
"""Of the layers, the share that cures are tried on at most, the worst ones; four at least."""


def diagnose(
    model: nn.Module,
    data: Iterable[Any],
    metric: Callable[[nn.Module], Any] | None = None,
    *,
    recipe: str | Recipe | LayerRecipe = "int8-dynamic",
    calibration: Iterable[Any] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    samples: int | None = None,
    budget: float = BUDGET,
    metric_layers: int = 2,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Find out which layers of a model lose what when it is quantized, why, and what mends it.

    The model itself is run, with other computations in its layers while they are measured; nothing
    of it is copied, and whatever happens, it is afterwards as it was. One pass over the data keeps
    some of each layer's inputs, from which the numbers of the layers alone come. Then the model
    runs on a sample of the data, twice for each layer: with this layer alone quantized, and with
    all others. Cures are tried on the layers that stand out.

    Args:
        model: any module.
        data: batches, as the model will meet them: a tensor is called ``model(x)``, a tuple or list
            ``model(*x)``, a mapping ``model(**x)``. They are held in memory.
        metric: ``metric(model)`` returns a number, or the scores of the samples, 1-d, whose mean it
            is. It is called with the float model, the quantized and the mended one, and for the
            worst ``metric_layers`` layers.
        recipe: what to diagnose, as in :func:`zeropoint.quantize`.
        calibration: batches that ``quantize`` is to be calibrated with; by default ``data``.
        output: picks the tensor to compare from what the model returns; by default the first
            floating-point one with at least one dimension, depth first.
        samples: on how many rows of the data damages are measured; by default as many as keep the
            diagnosis within ``budget``. Batches whose tensors differ in length along dimension 0,
            and those of models that cannot take fewer rows, are taken whole.
        budget: runs of the model over all the data that the diagnosis may cost, about, the calls of
            ``metric`` included.
        metric_layers: for how many layers the metric is taken, two calls each.
        cache: a file that keeps what was measured, so that a diagnosis that was interrupted goes on
            where it stopped. One of another model, data or recipe is ignored, with a warning.
        progress: show progress bars where it takes over two seconds and stderr is a terminal.

    Returns:
        A :class:`Diagnosis`; ``quantize(model, diagnosis.suggestions, ...)`` follows it.

    Raises:
        TypeError: ``model`` is no module; ``data`` or ``calibration`` is no iterable of batches;
            outputs without a floating-point tensor; a metric that returns neither a number nor
            scores.
        ValueError: no data; a recipe that quantizes none of the model's layers; a number out of
            range; a ``cache`` that is another kind of file; what :func:`zeropoint.quantize` raises.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> diagnosis = diagnose(model, [torch.randn(64, 16)])
    >>> [layer.name for layer in diagnosis.layers]
    ['0', '2']
    """
    _check_arguments(model, samples, budget, metric_layers)
    recipe = get_recipe(recipe)
    batches = batches_of("data", data)
    calibrating = batches if calibration is None else batches_of("calibration", calibration)
    selection = chosen(model, recipe)
    floats: dict[str, nn.Linear] = {name: selection.layers[name] for name in selection.chosen}
    if not floats:
        reasons = "; ".join(f"{n or '(model)'}: {r}" for n, r in selection.left_in_order().items())
        raise ValueError(f"the recipe quantizes no layer of the model ({reasons or 'no Linear'})")
    calls = 0 if metric is None else 3 + 2 * metric_layers
    wanted = samples or _samples(batches, selection.chosen, budget, calls)
    settings = {"samples": wanted, "metric_layers": metric_layers, "own output": output is not None}
    kept = Cache(
        cache,
        {
            "model": fingerprint(model),
            "data": fingerprint(batches),
            "calibration": fingerprint(calibrating),
            "recipe": fingerprint(recipe.to_dict()),
            "settings": fingerprint(settings),
        },
    )
    with ready(model):
        try:
            work = _Work(model, batches, calibrating, recipe, floats, kept, progress)
            return work.diagnosis(output or pick_output, wanted, metric, metric_layers)
        finally:
            kept.save()


class _Work:
    """One diagnosis while it is made: each method a step, in the order of the class."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        calibration: list[Any],
        recipe: Recipe,
        floats: dict[str, nn.Linear],
        cache: Cache,
        progress: bool,
    ) -> None:
        self.model, self.batches, self.calibration = model, batches, calibration
        self.recipe, self.floats, self.cache, self.progress = recipe, floats, cache, progress
        self.meter = Meter(sum(extent(batch) for batch in batches))
        self.watch = Watch(floats)
        self.notes: list[str] = []

    def diagnosis(
        self,
        pick: Callable[[Any], Tensor],
        wanted: int,
        metric: Callable[[nn.Module], Any] | None,
        metric_layers: int,
    ) -> Diagnosis:
        seconds = self._look()
        self.variants = build(self.model, self.recipe, self.calibration, self.progress)
        self.meter.ran_over(self.calibration, self.variants.runs)
        part = self._sample(wanted)
        self.damages = Damages(self.model, part, pick, self.cache, self.meter)
        layers, before = self._layers()
        asked = None if metric is None else Metric(metric, self.model, self.cache)
        if asked is not None:
            quantized = asked.of("recipe", self.variants.forwards(self.floats))
            before = replace(before, metric=quantized[0])
            layers = self._with_metric(layers, asked, metric_layers)
        causes, suggestions, mended = self._treat(layers, before)
        after, change = None, None
        if mended:
            name = f"suggestions {json.dumps(suggestions.to_dict(), sort_keys=True)}"
            after = self._measure({name: lambda: mended})[name]
            if asked is not None:
                repaired = asked.of(name, mended)
                after = replace(after, metric=repaired[0])
                change = asked.change(quantized, repaired)
        elif asked is not None:
            change = asked.change(quantized, None)
        if asked is not None:
            self.meter.evaluations += asked.calls
        return Diagnosis(
            model=type(self.model).__name__,
            recipe=self.recipe,
            batches=len(self.batches),
            rows=sum(rows(batch) for batch in self.batches),
            samples=part.rows,
            sample_batches=len(part.batches),
            statistics_rows=2 * self.watch.limit - 1,
            damage_before=before,
            damage_after=after,
            metric=change,
            layers=tuple(layers),
            left=self.variants.left,
            causes=tuple(causes),
            suggestions=suggestions,
            evaluations=self.meter.evaluations,
            evaluation_seconds=seconds,
            seconds=self.cache.seconds,
            notes=tuple(self.notes),
        )

    def _look(self) -> float:
        """Watch the layers' inputs during one pass; the seconds that the model itself took."""
        began = time.perf_counter()
        with switched(self.watch.forwards()):
            for batch in progress_bar(self.batches, "watching the layers", self.progress):
                run(self.model, batch)
                self.meter.ran(batch)
        return time.perf_counter() - began - self.watch.seconds

    def _sample(self, wanted: int) -> Sample:
        found = sample(self.batches, wanted)
        if found.share == 1:
            return found
        try:
            run(self.model, found.batches[0])
        except Exception as error:
            self.notes.append(
                f"The model does not take part of a batch ({type(error).__name__}), so the sample "
                "is made of whole batches."
            )
            return whole_batches(self.batches, wanted)
        self.meter.ran(found.batches[0])
        return found

    def _layers(self) -> tuple[list[LayerDiagnosis], Damage]:
        """The numbers of each layer, and the damage of them all."""
        made, floats = self.variants.layers, self.floats
        called = [name for name in made if self.watch.inputs[name].calls]
        runs: dict[str, Callable[[], Mapping[nn.Module, Forward]]] = {
            "recipe": partial(self.variants.forwards, floats)
        }
        for name in called:
            runs[f"only {name!r}"] = partial(self.variants.forwards, floats, only=name)
            runs[f"all but {name!r}"] = partial(self.variants.forwards, floats, without=name)
        found = self._measure(runs)
        before = found["recipe"]
        nothing = replace(before, relative_error=0.0, cosine=1.0, non_finite=0)
        only = {name: found.get(f"only {name!r}", nothing) for name in made}
        total = sum(x.noise for x in only.values() if x.noise > 0)
        layers = [
            LayerDiagnosis(
                name=name,
                in_features=layer.in_features,
                out_features=layer.out_features,
                recipe=self.variants.recipes[name],
                only_this=only[name],
                all_but_this=found.get(f"all but {name!r}", before),
                noise_share=only[name].noise / total if total else math.nan,
                **layer_numbers(floats[name], layer, self.watch.inputs[name]),
            )
            for name, layer in made.items()
        ]
        unused = len(made) - len(called)
        if unused:
            self.notes.append(f"The data never calls {unused} of the layers.")
        rejected = sum(inputs.non_finite for inputs in self.watch.inputs.values())
        if rejected:
            self.notes.append(
                f"{rejected} rows of layers' inputs hold NaN or Inf; statistics leave them out."
            )
        return layers, before

    def _measure(
        self, runs: Mapping[str, Callable[[], Mapping[nn.Module, Forward]]]
    ) -> dict[str, Damage]:
        total = len(runs) * len(self.damages.sample.batches)
        with progress_bar(range(total), "quantizing layer by layer", self.progress) as bar:
            return self.damages.measure(runs, bar)

    def _with_metric(
        self, layers: list[LayerDiagnosis], metric: Metric, count: int
    ) -> list[LayerDiagnosis]:
        """The metric of the layers that damage most, each alone and left out."""
        worst = sorted(layers, key=lambda x: -x.only_this.noise)[:count]
        changed = {}
        for x in worst:
            values = [
                metric.of(f"{what} {x.name!r}", self.variants.forwards(self.floats, **kind))[0]
                for what, kind in (("only", {"only": x.name}), ("all but", {"without": x.name}))
            ]
            changed[x.name] = replace(
                x,
                only_this=replace(x.only_this, metric=values[0]),
                all_but_this=replace(x.all_but_this, metric=values[1]),
            )
        return [changed.get(x.name, x) for x in layers]

    def _treat(
        self, layers: list[LayerDiagnosis], before: Damage
    ) -> tuple[list[Cause], Recipe, dict[nn.Module, Forward]]:
        """Causes, the recipe that cures them, and the layers' functions by it."""
        noises = {x.name: x.only_this.noise for x in layers if x.calls}
        noises = {name: math.inf if math.isnan(x) else x for name, x in noises.items()}
        sick, limit = culprits(noises, before)
        most = max(4, math.ceil(TREATED * len(layers)))
        if len(sick) > most:
            self.notes.append(
                f"{len(sick)} layers lose more than they may; cures were tried on the {most} "
                "worst. Where so many do, another recipe for all of them is the better cure."
            )
            sick = sick[:most]
        if not sick:
            return [], self.recipe, {}
        clinic = Clinic(
            self.model,
            self.floats,
            self.variants,
            self.watch.inputs,
            self.batches,
            self.calibration,
            self.damages,
            limit,
        )
        by_name = {x.name: x for x in layers}
        patients = clinic.treat([by_name[name] for name in sick], self.progress)
        cures = {p.layer.name: p.trials[-1].recipe for p in patients}
        suggestions = overridden(self.recipe, cures)
        # What quantize would leave float by that recipe, since its weight is tied to a layer that
        # stays float, stays float here.
        stay = chosen(self.model, suggestions).chosen
        cured = {p.layer.name: p.cured for p in patients if p.cured is not None}
        made = {n: cured.get(n, layer) for n, layer in self.variants.layers.items() if n in stay}
        mended: dict[nn.Module, Forward] = {
            self.floats[name]: computed(layer) for name, layer in made.items()
        }
        return [cause(p) for p in patients], suggestions, mended


def _samples(
    batches: list[Any], recipes: Mapping[str, LayerRecipe], budget: float, metric_calls: int
) -> int:
    """How many rows keep the diagnosis within its budget."""
    fixed = _FIXED + metric_calls
    fixed += _CALIBRATING * any(x.needs_calibration for x in recipes.values())
    runs = 2 + (2 + 2 * TREATED) * len(recipes)
    share = min(1.0, max(0.0, budget - fixed) / runs)
    wanted = max(1, int(share * sum(rows(batch) for batch in batches)))
    while wanted > 1 and (found := sample(batches, wanted).share) > 1.1 * share:
        wanted = min(wanted - 1, max(1, int(wanted * share / found)))
    return wanted


def _check_arguments(model: Any, samples: Any, budget: Any, metric_layers: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value, least in (("samples", samples, 1), ("metric_layers", metric_layers, 0)):
        if value is None and name == "samples":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    if not budget > 0:
        raise ValueError(f"budget must be above 0, got {budget!r}")
