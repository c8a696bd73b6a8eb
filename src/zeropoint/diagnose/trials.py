"""Try cures on the layers that stand out, round by round, until each has one that suffices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from ..algorithms import needs_data
from ..calibrate import DEFAULT_OBSERVER, OBSERVERS, progress_bar
from ..modules import QuantizedLinear
from ..recipes import Recipe
from .causes import activations_lose, evidence, kind_of
from .cures import (
    HOPELESS_DB,
    Candidate,
    candidates,
    gain,
    overridden,
    ranges,
    with_range,
)
from .damages import Damages
from .inputs import Inputs, Watch
from .layer_numbers import alone_db
from .numbers import Cause, Damage, LayerDiagnosis, Trial
from .one_layer import from_inputs
from .switching import run, switched
from .variants import Variants, build, changed_input, computed, layer_bytes
from .words import decibels, error


@dataclass
class Patient:
    """A layer that stands out, while cures are tried on it."""

    layer: LayerDiagnosis
    observers: dict[str, float]
    own_range: float
    waiting: list[Candidate]
    trials: list[Trial]
    cured: QuantizedLinear | None = None

    @property
    def is_cured(self) -> bool:
        return bool(self.trials) and self.trials[-1].suffices


class Clinic:
    """Finds a cure for each of some layers.

    Args:
        model: the float model.
        floats: name → float layer; variants: as quantized by the recipe.
        inputs: what the float layers are fed with by the data.
        data, calibration: batches; the same list where data is what calibrates.
        damages: measures in the model.
        limit: the noise that a layer may add.
    """

    def __init__(
        self,
        model: nn.Module,
        floats: Mapping[str, nn.Linear],
        variants: Variants,
        inputs: Mapping[str, Inputs],
        data: list[Any],
        calibration: list[Any],
        damages: Damages,
        limit: float,
    ) -> None:
        self.model, self.floats, self.variants = model, floats, variants
        self.inputs, self.data, self.calibration = inputs, data, calibration
        self.damages, self.limit = damages, limit
        self._by_observer: dict[str, dict[str, QuantizedLinear]] = {}
        self._calibrated: Mapping[str, Inputs] = {}

    def treat(self, layers: list[LayerDiagnosis], progress: bool) -> list[Patient]:
        """A patient for each layer, with its trials, the last of which suffices."""
        observers = self._observers(layers, progress)
        patients = [
            Patient(
                x,
                observers[x.name],
                self._own_range(x) if observers[x.name] else math.nan,
                candidates(x, observers[x.name]),
                [],
            )
            for x in layers
        ]
        while sick := [p for p in patients if not p.is_cured]:
            self._round(sick, progress)
        return patients

    def _observers(
        self, layers: list[LayerDiagnosis], progress: bool
    ) -> dict[str, dict[str, float]]:
        """Layer → observer → the layer's SQNR with its range."""
        static = {
            x.name: x.recipe for x in layers if x.recipe.mode == "static" and activations_lose(x)
        }
        found: dict[str, dict[str, float]] = {x.name: {} for x in layers}
        if not static:
            return found
        chosen = ranges(self.model, self.variants.layers, static, self.calibration, progress)
        self.damages.meter.ran_over(self.calibration, len(self.calibration))
        for name, kinds in chosen.items():
            layer = self.variants.layers[name]
            made = {kind: with_range(layer, *qparams) for kind, qparams in kinds.items()}
            self._by_observer[name] = made
            found[name] = {kind: self._alone(name, quantized) for kind, quantized in made.items()}
        return found

    def _own_range(self, x: LayerDiagnosis) -> float:
        """The layer's SQNR with a range chosen on the inputs that were kept of the data."""
        observer = OBSERVERS[DEFAULT_OBSERVER]()
        layer = self.variants.layers[x.name]
        observer.observe(changed_input(layer, self.inputs[x.name].rows()))
        qparams = observer.qparams(x.recipe.activation)
        return self._alone(x.name, with_range(layer, *qparams))

    def _watch_calibration(self, sick: list[Patient], progress: bool) -> None:
        """See what calibration feeds the layers with, unless that is known."""
        if self._calibrated:
            return
        if self.calibration is self.data:
            self._calibrated = self.inputs
            return
        watch = Watch({p.layer.name: self.floats[p.layer.name] for p in sick})
        with switched(watch.forwards()):
            for batch in progress_bar(self.calibration, "watching calibration", progress):
                run(self.model, batch)
        self.damages.meter.ran_over(self.calibration, len(self.calibration))
        self._calibrated = watch.inputs

    def _alone(self, name: str, layer: QuantizedLinear) -> float:
        return alone_db(self.floats[name], layer, self.inputs[name])

    def _round(self, sick: list[Patient], progress: bool) -> None:
        """The next candidate of each."""
        tried = [(p, p.waiting.pop(0)) for p in sick]
        staged = [(p, c) for p, c in tried if c.recipe is not None and needs_data(c.recipe.method)]
        if staged:
            self._watch_calibration(sick, progress)
        made_here = {
            p.layer.name: from_inputs(
                self.floats[p.layer.name], c.recipe, self._calibrated[p.layer.name]
            )
            for p, c in staged
            if c.recipe is not None and self._calibrated[p.layer.name].seen
        }
        to_build = {
            p.layer.name: c.recipe
            for p, c in tried
            if c.recipe is not None and self._ready(p, c) is None and (p, c) not in staged
        }
        built = build(
            self.model, overridden(Recipe(None), to_build), self.calibration, progress=progress
        )
        self.damages.meter.ran_over(self.calibration, built.runs)
        runs: dict[str, Any] = {}
        made: dict[str, tuple[QuantizedLinear, float, str]] = {}
        for p, c in tried:
            name = p.layer.name
            if c.recipe is None:
                p.trials.append(_float(p.layer, c))
                continue
            layer = self._ready(p, c) or made_here.get(name) or built.layers.get(name)
            if layer is None:  # quantize leaves it: its weight is tied to a layer that stays float
                continue
            alone = self._alone(name, layer)
            key = f"cure {name!r} {json.dumps(c.recipe.to_dict(), sort_keys=True)}"
            made[name] = layer, alone, key
            if gain(p.layer.both_sqnr_db, alone) >= HOPELESS_DB:
                runs[key] = _alone_in_model(self.floats[name], layer)
        with tqdm(
            total=len(runs) * len(self.damages.sample.batches),
            desc="trying cures",
            unit="run",
            delay=2,
            disable=None if progress else True,
        ) as bar:
            found = self.damages.measure(runs, bar)
        for p, c in tried:
            if p.layer.name in made and c.recipe is not None:
                self._note(p, c, *made[p.layer.name], found)

    def _note(
        self,
        p: Patient,
        c: Candidate,
        layer: QuantizedLinear,
        alone: float,
        key: str,
        found: Mapping[str, Damage],
    ) -> None:
        damage = found.get(key)
        suffices = damage is not None and damage.noise <= self.limit
        p.trials.append(Trial(c.text, c.recipe, alone, damage, layer_bytes(layer), suffices))
        if suffices:
            p.cured = layer

    def _ready(self, p: Patient, c: Candidate) -> QuantizedLinear | None:
        """The layer, where the candidate is nothing but another observer."""
        made = self._by_observer.get(p.layer.name, {})
        if c.recipe is None or replace(c.recipe, observer=p.layer.recipe.observer) != (
            p.layer.recipe
        ):
            return None
        return made.get(c.recipe.observer)


def cause(p: Patient) -> Cause:
    """What a treated patient has, and what mends it."""
    last = p.trials[-1]
    kind = kind_of(p.layer, p.observers, p.own_range)
    by_range = last.recipe is not None and last.recipe.mode != "weight-only"
    if kind == "bad-range" and p.layer.outlier_count and not by_range:
        kind = "outlier-channels"  # no range did: it is the channels that make every range bad
    before, after = p.layer.only_this, last.damage
    assert after is not None
    text = f"{last.text}: alone {decibels(p.layer.both_sqnr_db)} → {decibels(last.sqnr_db)} dB"
    text += f", output error {error(before)} → {error(after)}"
    why = evidence(p.layer, kind, p.observers, p.own_range)
    return Cause(p.layer.name, kind, why, last.recipe, text, before, after, tuple(p.trials))


def _float(layer: LayerDiagnosis, c: Candidate) -> Trial:
    whole = Damage(0.0, 1.0, elements=layer.only_this.elements)
    return Trial(c.text, None, float("inf"), whole, layer.float_bytes, True)


def _alone_in_model(linear: nn.Linear, layer: QuantizedLinear) -> Any:
    return lambda: {linear: computed(layer)}
