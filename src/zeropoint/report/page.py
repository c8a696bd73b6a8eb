"""A report as one HTML page that needs nothing but itself, by jinja2."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any

from . import table, words
from .as_json import SCHEMA_VERSION
from .numbers import LayerReport, Report


def render(r: Report, title: str | None = None) -> str:
    """The page's text.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2

        from . import plots, sections
    except ImportError as error:
        raise ImportError(
            f"the HTML report needs jinja2 and matplotlib ({error}): pip install zeropoint[report]"
        ) from error
    templates = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _template(name)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    worst = words.marked(r)
    content: dict[str, Any] = {
        "causes": sections.causes(r),
        "front": sections.front(r.front),
        "layers": [_row(n, x, x.name in worst) for n, x in _numbered(r)],
        "details": sections.layers(r),
        "left": [{"cells": (n or "(model)", why or "–"), "link": ""} for n, why in r.left.items()],
        "environment": _environment(r),
    }
    return templates.get_template("page.html.jinja").render(
        r=r,
        title=title or f"Quantization report: {r.model}",
        tiles=_tiles(r),
        contents=[(k, text) for k, text in _CONTENTS.items() if content.get(_OF.get(k, k), True)],
        whole=table.whole_rows(r),
        interval_note=table.interval_note(r),
        latency_note=table.latency_note(r) if r.latency else "",
        errors=plots.layer_errors(r) if r.layers else "",
        errors_in_words=plots.errors_in_words(r) if r.layers else "",
        modes=sorted({x.mode for x in r.layers}),
        batches=words.count(r.batches, "batch", "batches"),
        schema_version=SCHEMA_VERSION,
        data=r.to_dict(),
        **content,
    )


_CONTENTS = {
    "whole": "The whole model",
    "causes": "Causes and cures",
    "front": "What is possible",
    "errors": "Error by layer",
    "layers": "Table of layers",
    "each": "Each layer",
    "left": "Left in float",
    "environment": "Where it was measured",
}
"""Headings that the list of contents leads to: id → text."""
_OF = {"errors": "layers", "each": "details"}  # heading → what must be there for it


def _template(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text("utf-8")


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
