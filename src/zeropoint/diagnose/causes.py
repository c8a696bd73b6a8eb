"""Which layers stand out, and why: the rules, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .numbers import Damage, Kind, LayerDiagnosis
from .words import decibels

STANDS_OUT = 10.0
"""A layer stands out from so many times the mean noise of the ordinary layers on, 10 dB. In a
healthy transformer the worst layers are 5 to 8 times the mean: value projections, and what follows
a GELU."""
NEGLIGIBLE = 1e-4
"""Noise of the whole model's output below which nothing needs mending: an error of 1 %, 40 dB. A
layer that adds less than its share of that is never to blame."""
GOOD = 1e-2
"""Noise of the whole model's output that a model should keep below: an error of 10 %, 20 dB."""
OBSERVER_GAIN_DB = 3.0
"""How much better another observer must do to call the range a bad one."""


def culprits(noises: Mapping[str, float], whole: Damage) -> tuple[list[str], float]:
    """The layers that lose more than they may, worst first, and what each of them may.

    From the quieter half upwards, a layer is ordinary as long as its noise is at most
    :data:`STANDS_OUT` times the mean of those before it; the others stand out. Where the ordinary
    ones together are too much, above :data:`GOOD`, the worst of them are culprits too, as few as
    bring the rest to half of that.

    Args:
        noises: name → :attr:`Damage.noise` of each layer that is quantized alone.
        whole: all layers quantized. Where it is negligible, there are no culprits.

    >>> culprits({"a": 1e-4, "b": 3e-4, "c": 0.5}, Damage(0.7, 0.8))
    (['c'], 0.002)
    """
    total = math.inf if math.isnan(whole.noise) else whole.noise
    order = sorted((name for name, x in noises.items() if x > 0), key=lambda name: noises[name])
    if total < NEGLIGIBLE or not order:
        return [], math.inf
    quiet = max(1, len(order) // 2)
    share = NEGLIGIBLE / len(order)
    while quiet < len(order) and noises[order[quiet]] <= max(_fence(noises, order[:quiet]), share):
        quiet += 1
    limit = max(_fence(noises, order[:quiet]), share)
    if sum(noises[name] for name in order[:quiet]) > GOOD:
        while quiet and sum(noises[name] for name in order[:quiet]) > GOOD / 2:
            quiet -= 1
        limit = min(limit, GOOD / 2 / (len(order) - quiet))
    return order[quiet:][::-1], limit


def _fence(noises: Mapping[str, float], ordinary: list[str]) -> float:
    return STANDS_OUT * sum(noises[name] for name in ordinary) / len(ordinary)


def activations_lose(layer: LayerDiagnosis) -> bool:
    """Whether more is lost by the layer's activations than by its weights."""
    return layer.activations_only_sqnr_db < layer.weights_only_sqnr_db


def kind_of(layer: LayerDiagnosis, observers: Mapping[str, float], own_range: float) -> Kind:
    """Why a culprit loses.

    Args:
        layer: its numbers.
        observers: name of each observer → the layer's SQNR with its range; empty where the layer is
            not static or its activations are not to blame.
        own_range: the layer's SQNR with a range chosen on the data itself instead of the
            calibration data; NaN where there are no observers.
    """
    if not activations_lose(layer):
        return "sensitive"
    if observers and max(*observers.values(), own_range) >= (layer.both_sqnr_db + OBSERVER_GAIN_DB):
        return "bad-range"
    return "outlier-channels" if layer.outlier_count else "coarse-activations"


def evidence(
    layer: LayerDiagnosis, kind: Kind, observers: Mapping[str, float], own_range: float
) -> str:
    """The numbers that say so, in a sentence."""
    apart = (
        f"weights alone {_db(layer.weights_only_sqnr_db)}, activations alone "
        f"{_db(layer.activations_only_sqnr_db)}"
    )
    if kind == "sensitive":
        return f"{apart}: its weights need finer steps"
    if kind == "bad-range":
        best = max(observers, key=lambda name: observers[name])
        ranges = f"range by {layer.recipe.observer} {_db(layer.both_sqnr_db)}"
        if best != layer.recipe.observer:
            ranges += f", by {best} {_db(observers[best])}"
        clipped = layer.activation_error.clipping if layer.activation_error else 0.0
        blame = "clipping" if clipped > 0.5 else "rounding: the range is too wide"
        return (
            f"{apart}; {ranges}, one chosen on this data {_db(own_range)}; "
            f"{max(clipped, 1 - clipped):.0%} of the activations' error is {blame}"
        )
    if kind == "outlier-channels":
        first = layer.outliers[0]
        others = layer.outlier_count - 1
        more = f" and {others} more" if others else ""
        return (
            f"{apart}; input channel {first.index}{more} "
            f"reach{'' if others else 'es'} up to {first.ratio:.0f} × the median channel"
        )
    return f"{apart}: its activations need finer steps, and no channel stands out"


def _db(value: float) -> str:
    return f"{decibels(value)} dB" if math.isfinite(value) else decibels(value)
