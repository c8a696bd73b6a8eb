"""Which choice each group of layers gets: a multiple-choice knapsack, solved exactly.

Minimize ``Σ objective[i, c(i)]`` over one choice ``c(i)`` for every group ``i``, subject to ``Σ
cost[i, c(i)] ≤ limit`` for each kind of cost. It is handed to HiGHS (Huangfu & Hall 2018,
https://highs.dev) by :func:`scipy.optimize.milp`, which proves its optimum.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

_SCALE = 1e4
"""What losses add up to when HiGHS sees them, about, so that its gap is 1e-10 of them."""
_ROUNDS, _CUTS = 20, 100


@dataclass(frozen=True)
class Allocation:
    """A choice for every group, and what it adds up to."""

    choices: tuple[int, ...]
    objective: float
    costs: Mapping[str, float]


def allocate(
    objective: Sequence[Sequence[float]],
    costs: Mapping[str, Sequence[Sequence[float]]],
    limits: Mapping[str, float],
) -> Allocation | None:
    """The best allocation within the limits.

    Args:
        objective: of each group, one finite number a choice; groups may have different choices.
        costs: name → the same shape. Integers below 2⁵³ are added exactly.
        limits: name → the most that this cost may add up to; costs without a limit are only told.

    Returns:
        The allocation, or ``None`` where none is within the limits. Of two with one objective,
        either may come.

    Raises:
        ValueError: shapes that differ, numbers that are not finite, a limit without costs.
        ImportError: scipy is not installed.

    >>> allocate([[0, 3], [0, 5]], {"bytes": [[4, 1], [4, 1]]}, {"bytes": 5}).choices
    (1, 0)
    """
    _check(objective, costs, limits)
    tables: dict[str, list[np.ndarray]] = {
        name: [np.asarray(row, dtype=np.float64) for row in table] for name, table in costs.items()
    }
    values = [np.asarray(row, dtype=np.float64) for row in objective]
    kept = [
        _efficient(value, [tables[name][i] for name in limits]) for i, value in enumerate(values)
    ]
    picked = _milp(
        [value[k] for value, k in zip(values, kept, strict=True)],
        [[tables[name][i][k] for i, k in enumerate(kept)] for name in limits],
        list(limits.values()),
    )
    if picked is None:
        return None
    choices = tuple(int(k[p]) for k, p in zip(kept, picked, strict=True))
    return Allocation(choices, total(objective, choices), _totals(costs, choices))


def total(table: Sequence[Sequence[float]], choices: Sequence[int]) -> float:
    """What a table adds up to over the groups' choices."""
    return math.fsum(row[c] for row, c in zip(table, choices, strict=True))


def _totals(
    costs: Mapping[str, Sequence[Sequence[float]]], choices: Sequence[int]
) -> dict[str, float]:
    return {name: total(table, choices) for name, table in costs.items()}


def _efficient(value: np.ndarray, costs: list[np.ndarray]) -> np.ndarray:
    """The choices that no other is at least as good as in everything: fewer for the solver."""
    columns = np.stack([value, *costs])
    keep = []
    for i in range(columns.shape[1]):
        as_good = (columns <= columns[:, i : i + 1]).all(0)
        better = (columns < columns[:, i : i + 1]).any(0)
        equal_before = as_good & ~better & (np.arange(columns.shape[1]) < i)
        if not (as_good & better).any() and not equal_before.any():
            keep.append(i)
    return np.array(keep)


def _milp(
    values: list[np.ndarray], costs: list[list[np.ndarray]], limits: list[float]
) -> list[int] | None:
    """HiGHS stops within 1e-6 of the optimum, in absolute terms. So it is asked again with what
    cannot be part of the optimum left out and the rest brought to scale, until that is far below
    what tells allocations apart."""
    above = [v - v.min() for v in values]  # what a choice loses against its group's best
    left = [np.arange(len(v)) for v in values]
    picked: list[int] | None = None
    reach = math.fsum(float(a.max()) for a in above)
    for _ in range(_ROUNDS):
        scale = _SCALE / reach if reach else 1.0
        found = _highs(
            [scale * a[k] for a, k in zip(above, left, strict=True)],
            [[c[k] for c, k in zip(table, left, strict=True)] for table in costs],
            limits,
        )
        if found is None:
            return picked
        found = [int(k[f]) for k, f in zip(left, found, strict=True)]
        loss = total(above, found)  # type: ignore[arg-type]
        if picked is not None and loss >= total(above, picked):  # type: ignore[arg-type]
            return picked
        picked = found
        if loss >= reach / 2:
            return picked
        left = [np.flatnonzero(a <= loss) for a in above]
        reach = loss
    return picked


def _highs(
    values: list[np.ndarray], costs: list[list[np.ndarray]], limits: list[float]
) -> list[int] | None:
    optimize, sparse = _scipy()
    sizes = [len(v) for v in values]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    if not sizes:
        return [] if all(limit >= 0 for limit in limits) else None
    count = int(starts[-1])
    group = np.repeat(np.arange(len(sizes)), sizes)
    one_each = sparse.csr_array((np.ones(count), (group, np.arange(count))))
    constraints = [optimize.LinearConstraint(one_each, 1, 1)]
    for table, limit in zip(costs, limits, strict=True):
        least = math.fsum(float(c.min()) for c in table)
        if least > limit:
            return None
        row = np.concatenate([c - c.min() for c in table])
        unit = max(float(row.max()), 1e-300)
        constraints.append(
            optimize.LinearConstraint(row[None, :] / unit, -np.inf, (limit - least) / unit)
        )
    for _ in range(_CUTS):
        with _without_highs_leftover():
            solution = optimize.milp(
                np.concatenate(values),
                integrality=np.ones(count),
                bounds=optimize.Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
        if solution.x is None:
            if solution.status == 2:  # infeasible
                return None
            raise RuntimeError(f"HiGHS found no allocation: {solution.message}")
        picked = [int(np.argmax(solution.x[a:b])) for a, b in itertools.pairwise(starts)]
        if all(
            math.fsum(float(c[p]) for c, p in zip(table, picked, strict=True)) <= limit
            for table, limit in zip(costs, limits, strict=True)
        ):
            return picked
        # Over a limit, by less than HiGHS sees: not this one, then.
        cut = np.zeros(count)
        cut[starts[:-1] + np.array(picked)] = 1
        constraints.append(optimize.LinearConstraint(cut[None, :], -np.inf, len(sizes) - 1))
    raise RuntimeError(f"HiGHS kept a limit {limits} only within its tolerance, {_CUTS} times")


@contextmanager
def _without_highs_leftover() -> Iterator[None]:
    """Keep a line from stdout that some versions of HiGHS forgot to take out
    (https://github.com/ERGO-Code/HiGHS/issues/2783); all else that is written meanwhile follows."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is no stdout
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            with suppress(OSError, TypeError, AttributeError):
                ctypes.CDLL(None).fflush(None)  # what C's stdio has not written yet
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            lines = file.read().splitlines(keepends=True)
            os.write(1, b"".join(x for x in lines if not x.startswith(_LEFTOVER)))


_LEFTOVER = b"HighsMipSolverData::transformNewIntegerFeasibleSolution"


def _check(
    objective: Sequence[Sequence[float]],
    costs: Mapping[str, Sequence[Sequence[float]]],
    limits: Mapping[str, float],
) -> None:
    shape = [len(row) for row in objective]
    if 0 in shape:
        raise ValueError("objective must have at least one choice for every group")
    for name, table in {"objective": objective, **costs}.items():
        if [len(row) for row in table] != shape:
            raise ValueError(f"{name} must have the shape of objective, {shape}")
        if not all(math.isfinite(x) for row in table for x in row):
            raise ValueError(f"{name} must hold finite numbers")
    if unknown := [name for name in limits if name not in costs]:
        raise ValueError(f"limits must name costs of {', '.join(costs)}; got {unknown[0]!r}")


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import optimize, sparse
    except ImportError as error:
        raise ImportError("search needs scipy: pip install 'zeropoint[search]'") from error
    return optimize, sparse
