"""A report as JSON, and back. ``schema.json`` describes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..plain import made, number, plain_fields, read, schema_of
from ..plain import to_text as plain_text
from ..statistics import Comparison, Estimate
from .numbers import (
    Difference,
    Environment,
    Grid,
    Histogram,
    Integers,
    Latency,
    LayerReport,
    Metric,
    Outputs,
    Report,
    Timing,
)

SCHEMA_VERSION = 1
"""Version of the JSON: raised when a field changes its meaning or goes, not when one is added."""


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of :meth:`Report.to_dict`."""
    return schema_of(__package__)


_NUMBERS = re.compile(r"\[\n[-+.eE\d\s,]+\]")
"""A list of numbers: one line instead of hundreds. No string of JSON holds a line break."""

_DERIVED = {
    Difference: ("sqnr_db", "exact"),
    Latency: ("speedup", "distinguishable"),
}


def _histogram(data: Mapping[str, Any] | None) -> Histogram | None:
    if data is None:
        return None
    grids = tuple(made(Grid, g) for g in data["grids"])
    return Histogram(tuple(data["edges"]), tuple(data["counts"]), grids)


def _integers(data: Mapping[str, Any] | None) -> Integers | None:
    return None if data is None else Integers(data["qmin"], tuple(data["counts"]))


def _layer(data: Mapping[str, Any]) -> LayerReport:
    found: dict[str, Any] = {
        k: made(Difference, data[k]) for k in ("weight", "alone", "accumulated")
    }
    found |= {k: _histogram(data.get(k)) for k in ("histogram", "inputs")}
    found |= {k: _integers(data.get(k)) for k in ("integers", "input_integers")}
    return made(LayerReport, {"recipe": "", **data, **found})


def _beside(data: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if data.get("diagnosis") is not None:
        from ..diagnose.numbers import Diagnosis

        found["diagnosis"] = Diagnosis.from_dict(data["diagnosis"])
    if data.get("front") is not None:
        from ..search.numbers import Front

        found["front"] = Front.from_dict(data["front"])
    return found


def to_dict(r: Report) -> dict[str, Any]:
    """See :meth:`Report.to_dict`."""
    beside = {
        k: None if x is None else x.to_dict()
        for k, x in (("diagnosis", r.diagnosis), ("front", r.front))
    }
    own = plain_fields(r, _DERIVED, leave=("diagnosis", "front"))
    return {"schema_version": SCHEMA_VERSION, "verdict": r.verdict, **own, **beside}


def from_dict(data: Mapping[str, Any]) -> Report:
    """See :meth:`Report.from_dict`."""
    return read("report", SCHEMA_VERSION, data, _report)


def to_text(r: Report) -> str:
    """See :meth:`Report.to_json`; lists of numbers stand in one line each."""
    return _NUMBERS.sub(lambda found: " ".join(found[0].split()), plain_text(to_dict(r)))


def _report(data: Mapping[str, Any]) -> Report:
    outputs, metric, environment = data["outputs"], data["metric"], data["environment"]
    return Report(
        model=data["model"],
        batches=data["batches"],
        outputs=Outputs(
            made(Difference, outputs["difference"]),
            number(outputs["cosine_mean"]),
            number(outputs["cosine_min"]),
            outputs["vectors"],
            Estimate.from_dict(outputs.get("cosine")),
        ),
        metric=metric
        and Metric(
            metric["name"],
            number(metric["before"]),
            number(metric["after"]),
            Comparison.from_dict(metric.get("comparison")),
        ),
        bytes_before=data["bytes_before"],
        bytes_after=data["bytes_after"],
        latency=tuple(
            made(
                Latency,
                {**x, "before": made(Timing, x["before"]), "after": made(Timing, x["after"])},
            )
            for x in data["latency"]
        ),
        layers=tuple(_layer(x) for x in data["layers"]),
        left=dict(data["left"]),
        environment=environment
        and made(
            Environment, {**environment, "available_isas": tuple(environment["available_isas"])}
        ),
        **_beside(data),
    )
