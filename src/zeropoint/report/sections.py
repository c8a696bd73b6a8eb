"""What the page says of each layer, of causes and cures, and of the front: plain data for it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from . import pictures, plots, table, words
from .numbers import LayerReport, Report

if TYPE_CHECKING:
    from ..diagnose.numbers import Cause, Damage, Diagnosis, ErrorSplit, LayerDiagnosis
    from ..search.numbers import Front, Point

OPEN = 1
"""How many of the worst layers' sections are open when the page is."""


def layers(r: Report) -> list[dict[str, Any]]:
    """A section for each layer, in model order."""
    worst = words.marked(r)
    known = {} if r.diagnosis is None else {x.name: x for x in r.diagnosis.layers}
    causes = {} if r.diagnosis is None else {c.layer: c for c in r.diagnosis.causes}
    opened = [x.name for x in r.worst(OPEN)]
    if r.diagnosis is not None and r.diagnosis.causes:
        opened = [c.layer for c in r.diagnosis.causes[:OPEN]]
    return [
        {
            "number": n,
            "label": x.label,
            "worst": x.name in worst,
            "open": x.name in opened,
            "cause": _cause(causes[x.name]) if x.name in causes else None,
            "fact": f"alone {words.decibels(x.alone)}",
            "facts": _facts(x, known.get(x.name)),
            **_pictures(x),
        }
        for n, x in enumerate(r.layers, 1)
    ]


def _facts(x: LayerReport, d: LayerDiagnosis | None) -> list[tuple[str, str]]:
    facts = [
        ("Given", x.recipe or x.mode),
        ("Inputs → outputs", f"{x.in_features:,} → {x.out_features:,}"),
        (
            "SQNR",
            f"weights {words.decibels(x.weight)}, output alone {words.decibels(x.alone)}, "
            f"output running {words.decibels(x.accumulated)}",
        ),
        ("Bytes", f"{table.layer_bytes(x)} ({words.shrinkage(x.bytes_before, x.bytes_after)})"),
    ]
    if x.seconds_before is not None and x.seconds_after is not None:
        facts.append(("Time", f"{table.layer_time(x)} ({table.layer_speedup(x)})"))
    if d is None or not d.calls:
        return facts
    facts += [
        (
            "What loses",
            f"with quantized weights only {_db(d.weights_only_sqnr_db)}, "
            f"with quantized activations only {_db(d.activations_only_sqnr_db)}",
        ),
        (
            "The model’s output",
            f"{damage(d.only_this)} off with this layer alone quantized "
            f"({100 * d.noise_share:.2g} % of all noise), {damage(d.all_but_this)} with all others",
        ),
        ("Weight error", _split(d.weight_error)),
    ]
    if d.activation_error is not None:
        facts.append(("Activation error", _split(d.activation_error)))
    if d.outliers:
        shown = ", ".join(f"{o.index} ({o.ratio:.0f}×)" for o in d.outliers)
        more = ", …" if d.outlier_count > len(d.outliers) else ""
        facts.append(("Outlier channels", f"{d.outlier_count}, times the median: {shown}{more}"))
    return facts


def _pictures(x: LayerReport) -> dict[str, Any]:
    def at(h: Any) -> int | None:
        zeros = {g.zero_point for g in h.grids} if h is not None else set()
        return zeros.pop() if len(zeros) == 1 else None

    note = ""
    if x.mode == "dynamic":
        note = "Each row has a scale and zero point of its own."
    elif x.mode == "weight-only":
        note = "They stay float."
    return {
        "weights": x.histogram and pictures.reals(x.histogram, "weights"),
        "weight_integers": x.integers and pictures.integers(x.integers, at(x.histogram)),
        "inputs": x.inputs and pictures.reals(x.inputs, "activations"),
        "input_integers": x.input_integers and pictures.integers(x.input_integers, at(x.inputs)),
        "input_note": note,
    }


def _cause(c: Cause) -> dict[str, str]:
    return {
        "kind": c.kind.replace("-", " "),
        "evidence": _sentence(c.evidence),
        "cure": c.cure_text,
        "repair": f"With only this layer quantized, the model’s output is {damage(c.before)} off "
        f"before and {damage(c.after)} after.",
    }


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def damage(x: Damage) -> str:
    """A relative error in percent."""
    value = 100 * x.relative_error
    if not math.isfinite(value):
        return "–"
    return f"{value:.2g} %" if value < 10 else f"{value:.0f} %"


def _db(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _split(x: ErrorSplit) -> str:
    if not x.clipping and not x.rounding:
        return "none"
    return f"{100 * x.rounding:.3g} % rounding, {100 * x.clipping:.3g} % clipping"


def causes(r: Report) -> dict[str, Any] | None:
    """Which layers lose what, why, and what mends it."""
    d = r.diagnosis
    if d is None:
        return None
    place = {x.name: n for n, x in enumerate(r.layers, 1)}
    heads = ("Layer", "Cause", "Evidence", "What mends it", "Output off before", "after")
    rows = [
        {
            "link": f"layer-{place[c.layer]}" if c.layer in place else "",
            "cells": (
                c.label, c.kind.replace("-", " "), _sentence(c.evidence), _sentence(c.cure_text),
                damage(c.before), damage(c.after),
            ),
        }
        for c in d.causes
    ]  # fmt: skip
    return {
        "verdict": d.verdict,
        "rows": rows,
        "heads": [(h, "text" if i < 4 else "") for i, h in enumerate(heads)],
        "caption": "Worst first. Off: the relative error of the model’s output where only this "
        "layer is quantized, by the recipe and with the cure.",
        "recipe": json.dumps(d.suggestions.to_dict(), indent=1) if d.causes else "",
        "note": _diagnosis_note(d),
    }


def _diagnosis_note(d: Diagnosis) -> str:
    text = (
        f"Measured on {d.samples:,} of {d.rows:,} samples, in {words.seconds(d.seconds)}: "
        f"as much as {d.evaluations:.3g} runs of the model over the data."
    )
    return " ".join([text, *d.notes])


def _badge(f: Front, p: Point) -> str:
    names = (("chosen", f.chosen), ("certain", f.certain))
    return ", ".join(name for name, point in names if point is p)


def front(f: Front | None) -> dict[str, Any] | None:
    """The Pareto front as a plot and a table."""
    if f is None:
        return None
    timed = any(p.seconds is not None or p.measured_seconds is not None for p in f.points)
    heads = ["Layers", "Size", *(["Time of a call"] if timed else []), f"{f.metric} lost"]
    heads += [f"interval at {f.level:.0%}", "expected"]
    points = [(p, _badge(f, p)) for p in f.points]
    points += [(p, "") for p in f.uniform]
    rows = []
    for p, badge in points:
        cells = [plots.choices(p), words.size(p.bytes)]
        if timed:
            cells.append(words.seconds(p.measured_seconds or p.seconds))
        measured = p.measured
        cells += [words.number(measured.value), words.interval(measured)]
        cells.append(words.number(p.estimated_drop))
        rows.append({"cells": cells, "badge": badge, "marked": bool(badge), "link": ""})
    certain = ""
    if f.certain is not None:
        certain = (
            " Certain: the boldest point whose interval, and those of all more careful points, "
            "end below the drop that is allowed."
        )
    held = ", ".join(f"{n:,} for {part}" for part, n in f.samples.items())
    return {
        "cost": "size" if f.cost == "bytes" else "time",
        "metric": f.metric,
        "verdict": f.verdict,
        "svg": plots.front(f),
        "caption": plots.front_in_words(f),
        "heads": [(h, "text" if not i else "") for i, h in enumerate(heads)],
        "rows": rows,
        "table_caption": f"First the front, cheapest first, then one choice for all layers. Lost: "
        f"float − quantized, on held-out data; expected: by the search.{certain} Samples: {held}.",
    }
