"""``search``: the smallest, fastest or best mixture of choices within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor, nn

from ..recipes import LayerRecipe, Recipe
from ..running import evaluating, model_bytes, pick_output
from ..splits import SHARES, split
from ..statistics import LEVEL
from . import sensitivities
from .budgets import certain as find_certain
from .budgets import choose
from .candidates import Candidates, build, group_bytes, label_choices
from .cost import group_seconds, model_seconds
from .front import Drafts, Timing, finish, slope, walk, with_better
from .numbers import FLOAT, Budget, Check, Choice, Cost, Front, Group
from .validate import Fidelity, Judge

CHOICES: tuple[str, ...] = (
    *("int8-weight-only", "int8-dynamic", "int8-static"),
    *("int4-weight-only", "int4"),
)
"""What layers may get by default, beside float."""

_NOTHING = 1e-13  # float64 cosines of equal vectors are off 1 by less


def search(
    model: nn.Module,
    data: Iterable[Any],
    metric: Callable[[nn.Module], Any] | None = None,
    *,
    max_drop: float | None = None,
    max_bytes: int | None = None,
    max_latency: float | None = None,
    choices: Iterable[str | LayerRecipe | Recipe | None] = CHOICES,
    cost: Cost | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    batch: Any = None,
    shares: tuple[float, float, float] = SHARES,
    stratify: Any = None,
    points: int = 10,
    checks: int = 24,
    certain: bool = False,
    level: float = LEVEL,
    seconds: float = 10.0,
    seed: int = 0,
    progress: bool = True,
) -> Front:
    """Choose for every Linear layer what it gets, so that the model is as small or fast as a budget
    of accuracy allows, or as accurate as a budget of size or time allows.

    1. The data are split, by sample, into calibration, search and held-out parts.
    2. The damage of every layer by every choice is estimated on search data, at about the price of
       a dozen runs of the model, and checked against measured damages; where they agree badly, all
       are measured.
    3. For each of several costs the allocation of least damage is found, exactly, by HiGHS.
    4. Each allocation is quantized and scored on search data. Where ``max_drop`` lies between two
       of them, allocations between them are tried.
    5. All are compared with the float model on held-out data, with intervals. Chosen is the
       cheapest that kept the budget on search data and keeps it there, too.

    Args:
        model: any float module; it is not changed.
        data: an iterable of batches, called as :func:`zeropoint.compare` calls them.
        metric: called with a model; larger is better. It returns the scores of the samples, 1-d (1
            for a right answer and 0 for a wrong one, say), of which those on search data decide and
            those on held-out data are reported; where there are as many as ``data`` has samples,
            they are taken to belong to these. A single number works too, but then nothing is held
            out, and nothing is known of how sure it is. By default the metric is the cosine of each
            sample's output with the float model's.
        max_drop: of the metric.
        max_bytes: of the model's ``state_dict``.
        max_latency: seconds of one call of the model on ``batch``, on this machine.
        choices: what layers may get: names of recipes, :class:`zeropoint.LayerRecipe`; float
            always.
        cost: what to save where the drop is limited: ``"bytes"``, or ``"seconds"``, which is the
            default where ``max_latency`` is given and ``max_bytes`` is not.
        include, exclude: glob patterns of layers, as in :func:`zeropoint.quantize`. Where an exact
            name in ``include`` unties a layer, ``quantize`` needs it for the found recipe, too.
        output: picks the tensor of the output that counts, as in :func:`zeropoint.compare`.
        batch: what a call is timed on; by default the first batch of ``data``.
        shares: of the data: calibration, search, held out.
        stratify: a class for each sample of ``data``, for parts with equal proportions.
        points: costs to try between the least and that of the float model.
        checks: (layer, choice) pairs whose damage is measured to check the estimates.
        certain: choose only a point that is certain to keep ``max_drop``: its interval and those of
            all more careful points end below it.
        level: of confidence of the intervals.
        seconds: to spend on timing layers, about; as much again on timing models.
        seed: of all that is random: the same seed finds the same front, times excepted.
        progress: show progress bars where it takes over two seconds and stderr is a terminal.

    Returns:
        A :class:`Front`: ``print(front)``, ``front.chosen``, ``quantize(model, front.recipe,
        calibration=front.calibration)``.

    Raises:
        TypeError: ``model`` is no module, ``data`` one batch.
        ValueError: no layer to quantize, too few samples, a number that is out of range.
        ImportError: scipy or scikit-learn is not installed (``pip install 'zeropoint[search]'``).

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> front = search(model, [torch.randn(200, 16)], max_drop=0.001, checks=4)
    >>> front.chosen.measured.value <= 0.001
    True
    """
    begun = time.perf_counter()
    _check_arguments(model, max_drop, max_bytes, max_latency, cost, points, seconds)
    labels = label_choices(choices)
    if include is not None and not isinstance(include, str):
        include = list(include)
    budget = Budget(max_drop, max_bytes, max_latency)
    if cost is None:
        cost = "seconds" if max_latency is not None and max_bytes is None else "bytes"
    if not isinstance(data, Tensor | dict | str):
        data = list(data)
    parts = split(data, shares=shares, stratify=stratify, seed=seed)
    timed = cost == "seconds" or max_latency is not None
    if timed and batch is None:
        batch = data[0]  # type: ignore[index]
    pick = output or pick_output
    search_fidelity, held_out = (Fidelity(model, p, pick) for p in (parts.search, parts.evaluation))
    judge = Judge(
        metric,
        search_fidelity,
        held_out,
        indices=parts.indices,
        shares=shares,
        level=level,
        seed=seed,
    )
    candidates = build(model, labels, parts.calibration, include, exclude, progress)
    for fidelity in (search_fidelity, held_out):
        fidelity.keep()
    with evaluating(model):
        damages, check = _damages(
            model, parts.search, candidates, pick, search_fidelity, checks, seed, progress
        )
    times = group_seconds(model, batch, candidates, seconds, progress) if timed else None
    groups = _groups(model, candidates, damages, times)
    float_bytes = model_bytes(model)
    timing = None
    if timed:
        timing = Timing(batch, model_seconds(model, batch, seconds / 5), seconds / (2 * points))
    judge.start(model)
    drafts = Drafts(
        model, candidates, groups, judge, parts.calibration, float_bytes, timing, include
    )
    names = [label for label in labels if label != FLOAT]
    front = walk(drafts, budget, cost, names, points, progress)
    uniform = [drafts.draft(drafts.uniform(label)) for label in names]
    front = with_better(front, uniform, budget, cost)
    scale = None if metric is None else slope([*front, *uniform])
    found = finish(front, judge, scale)
    boldest = find_certain(found, budget)
    chosen, skipped = choose(found, budget, boldest if certain else 0)
    return Front(
        model=type(model).__name__,
        metric=judge.name,
        budget=budget,
        cost=cost,
        points=found,
        uniform=finish(uniform, judge, scale),
        chosen_index=chosen,
        certain_index=boldest,
        skipped=skipped,
        groups=groups,
        check=check,
        samples={name: len(part) for name, part in parts.indices.items()},
        float_bytes=float_bytes,
        float_seconds=None if timing is None else timing.float_seconds,
        left=candidates.left,
        level=level,
        seed=seed,
        evaluations=judge.runs + search_fidelity.runs + held_out.runs,
        elapsed=time.perf_counter() - begun,
        calibration=parts.calibration,
    )


def _damages(
    model: nn.Module,
    batches: Sequence[Any],
    candidates: Candidates,
    pick: Callable[[Any], Tensor],
    fidelity: Fidelity,
    checks: int,
    seed: int,
    progress: bool,
) -> tuple[sensitivities.Damages, Check]:
    """Estimates where they can be trusted, else measurements; what cannot be had is taken out."""
    layers, built = candidates.layers, candidates.built
    damages, called = sensitivities.estimate(
        model, batches, layers, built, pick, seed=seed, progress=progress
    )
    for name in set(layers) - called:
        candidates.leave(name, "the search data never call it")
        del damages[name]

    def measure(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], float]:
        return sensitivities.measure(fidelity, model, layers, built, pairs, progress)

    check = sensitivities.compare(
        damages, measure(sensitivities.spread(damages, checks, seed)) if checks else {}
    )
    unknown = [(n, x) for n, row in damages.items() for x, d in row.items() if math.isnan(d)]
    without_gradient = {name for name, _ in unknown}
    if check.spearman < sensitivities.TRUSTED:
        unknown = [(n, x) for n, row in damages.items() for x in row]
        check = replace(check, used="measured")
    for (name, label), value in measure(unknown).items():
        damages[name][label] = value
    for name, row in damages.items():
        if name in without_gradient and max(row.values()) <= _NOTHING:
            candidates.leave(name, "the output that is compared does not depend on it")
            continue
        for label, value in row.items():
            if not math.isfinite(value):
                candidates.drop(name, label)
    return damages, check


def _groups(
    model: nn.Module,
    candidates: Candidates,
    damages: sensitivities.Damages,
    seconds: Sequence[dict[str, float]] | None,
) -> tuple[Group, ...]:
    sizes = group_bytes(model, candidates)
    groups = []
    for i, names in enumerate(candidates.groups):
        choices = (
            Choice(
                label,
                candidates.labels[label],
                0.0 if label == FLOAT else sum(max(0.0, damages[n][label]) for n in names),
                sizes[i][label],
                None if seconds is None else seconds[i][label],
            )
            for label in candidates.available(names)
        )
        groups.append(Group(names, tuple(choices)))
    return tuple(groups)


def _check_arguments(
    model: Any,
    max_drop: Any,
    max_bytes: Any,
    max_latency: Any,
    cost: Any,
    points: Any,
    seconds: Any,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if max_drop is not None and not max_drop >= 0:
        raise ValueError(f"max_drop must be at least 0, got {max_drop!r}")
    for name, number in (
        ("max_bytes", max_bytes),
        ("max_latency", max_latency),
        ("points", points),
        ("seconds", seconds),
    ):
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be positive, got {number!r}")
    if cost not in (None, *get_args(Cost)):
        raise ValueError(f"cost must be one of {', '.join(get_args(Cost))}, got {cost!r}")
