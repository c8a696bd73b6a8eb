"""A diagnosis as JSON types, and back. ``schema.json`` describes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.resources import files
from typing import Any, get_args

from ..recipes import LayerRecipe, Recipe
from ..statistics import Comparison
from .numbers import (
    SCHEMA_VERSION,
    Cause,
    Damage,
    Diagnosis,
    ErrorSplit,
    Kind,
    LayerDiagnosis,
    MetricChange,
    OutlierChannel,
    Saturation,
    Trial,
)


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of :meth:`Diagnosis.to_dict`."""
    return json.loads((files(__package__) / "schema.json").read_text("utf-8"))


def to_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """See :meth:`Diagnosis.to_dict`."""
    head = {"schema_version": SCHEMA_VERSION, "verdict": diagnosis.verdict}
    return {**head, **_plain(diagnosis), "cost": _plain(diagnosis.cost)}


def from_dict(data: Mapping[str, Any]) -> Diagnosis:
    """See :meth:`Diagnosis.from_dict`."""
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {version!r}")
    try:
        return _diagnosis(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a diagnosis: {type(error).__name__}: {error}") from error


def _plain(x: Any) -> Any:
    if isinstance(x, LayerRecipe | Recipe | Comparison):
        return x.to_dict()
    if is_dataclass(x) and not isinstance(x, type):
        content = {f.name: _plain(getattr(x, f.name)) for f in fields(x)}
        return content | ({"sqnr_db": _plain(x.sqnr_db)} if isinstance(x, Damage) else {})
    if isinstance(x, Mapping):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def _make(cls: Any, data: Mapping[str, Any], **given: Any) -> Any:
    return cls(**{f.name: given.get(f.name, data.get(f.name)) for f in fields(cls)})


def _nan(x: float | None) -> float:
    return math.nan if x is None else x


def _damage(data: Mapping[str, Any] | None) -> Damage | None:
    if data is None:
        return None
    numbers = {k: _nan(data[k]) for k in ("relative_error", "cosine")}
    return _make(Damage, data, **numbers)


def _recipe(data: Mapping[str, Any] | None) -> LayerRecipe | None:
    return None if data is None else LayerRecipe.from_dict(data)


def _layer(data: Mapping[str, Any]) -> LayerDiagnosis:
    missing = math.inf if data["calls"] else math.nan
    given = {k: missing if data[k] is None else data[k] for k in data if k.endswith("_sqnr_db")}
    if data["weight_sqnr_db"] is None:
        given["weight_sqnr_db"] = math.inf
    activation = data["activation_error"]
    return _make(
        LayerDiagnosis,
        data,
        **given,
        recipe=_recipe(data["recipe"]),
        only_this=_damage(data["only_this"]),
        all_but_this=_damage(data["all_but_this"]),
        noise_share=_nan(data["noise_share"]),
        outliers=tuple(_make(OutlierChannel, x) for x in data["outliers"]),
        weight_error=_make(ErrorSplit, data["weight_error"]),
        activation_error=None if activation is None else _make(ErrorSplit, activation),
        saturation=_make(Saturation, data["saturation"]),
    )


def _trial(data: Mapping[str, Any]) -> Trial:
    sqnr = math.inf if data["sqnr_db"] is None else data["sqnr_db"]
    return _make(
        Trial,
        data,
        recipe=_recipe(data["recipe"]),
        damage=_damage(data["damage"]),
        sqnr_db=sqnr,
    )


def _cause(data: Mapping[str, Any]) -> Cause:
    if data["kind"] not in get_args(Kind):
        raise TypeError(f"kind must be one of {', '.join(get_args(Kind))}, got {data['kind']!r}")
    return Cause(
        data["layer"],
        data["kind"],
        data["evidence"],
        _recipe(data["cure"]),
        data["cure_text"],
        _damage(data["before"]),  # type: ignore[arg-type]
        _damage(data["after"]),  # type: ignore[arg-type]
        tuple(_trial(x) for x in data["trials"]),
    )


def _metric(data: Mapping[str, Any] | None) -> MetricChange | None:
    if data is None:
        return None
    comparisons = {k: Comparison.from_dict(data[k]) for k in ("loss", "repair")}
    numbers = {k: _nan(data[k]) for k in ("float_model", "quantized")}
    return _make(MetricChange, data, **numbers, **comparisons)


def _diagnosis(data: Mapping[str, Any]) -> Diagnosis:
    return _make(
        Diagnosis,
        data,
        recipe=Recipe.from_dict(data["recipe"]),
        damage_before=_damage(data["damage_before"]),
        damage_after=_damage(data["damage_after"]),
        metric=_metric(data["metric"]),
        layers=tuple(_layer(x) for x in data["layers"]),
        left=dict(data["left"]),
        causes=tuple(_cause(x) for x in data["causes"]),
        suggestions=Recipe.from_dict(data["suggestions"]),
        evaluation_seconds=_nan(data["evaluation_seconds"]),
        notes=tuple(data["notes"]),
    )
