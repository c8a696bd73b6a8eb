"""The allocation is the best there is: beside all allocations, tried one by one."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeropoint.search.solve import _without_highs_leftover, allocate, total


def best_of_all(objective, costs, limits) -> float | None:
    found = None
    for choices in itertools.product(*(range(len(row)) for row in objective)):
        if all(total(costs[name], choices) <= limit for name, limit in limits.items()):
            value = total(objective, choices)
            found = value if found is None else min(found, value)
    return found


@st.composite
def instances(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    damage = draw(
        st.sampled_from(
            [
                st.integers(0, 5).map(float),  # ties
                st.floats(0, 1, allow_subnormal=False),
                st.floats(-9, 1).map(lambda x: 10**x),  # decades apart, as damages are
            ]
        )
    )
    bytes_ = draw(st.sampled_from([st.integers(1, 5), st.integers(1, 10**7)]))
    tables = [
        [draw(st.lists(numbers, min_size=n, max_size=n)) for n in sizes]
        for numbers in (damage, bytes_, st.floats(0, 1))
    ]
    limits = {"bytes": draw(st.integers(sum(map(min, tables[1])) - 1, sum(map(max, tables[1]))))}
    if draw(st.booleans()):
        limits["seconds"] = draw(st.floats(0, sum(map(max, tables[2]))))
    return tables[0], {"bytes": tables[1], "seconds": tables[2]}, limits


@given(instances())
def test_none_is_better_and_none_is_within_where_none_is_found(instance) -> None:
    objective, costs, limits = instance
    expected = best_of_all(objective, costs, limits)
    found = allocate(objective, costs, limits)
    assert (found is None) == (expected is None)
    if found is not None:
        assert all(total(costs[n], found.choices) <= limit for n, limit in limits.items())
        assert found.objective == pytest.approx(expected, rel=1e-9, abs=1e-300)
        assert found.costs["seconds"] == total(costs["seconds"], found.choices)


def test_a_limit_that_is_met_exactly_is_met() -> None:
    # 0.1 + 0.2 > 0.3 in floats: the limit is what the sum gives, to the last bit.
    found = allocate([[0, 1], [0, 1]], {"s": [[0.1, 0.0], [0.2, 0.0]]}, {"s": 0.1 + 0.2})
    assert found is not None
    assert found.choices == (0, 0)
    # One byte of ten million too much is too much, though the solver's tolerance is wider.
    for limit, expected in ((20_000_000, (0, 0)), (19_999_999, (1, 0))):
        found = allocate([[0, 1], [0, 2]], {"b": [[10**7, 1], [10**7, 1]]}, {"b": limit})
        assert found is not None
        assert found.choices == expected


def test_damages_ten_decades_apart_are_told_apart() -> None:
    objective = [[1.0, 1e9], [1e-9, 2e-9, 3e-9], [5e-9, 0.0]]
    costs = {"b": [[1, 0], [3, 2, 1], [1, 2]]}
    for limit in range(2, 7):
        found = allocate(objective, costs, {"b": limit})
        assert found is not None
        assert found.objective == best_of_all(objective, costs, {"b": limit})


def test_the_more_may_be_spent_the_less_is_lost() -> None:
    objective = [[4.0**-b * s for b in (2, 3, 4, 8)] + [0.0] for s in (3, 1, 0.2, 7, 0.01)]
    costs = {"b": [[n * b for b in (2, 3, 4, 8, 32)] for n in (10, 20, 30, 5, 70)]}
    losses = []
    for limit in range(270, 4400, 83):
        found = allocate(objective, costs, {"b": limit})
        assert found is not None
        losses.append(found.objective)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_nothing_to_choose() -> None:
    assert allocate([], {}, {}).choices == ()
    assert allocate([[3.0]], {"b": [[5]]}, {"b": 4}) is None


def test_what_the_solver_forgot_is_not_printed_and_all_else_is(capfd) -> None:
    with _without_highs_leftover():
        libc = ctypes.CDLL(None)
        libc.puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
        libc.puts(b"a line of C")
        os.write(1, b"another\n")
    print("after")
    assert sorted(capfd.readouterr().out.splitlines()) == ["a line of C", "after", "another"]


@pytest.mark.parametrize(
    ("objective", "costs", "limits", "message"),
    [
        ([[]], {}, {}, "at least one choice"),
        ([[1.0]], {"b": [[1, 2]]}, {}, "b must have the shape of objective"),
        ([[float("nan")]], {}, {}, "objective must hold finite numbers"),
        ([[1.0]], {"b": [[1]]}, {"c": 1}, "limits must name costs of b; got 'c'"),
    ],
)
def test_wrong_arguments(objective, costs, limits, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate(objective, costs, limits)


def test_without_scipy_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"pip install 'zeropoint\[search\]'"):
        allocate([[1.0]], {}, {})
