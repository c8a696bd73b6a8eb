"""Results as JSON types, and back: what reports, diagnoses and searches share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib.resources import files
from typing import Any, TypeVar

T = TypeVar("T")


def plain(x: Any, derived: Mapping[type, tuple[str, ...]] | None = None) -> Any:
    """``x`` as dicts, lists, strings and numbers.

    Args:
        x: dataclasses, mappings, lists, tuples and what JSON knows, nested; parts that have a
            ``to_dict`` are asked for it. Numbers that JSON does not have become ``None``.
        derived: of dataclasses, the properties that are written beside their fields.

    >>> plain({"error": (0.5, float("nan"))})
    {'error': [0.5, None]}
    """
    if hasattr(x, "to_dict"):
        return x.to_dict()
    if is_dataclass(x) and not isinstance(x, type):
        return plain_fields(x, derived)
    if isinstance(x, Mapping):
        return {str(k): plain(v, derived) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v, derived) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def plain_fields(
    x: Any, derived: Mapping[type, tuple[str, ...]] | None = None, leave: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A dataclass's fields, by name, as :func:`plain`; without those to ``leave``."""
    names = (*(f.name for f in fields(x)), *(derived or {}).get(type(x), ()))
    return {name: plain(getattr(x, name), derived) for name in names if name not in leave}


def made(cls: Callable[..., T], data: Mapping[str, Any], **given: Any) -> T:
    """A dataclass from its fields in ``data``, or as ``given``; what else is there is ignored.

    Raises:
        KeyError: a field that is in neither.
    """
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: given[name] if name in given else data[name] for name in names})


def number(x: float | None) -> float:
    """NaN where JSON has nothing."""
    return math.nan if x is None else x


def read(what: str, version: int, data: Any, build: Callable[[Mapping[str, Any]], T]) -> T:
    """``build(data)`` of the right schema version, with one kind of error.

    Args:
        what: the thing, as an error names it.
        version: of the schema.
        data: what a ``to_dict`` gave.
        build: raises ``KeyError``, ``TypeError`` or ``AttributeError`` where parts do not fit.

    Raises:
        ValueError: another schema version, or a field that is missing or of the wrong type.
    """
    got = data.get("schema_version") if isinstance(data, Mapping) else None
    if got != version:
        raise ValueError(f"schema_version must be {version}, got {got!r}")
    try:
        return build(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a {what}: {type(error).__name__}: {error}") from error


def to_text(data: Mapping[str, Any]) -> str:
    """As JSON text, which ends in a line break."""
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def schema_of(package: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that lies in a package's ``schema.json``."""
    return json.loads((files(package) / "schema.json").read_text("utf-8"))
