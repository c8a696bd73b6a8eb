"""A diagnosis as JSON types, and back. ``schema.json`` describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from ..plain import made, number, plain_fields, read, schema_of
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

_DERIVED = {Damage: ("sqnr_db",), Diagnosis: ("cost",)}


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of :meth:`Diagnosis.to_dict`."""
    return schema_of(__package__)


def to_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """See :meth:`Diagnosis.to_dict`."""
    head = {"schema_version": SCHEMA_VERSION, "verdict": diagnosis.verdict}
    return {**head, **plain_fields(diagnosis, _DERIVED)}


def from_dict(data: Mapping[str, Any]) -> Diagnosis:
    """See :meth:`Diagnosis.from_dict`."""
    return read("diagnosis", SCHEMA_VERSION, data, _diagnosis)


def _damage(data: Mapping[str, Any] | None) -> Damage | None:
    if data is None:
        return None
    numbers = {k: number(data[k]) for k in ("relative_error", "cosine")}
    return made(Damage, data, **numbers)


def _recipe(data: Mapping[str, Any] | None) -> LayerRecipe | None:
    return None if data is None else LayerRecipe.from_dict(data)


def _layer(data: Mapping[str, Any]) -> LayerDiagnosis:
    missing = math.inf if data["calls"] else math.nan
    given = {k: missing if data[k] is None else data[k] for k in data if k.endswith("_sqnr_db")}
    if data["weight_sqnr_db"] is None:
        given["weight_sqnr_db"] = math.inf
    activation = data["activation_error"]
    return made(
        LayerDiagnosis,
        data,
        **given,
        recipe=_recipe(data["recipe"]),
        only_this=_damage(data["only_this"]),
        all_but_this=_damage(data["all_but_this"]),
        noise_share=number(data["noise_share"]),
        outliers=tuple(made(OutlierChannel, x) for x in data["outliers"]),
        weight_error=made(ErrorSplit, data["weight_error"]),
        activation_error=None if activation is None else made(ErrorSplit, activation),
        saturation=made(Saturation, data["saturation"]),
    )


def _trial(data: Mapping[str, Any]) -> Trial:
    sqnr = math.inf if data["sqnr_db"] is None else data["sqnr_db"]
    return made(
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
    numbers = {k: number(data[k]) for k in ("float_model", "quantized")}
    return made(MetricChange, data, **numbers, **comparisons)


def _diagnosis(data: Mapping[str, Any]) -> Diagnosis:
    return made(
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
        evaluation_seconds=number(data["evaluation_seconds"]),
        notes=tuple(data["notes"]),
    )
