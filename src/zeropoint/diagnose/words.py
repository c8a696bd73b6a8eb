"""A diagnosis in words: the verdict, and numbers as people read them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .numbers import Damage, Diagnosis, LayerDiagnosis


def decibels(value: float) -> str:
    """``31.4``, ``exact`` or ``–``."""
    if math.isnan(value):
        return "–"
    return "exact" if value == math.inf else f"{value:.1f}".replace("-", "−")


def error(x: Damage) -> str:
    """A relative error in percent: ``1.2 %``; ``–`` where nothing was compared."""
    value = 100 * x.relative_error
    if not math.isfinite(value):
        return "–"
    return "0" if value == 0 else f"{value:.2g} %" if value < 10 else f"{value:.0f} %"


def cosine(value: float) -> str:
    """Never rounded up to 1."""
    if math.isnan(value):
        return "–"
    for digits in (4, 6, 8):
        text = f"{value:.{digits}f}".replace("-", "−")
        if value == 1 or not text.startswith("1"):
            return text
    return "> 0.99999999"


def share(value: float) -> str:
    """``37 %``; ``–`` where there is none."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1f} %"


def number(value: float) -> str:
    """Four significant digits."""
    return "not a number" if math.isnan(value) else f"{value:.4g}".replace("-", "−")


def verdict(d: Diagnosis) -> str:
    """Who loses what, why, and what mends it."""
    before = d.damage_before
    if math.isnan(before.relative_error):
        text = "The quantized model's output could not be compared with the float model's."
    elif before.relative_error == 0:
        return "Quantized, the model returns exactly the same outputs."
    else:
        text = (
            f"Quantized, the model's output is {error(before)} off "
            f"({decibels(before.sqnr_db)} dB, cosine {cosine(before.cosine)})"
        )
        if d.metric is not None:
            text += f"; {_metric(d)}"
        text += "."
    if not d.causes:
        text += " No layer stands out."
        worst = d.worst(1)
        if worst and worst[0].noise_share > 0:
            text += f" {worst[0].label} adds most, {share(worst[0].noise_share)} of the noise."
        return text
    by_name = {x.name: x for x in d.layers}
    named = [f"{c.label} ({_why(by_name[c.layer], c.kind)})" for c in d.causes[:3]]
    rest = len(d.causes) - len(named)
    together = sum(by_name[c.layer].noise_share for c in d.causes)
    text += f" {_list(named + ([f'{rest} more'] if rest else []))} "
    text += f"{'causes' if len(d.causes) == 1 else 'cause'} {share(together)} of the noise."
    if d.damage_after is not None:
        after = d.damage_after
        text += (
            f" With the suggestions it is {error(after)} off ({decibels(after.sqnr_db)} dB)"
            + (
                f", and the {d.metric.name} {number(d.metric.repaired)}"
                if d.metric is not None and d.metric.repaired is not None
                else ""
            )
            + "."
        )
    return text


def _metric(d: Diagnosis) -> str:
    assert d.metric is not None
    before, after = number(d.metric.float_model), number(d.metric.quantized)
    if before == after:
        return f"its {d.metric.name} stays at {after}"
    return f"its {d.metric.name} goes from {before} to {after}"


def _why(layer: LayerDiagnosis, kind: str) -> str:
    if kind == "outlier-channels":
        return f"outlier channels, up to {layer.outliers[0].ratio:.0f} × the median"
    return {
        "bad-range": "a bad activation range",
        "coarse-activations": "activations too coarse",
        "sensitive": "weights too coarse",
    }[kind]


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def order(value: float) -> float:
    """For sorting: what could not be compared is last."""
    return -1.0 if math.isnan(value) else value
