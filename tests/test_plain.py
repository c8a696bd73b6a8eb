"""Results as JSON types, and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

from zeropoint.plain import made, number, plain, plain_fields, read, to_text


@dataclass(frozen=True)
class Part:
    x: float
    names: tuple[str, ...] = ()

    @property
    def twice(self) -> float:
        return 2 * self.x


class Own:
    def to_dict(self) -> dict[str, Any]:
        return {"own": True}


def test_everything_nested() -> None:
    value = {1: [Part(0.5, ("a",))], "own": Own(), "none": None, "flag": True}
    expected = {"1": [{"x": 0.5, "names": ["a"]}], "own": {"own": True}, "none": None, "flag": True}
    assert plain(value) == expected
    assert json.loads(to_text(plain(value))) == expected


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have(x: float) -> None:
    assert plain(Part(x))["x"] is None
    assert math.isnan(number(None))
    with pytest.raises(ValueError, match="JSON"):
        to_text({"x": x})


def test_derived_properties_and_fields_left_out() -> None:
    assert plain([Part(1.0)], {Part: ("twice",)}) == [{"x": 1.0, "names": [], "twice": 2.0}]
    assert plain_fields(Part(1.0), leave=("names",)) == {"x": 1.0}


def test_made_takes_what_is_given_first_and_misses_nothing() -> None:
    assert made(Part, {"x": 1.0, "names": [], "more": 1}, names=("b",)) == Part(1.0, ("b",))
    with pytest.raises(KeyError, match="names"):
        made(Part, {"x": 1.0})


@pytest.mark.parametrize("data", [None, [], {}, {"schema_version": 2, "x": 1, "names": []}])
def test_another_version_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="schema_version must be 1"):
        read("part", 1, data, lambda d: made(Part, d))


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AttributeError("x")])
def test_parts_that_do_not_fit_are_one_kind_of_error(error: Exception) -> None:
    def build(_: Any) -> Part:
        raise error

    with pytest.raises(ValueError, match=f"not a part: {type(error).__name__}"):
        read("part", 1, {"schema_version": 1}, build)
