"""A report as one HTML page that needs nothing but itself, by jinja2."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any

from . import table, words
from .numbers import SCHEMA_VERSION, LayerReport, Report


def render(r: Report, title: str | None = None) -> str:
    """The page's text.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2

        from . import plots
    except ImportError as error:
        raise ImportError(
            f"the HTML report needs jinja2 and matplotlib ({error}): pip install zeropoint[report]"
        ) from error
    source = (files(__package__) / "page.html.jinja").read_text("utf-8")
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(source)
    worst = r.worst(3)
    pictures: list[dict[str, Any]] = [
        {
            "number": n,
            "layer": x,
            "svg": plots.weights(x, n),
            "words": plots.weights_in_words(x),
            "alone": words.decibels(x.alone),
            "weight": words.decibels(x.weight),
        }
        for n, x in _numbered(r)
        if x.histogram is not None
    ]
    pictures.sort(key=lambda p: p["layer"].alone.sqnr_db)
    return template.render(
        r=r,
        title=title or f"Quantization report: {r.model}",
        tiles=_tiles(r),
        whole=table.whole_rows(r),
        latency_note=table.latency_note(r) if r.latency else "",
        errors=plots.layer_errors(r) if r.layers else "",
        errors_in_words=plots.errors_in_words(r) if r.layers else "",
        modes=sorted({x.mode for x in r.layers}),
        layers=[_row(n, x, x in worst) for n, x in _numbered(r)],
        pictures=pictures,
        environment=_environment(r),
        batches=words.count(r.batches, "batch", "batches"),
        schema_version=SCHEMA_VERSION,
        data=r.to_dict(),
    )


def _numbered(r: Report) -> list[tuple[int, LayerReport]]:
    return list(enumerate(r.layers, 1))


def _tiles(r: Report) -> list[tuple[str, str, str]]:
    """The few numbers that stand large on top: ``(name, number, from → to)``."""
    tiles = [
        (
            "Size",
            words.shrinkage(r.bytes_before, r.bytes_after),
            f"{words.size(r.bytes_before)} → {words.size(r.bytes_after)}",
        )
    ]
    for x in r.latency[:2]:
        times = f"{words.seconds(x.before.median)} → {words.seconds(x.after.median)}"
        tiles.append((f"Latency, {x.name}", words.pace(x), times))
    d = r.outputs.difference
    if d.exact:
        tiles.append(("Outputs", "exact", "every value is the same"))
    else:
        worst = f"worst {words.cosine(r.outputs.cosine_min)}, SQNR {words.decibels(d)}"
        tiles.append(("Mean cosine of outputs", words.cosine(r.outputs.cosine_mean), worst))
    if r.metric is not None:
        m = r.metric
        tiles.append((m.name, words.number(m.after), f"before {words.number(m.before)}"))
    return tiles


def _row(number: int, x: LayerReport, worst: bool) -> dict[str, Any]:
    """A line of the table of layers; each cell is ``(text, number to sort by)``."""
    speedup = math.nan
    if x.seconds_before is not None and x.seconds_after:
        speedup = x.seconds_before / x.seconds_after
    return {
        "number": number,
        "label": x.label,
        "worst": worst,
        "mode": x.mode,
        "shape": (f"{x.in_features} → {x.out_features}", x.in_features * x.out_features),
        "cells": [
            *(
                (words.decibels(d).removesuffix(" dB"), _sortable(d.sqnr_db))
                for d in (x.weight, x.alone, x.accumulated)
            ),
            (
                f"{x.alone.max_abs_error:.3g}" if x.alone.elements else "–",
                _sortable(x.alone.max_abs_error),
            ),
            (table.layer_bytes(x), x.bytes_after),
            (table.layer_time(x), _sortable(x.seconds_after)),
            (words.factor(speedup), _sortable(speedup)),
        ],
    }


def _sortable(value: float | None) -> float:
    """A number that JavaScript reads; what is missing comes last, ascending."""
    if value is None or math.isnan(value):
        return 1e300
    return max(-1e299, min(1e299, value))


def _environment(r: Report) -> list[tuple[str, str]]:
    e = r.environment
    if e is None:
        return []
    return [
        ("CPU", e.cpu),
        ("Instruction set in use", f"{e.isa} (available: {', '.join(e.available_isas)})"),
        ("Threads", f"{e.threads} of {e.logical_cpus} logical CPUs"),
        ("Platform", e.platform),
        ("Versions", f"zeropoint {e.zeropoint}, torch {e.torch}, Python {e.python}"),
        ("Measured", e.date),
    ]
