"""From allocations to points: each is quantized, scored, and timed where a latency is asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..calibrate import progress_bar
from ..quantize import quantize
from ..recipes import Recipe
from ..statistics import Estimate
from .candidates import Candidates, needs_calibration
from .cost import relative_seconds
from .numbers import FLOAT, Budget, Cost, Group, Point
from .solve import allocate, total
from .validate import Judge, Scores

_ROUNDS = 4
"""Of coming nearer to ``max_drop``."""
_SMALL = 0.05
"""Damages up to which a metric's drop is taken to grow with them in proportion."""


@dataclass(frozen=True)
class Draft:
    """An allocation that was scored. ``choices`` are indices of each group's choices."""

    choices: tuple[int, ...]
    recipe: Recipe
    layers: Mapping[str, int]
    damage: float
    bytes: int
    seconds: float | None
    measured_seconds: float | None
    scores: Scores
    search_drop: Estimate

    def cost(self, cost: Cost) -> float:
        """In bytes or seconds."""
        return self.bytes if cost == "bytes" else self.seconds or 0.0


@dataclass(frozen=True)
class Timing:
    """What latencies are measured with: a batch, and seconds to spend on each model."""

    batch: Any
    float_seconds: float
    budget: float


class Drafts:
    """Makes drafts, each allocation once.

    Args:
        model: the float model.
        candidates, groups: what there is to choose from, and what it costs.
        judge: of quality, started with the float model.
        calibration: batches for choices that need them.
        float_bytes: of the model.
        timing: ``None`` where no latency is asked for.
        include: as the caller gave it: exact names break ties.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates,
        groups: Sequence[Group],
        judge: Judge,
        calibration: Sequence[Any],
        float_bytes: int,
        timing: Timing | None,
        include: str | Iterable[str] | None = None,
    ) -> None:
        self._model, self._candidates, self._groups = model, candidates, groups
        self._judge, self._calibration, self._timing = judge, calibration, timing
        self._include = include
        self._found: dict[tuple[int, ...], Draft] = {}
        self._damages = [[c.damage for c in g.choices] for g in groups]
        self._costs = {"bytes": [[float(c.bytes) for c in g.choices] for g in groups]}
        self._rest = {"bytes": float_bytes - self._floats("bytes")}
        if timing is not None:
            self._costs["seconds"] = [[c.seconds or 0.0 for c in g.choices] for g in groups]
            self._rest["seconds"] = timing.float_seconds - self._floats("seconds")

    def _floats(self, cost: str) -> float:
        at = [next(i for i, c in enumerate(g.choices) if c.label == FLOAT) for g in self._groups]
        return total(self._costs[cost], at)

    def least_damage(self, limits: Mapping[str, float]) -> tuple[int, ...] | None:
        """The allocation of least damage whose whole model costs at most the limits."""
        return self._solve(self._damages, limits)

    def cheapest(
        self, cost: Cost, limits: Mapping[str, float], damage: float = math.inf
    ) -> tuple[int, ...] | None:
        """The allocation of least cost that does at most so much damage, within the limits."""
        return self._solve(self._costs[cost], {**limits, "damage": damage})

    def _solve(
        self, objective: list[list[float]], limits: Mapping[str, float]
    ) -> tuple[int, ...] | None:
        tables = {**self._costs, "damage": self._damages}
        net = {n: x - self._rest.get(n, 0.0) for n, x in limits.items() if math.isfinite(x)}
        found = allocate(objective, tables, net)
        return None if found is None else found.choices

    def total(self, choices: Sequence[int], cost: str) -> float:
        """Of the whole model."""
        return self._rest[cost] + total(self._costs[cost], choices)

    def uniform(self, label: str) -> tuple[int, ...]:
        """The allocation of one choice to all layers; layers that it does not fit stay float."""
        places = [{c.label: i for i, c in enumerate(g.choices)} for g in self._groups]
        return tuple(place.get(label, place[FLOAT]) for place in places)

    def draft(self, choices: tuple[int, ...]) -> Draft:
        """Quantize the model so, and score it."""
        if choices not in self._found:
            self._found[choices] = self._make(choices)
        return self._found[choices]

    def _make(self, choices: tuple[int, ...]) -> Draft:
        picked = [g.choices[i] for g, i in zip(self._groups, choices, strict=True)]
        recipe = self._candidates.recipe([c.label for c in picked])
        counts: Counter[str] = Counter()
        for group, c in zip(self._groups, picked, strict=True):
            counts[c.label] += len(group.layers)
        order = list(self._candidates.labels)
        measured = None
        if set(counts) == {FLOAT}:
            scores = self._judge.float_scores
            if self._timing is not None:
                measured = self._timing.float_seconds
        else:
            needed = any(needs_calibration(c.recipe) for c in picked)
            quantized = quantize(
                self._model,
                recipe,
                calibration=self._calibration if needed else None,
                include=self._include,
                progress=False,
            )
            scores = self._judge.run(quantized)
            if self._timing is not None:
                t = self._timing
                ratio = relative_seconds(self._model, quantized, t.batch, t.budget)
                measured = ratio * t.float_seconds
        return Draft(
            choices,
            recipe,
            {label: counts[label] for label in order if counts[label]},
            total(self._damages, choices),
            round(self.total(choices, "bytes")),
            None if self._timing is None else self.total(choices, "seconds"),
            measured,
            scores,
            self._judge.search_drop(scores),
        )


def walk(
    drafts: Drafts, budget: Budget, cost: Cost, labels: Sequence[str], points: int, progress: bool
) -> list[Draft]:
    """The drafts of a front, by ascending cost.

    At ``points`` costs in equal ratios from the least possible to that of the float model, at the
    costs of the uniform allocations, and at the budget's; then nearer to ``max_drop``.
    """
    limits = {"bytes": budget.max_bytes, "seconds": budget.max_latency}
    others = {n: float(x) for n, x in limits.items() if x is not None and n != cost}
    cheapest, careful = drafts.cheapest(cost, others), drafts.least_damage(others)
    if cheapest is None or careful is None:
        return []
    low, high = drafts.total(cheapest, cost), drafts.total(careful, cost)
    at = list(np.geomspace(max(low, 1e-12), max(high, low, 1e-12), points)) if points > 1 else [low]
    at += [drafts.total(drafts.uniform(label), cost) for label in labels]
    if (own := limits[cost]) is not None:
        at.append(float(own))
    found: dict[tuple[int, ...], None] = {}
    for limit in sorted(at):
        # Just at the end, rounding must not leave the cheapest out.
        choices = drafts.least_damage({**others, cost: limit if limit > low else low + _hair(low)})
        if choices is not None:
            found[choices] = None
    found[careful] = None
    front = [drafts.draft(c) for c in progress_bar(list(found), "validating", progress)]
    if budget.max_drop is not None:
        front = _approach(drafts, front, budget.max_drop, cost, others)
    return sorted(front, key=lambda d: (d.cost(cost), -d.damage))


def with_better(
    front: Sequence[Draft], uniform: Sequence[Draft], budget: Budget, cost: Cost
) -> list[Draft]:
    """The front, with those single choices that dropped less on search data than all that is as
    cheap: there the estimates were too hopeful. By ascending cost."""
    known, found = {d.choices for d in front}, list(front)
    limits = {"bytes": budget.max_bytes, "seconds": budget.max_latency}
    for u in uniform:
        beyond = any(
            limit is not None and n != cost and u.cost(n) > limit  # type: ignore[arg-type]
            for n, limit in limits.items()
        )
        rivals = [d.search_drop.value for d in front if d.cost(cost) <= u.cost(cost)]
        if u.choices not in known and not beyond and u.search_drop.value < min(rivals, default=0.0):
            found.append(u)
    return sorted(found, key=lambda d: (d.cost(cost), -d.damage))


def _hair(x: float) -> float:
    return abs(x) * 1e-12


def _approach(
    drafts: Drafts, front: list[Draft], max_drop: float, cost: Cost, others: Mapping[str, float]
) -> list[Draft]:
    """Add drafts between the boldest that keeps ``max_drop`` on search data and the next one."""
    known = {d.choices: d for d in front}
    for _ in range(_ROUNDS):
        ranked = sorted(known.values(), key=lambda d: d.damage)
        good = [i for i, d in enumerate(ranked) if d.search_drop.value <= max_drop]
        if not good or good[-1] + 1 == len(ranked):
            break
        inside, outside = ranked[good[-1]], ranked[good[-1] + 1]
        target = _between(inside, outside, max_drop)
        for damage in (target, (inside.damage + outside.damage) / 2):
            choices = drafts.cheapest(cost, others, damage)
            if choices is not None and choices not in known:
                known[choices] = drafts.draft(choices)
                break
        else:
            break
    return list(known.values())


def _between(inside: Draft, outside: Draft, max_drop: float) -> float:
    """The damage at which the drop would be ``max_drop``, by a line through the two."""
    a, b = inside.search_drop.value, outside.search_drop.value
    share = (max_drop - a) / (b - a) if b > a else 0.5
    share = min(max(share, 0.1), 0.9)
    return inside.damage + share * (outside.damage - inside.damage)


def finish(drafts: Sequence[Draft], judge: Judge, slope: float | None) -> tuple[Point, ...]:
    """Points, with what held-out data say of them.

    Args:
        drafts: to finish.
        judge: who compares.
        slope: drop of the metric for a damage; ``None``: the metric is fidelity itself.
    """
    return tuple(
        Point(
            d.recipe,
            d.layers,
            d.bytes,
            d.seconds,
            d.measured_seconds,
            expected_drop(d.damage) if slope is None else slope * d.damage,
            d.search_drop,
            judge.compare(d.scores),
        )
        for d in drafts
    )


def expected_drop(damage: float) -> float:
    """``1 − cosine`` of an output with noise perpendicular to it, whose power is twice the damage.

    >>> expected_drop(0.0)
    0.0
    """
    return 1 - 1 / math.sqrt(1 + 2 * damage)


def slope(drafts: Sequence[Draft]) -> float:
    """By how much the metric dropped on search data, for a damage of 1."""
    pairs = [(d.damage, d.search_drop.value) for d in drafts if d.damage > 0]
    small = [p for p in pairs if p[0] <= _SMALL] or pairs
    usable = [p for p in small if math.isfinite(p[1])]
    damage = sum(p[0] for p in usable)
    return max(0.0, sum(p[1] for p in usable) / damage) if damage else 0.0
