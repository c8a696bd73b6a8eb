"""Which point is chosen, and which is certain."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from zeropoint.recipes import Recipe
from zeropoint.search.budgets import certain, choose
from zeropoint.search.numbers import Budget, Point
from zeropoint.statistics import Comparison, Estimate


def point(size: int, search: float, held_out: float, reach: float = 0.0, seconds=None) -> Point:
    def e(value: float, reach: float = 0.0) -> Estimate:
        return Estimate(value, value - reach, value + reach, 100)

    comparison = Comparison(e(1.0), e(1 - held_out), e(-held_out, reach), 0.01, 10)
    return Point(Recipe(None), {}, size, seconds, seconds, 0.0, e(search), comparison)


FRONT = [
    point(10, 0.5, 0.4),
    point(20, 0.01, 0.2),  # held on search data by luck
    point(30, 0.02, 0.03, reach=0.03),
    point(40, 0.005, 0.01, reach=0.01),
    point(50, 0.0, 0.0),
]


def test_the_cheapest_that_holds_on_search_and_on_held_out_data() -> None:
    assert choose(FRONT, Budget(max_drop=0.05)) == (2, 1)
    assert choose(FRONT, Budget(max_drop=0.5)) == (0, 0)
    assert choose(FRONT, Budget(max_drop=0.0)) == (4, 0)


def test_what_failed_on_search_data_is_not_taken_by_luck_on_held_out_data() -> None:
    front = [point(10, 0.5, 0.0), point(20, 0.0, 0.0)]
    assert choose(front, Budget(max_drop=0.1)) == (1, 0)


def test_size_and_time_limit_too() -> None:
    assert choose(FRONT, Budget(max_drop=0.05, max_bytes=20)) == (None, 1)
    assert choose(FRONT, Budget(max_drop=0.05, max_bytes=30)) == (2, 1)
    timed = [point(10, 0.0, 0.0, seconds=2.0), point(20, 0.0, 0.0, seconds=1.0)]
    assert choose(timed, Budget(max_drop=0.1, max_latency=1.0)) == (1, 0)
    assert choose(FRONT, Budget(max_drop=0.05, max_latency=1.0)) == (None, 0)


def test_without_a_limit_of_the_drop_the_best_on_search_data_within_the_size() -> None:
    assert choose(FRONT, Budget(max_bytes=30)) == (1, 0)
    assert choose(FRONT, Budget(max_bytes=9)) == (None, 0)
    unknown = [point(10, math.nan, 0.0), point(20, 0.3, 0.3)]
    assert choose(unknown, Budget(max_bytes=20)) == (1, 0)
    assert choose([point(10, math.nan, 0.0)], Budget(max_bytes=20)) == (None, 0)


def test_what_search_data_cannot_tell_apart_care_does() -> None:
    bold, careful, worse = point(10, 0.0, 0.0), point(20, 0.0, 0.0), point(30, 0.1, 0.0)
    assert choose([bold, careful, worse], Budget(max_bytes=30)) == (1, 0)
    unsure = replace(bold, search_drop=Estimate(0.0, -0.2, 0.2, 10))
    assert choose([unsure, careful, worse], Budget(max_bytes=30)) == (2, 0)
    number = replace(bold, search_drop=Estimate(0.0, -math.inf, math.inf, 1))
    assert choose([number, worse], Budget(max_bytes=30)) == (0, 0)


def test_nothing_asked_nothing_chosen() -> None:
    assert choose(FRONT, Budget()) == (None, 0)


def test_certain_is_what_ends_below_the_budget_and_so_do_all_more_careful_ones() -> None:
    assert certain(FRONT, Budget(max_drop=0.05)) == 3  # 2 reaches up to 0.06
    assert certain(FRONT, Budget(max_drop=0.07)) == 2
    lucky = [point(10, 0, 0.0, reach=0.01), point(20, 0, 0.0, reach=1.0), point(30, 0, 0.0)]
    assert certain(lucky, Budget(max_drop=0.05)) == 2  # not 0, though its interval ends below
    assert certain(FRONT, Budget(max_bytes=10)) is None
    assert certain([point(10, 0, 0.0, reach=math.inf)], Budget(max_drop=0.05)) is None
    nan = point(10, 0, math.nan)
    assert certain([nan], Budget(max_drop=0.05)) is None


@pytest.mark.parametrize(("boldest", "expected"), [(3, 3), (None, None)])
def test_only_certain_points(boldest, expected) -> None:
    assert choose(FRONT, Budget(max_drop=0.05), boldest)[0] == expected
