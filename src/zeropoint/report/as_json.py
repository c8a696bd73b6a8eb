"""A report as JSON, and back. ``schema.json`` describes it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from importlib.resources import files
from typing import Any

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
    return json.loads((files(__package__) / "schema.json").read_text("utf-8"))


_NUMBERS = re.compile(r"\[\n[-+.eE\d\s,]+\]")
"""A list of numbers: one line instead of hundreds. No string of JSON holds a line break."""

_DERIVED = {
    Difference: ("sqnr_db", "exact"),
    Latency: ("speedup", "distinguishable"),
}


def _plain(x: Any) -> Any:
    if isinstance(x, Estimate | Comparison):
        return x.to_dict()
    if is_dataclass(x):
        names = (*(f.name for f in fields(x)), *_DERIVED.get(type(x), ()))
        return {name: _plain(getattr(x, name)) for name in names}
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def _make(cls: Any, data: Mapping[str, Any]) -> Any:
    return cls(**{f.name: data[f.name] for f in fields(cls)})


def _number(x: float | None) -> float:
    return math.nan if x is None else x


def _histogram(data: Mapping[str, Any] | None) -> Histogram | None:
    if data is None:
        return None
    grids = tuple(_make(Grid, g) for g in data["grids"])
    return Histogram(tuple(data["edges"]), tuple(data["counts"]), grids)


def _integers(data: Mapping[str, Any] | None) -> Integers | None:
    return None if data is None else Integers(data["qmin"], tuple(data["counts"]))


def _layer(data: Mapping[str, Any]) -> LayerReport:
    found: dict[str, Any] = {
        k: _make(Difference, data[k]) for k in ("weight", "alone", "accumulated")
    }
    found |= {k: _histogram(data.get(k)) for k in ("histogram", "inputs")}
    found |= {k: _integers(data.get(k)) for k in ("integers", "input_integers")}
    return _make(LayerReport, {"recipe": "", **data, **found})


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
    own = _plain(replace(r, diagnosis=None, front=None))
    return {"schema_version": SCHEMA_VERSION, "verdict": r.verdict, **own, **beside}


def from_dict(data: Mapping[str, Any]) -> Report:
    """See :meth:`Report.from_dict`."""
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {version!r}")
    try:
        return _report(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a report: {type(error).__name__}: {error}") from error


def to_text(r: Report) -> str:
    """See :meth:`Report.to_json`; lists of numbers stand in one line each."""
    text = json.dumps(to_dict(r), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return _NUMBERS.sub(lambda found: " ".join(found[0].split()), text)


def _report(data: Mapping[str, Any]) -> Report:
    outputs, metric, environment = data["outputs"], data["metric"], data["environment"]
    return Report(
        model=data["model"],
        batches=data["batches"],
        outputs=Outputs(
            _make(Difference, outputs["difference"]),
            _number(outputs["cosine_mean"]),
            _number(outputs["cosine_min"]),
            outputs["vectors"],
            Estimate.from_dict(outputs.get("cosine")),
        ),
        metric=metric
        and Metric(
            metric["name"],
            _number(metric["before"]),
            _number(metric["after"]),
            Comparison.from_dict(metric.get("comparison")),
        ),
        bytes_before=data["bytes_before"],
        bytes_after=data["bytes_after"],
        latency=tuple(
            _make(
                Latency,
                {**x, "before": _make(Timing, x["before"]), "after": _make(Timing, x["after"])},
            )
            for x in data["latency"]
        ),
        layers=tuple(_layer(x) for x in data["layers"]),
        left=dict(data["left"]),
        environment=environment
        and _make(
            Environment, {**environment, "available_isas": tuple(environment["available_isas"])}
        ),
        **_beside(data),
    )
