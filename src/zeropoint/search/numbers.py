"""What a search found, and its JSON. Nothing here measures, solves or draws.

A **damage** is what a choice for a layer is estimated to cost: the mean of ``1 − cosine`` between
the float model's output and the output with this layer alone changed, to second order. Damages add
up over layers. A **drop** is ``before − after`` of the metric: positive where something was lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..atomic import write_text
from ..plain import made, number, plain_fields, read, schema_of, to_text
from ..recipes import LayerRecipe, Recipe
from ..statistics import Comparison, Estimate

SCHEMA_VERSION = 1
"""Version of the JSON: raised when a field changes its meaning or goes, not when one is added."""

FLOAT = "float"
"""Label of the choice to leave a layer as it is."""

Cost = Literal["bytes", "seconds"]
"""What a front trades against the drop."""


@dataclass(frozen=True)
class Budget:
    """What was asked for; ``None`` where nothing was.

    Args:
        max_drop: of the metric, on held-out data.
        max_bytes: of the model's ``state_dict``.
        max_latency: seconds of one call of the model on the batch.
    """

    max_drop: float | None = None
    max_bytes: int | None = None
    max_latency: float | None = None


@dataclass(frozen=True)
class Choice:
    """One thing that a group of layers can get.

    Args:
        label: its short name, the same for all groups.
        recipe: of the layers; ``None`` leaves them float.
        damage: see the module.
        bytes: of the layers' state.
        seconds: of the layers' calls in the batch; ``None`` where no latency was asked for.
    """

    label: str
    recipe: LayerRecipe | None
    damage: float
    bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class Group:
    """Layers that get the same: one layer, or several that share a weight."""

    layers: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Pair:
    """A layer and a choice, whose damage was measured: the model run with this layer changed."""

    layer: str
    label: str
    estimated: float
    measured: float


@dataclass(frozen=True)
class Check:
    """How well estimated damages agree with measured ones.

    Args:
        pairs: that were measured, spread over small and large damages.
        spearman: rank correlation; NaN where there are fewer than three pairs.
        ratio: median of measured / estimated.
        used: what the allocation was made with: the estimates, or, where they agreed badly, damages
            measured for every layer and choice.
    """

    pairs: tuple[Pair, ...]
    spearman: float
    ratio: float
    used: Literal["estimated", "measured"]


@dataclass(frozen=True)
class Point:
    """One allocation.

    Args:
        recipe: for :func:`zeropoint.quantize`, as it is.
        layers: label of a choice → how many layers have it.
        bytes: of the whole model's ``state_dict``.
        seconds: of one call of the model, predicted from measured layers; ``None`` where no latency
            was asked for. measured_seconds: the median of calls of the model itself.
        estimated_drop: what the search expected of the metric.
        search_drop: measured on the search data, by which points are chosen.
        comparison: of the float model with this one on held-out data.
    """

    recipe: Recipe
    layers: Mapping[str, int]
    bytes: int
    seconds: float | None
    measured_seconds: float | None
    estimated_drop: float
    search_drop: Estimate
    comparison: Comparison

    @property
    def measured(self) -> Estimate:
        """The drop on held-out data, with its interval."""
        return drop(self.comparison)


@dataclass(frozen=True)
class Front:
    """Everything between the smallest (or fastest) model and the float one; made by
    :func:`zeropoint.search`.

    Args:
        model: class name. metric: its name.
        budget: what was asked for. cost: what is traded against the drop.
        points: by ascending cost. Each has the least damage that its cost allows, but for single
            choices among them that dropped less on search data than all mixtures as cheap.
        uniform: one choice for all layers, each choice once, for comparison.
        chosen_index: of the point that meets the budget on held-out data at the least cost; where
            no drop is limited, of the one within the budget that dropped least on search data.
        certain_index: of the boldest point that is certain to keep ``max_drop`` at ``level``: its
            interval and those of all more careful points end below it. Going from careful to bold
            and stopping at the first that fails keeps the risk of a wrong claim at that of one test
            (fixed-sequence testing, Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052).
        skipped: cheaper points that held on search data, and did not on held-out data.
        groups: the layers, with what each choice costs them.
        check: of the estimates.
        samples: part of the data → how many samples it holds.
        float_bytes, float_seconds: of the float model.
        left: name → reason of Linear layers that no choice fits.
        level: of the intervals. seed: of all that is random.
        evaluations: how often a model ran over the search or the held-out data.
        elapsed: seconds that the search took.
        calibration: the batches that static choices were calibrated with: ``quantize(model,
            front.recipe, calibration=front.calibration)``. Not part of the JSON.
    """

    model: str
    metric: str
    budget: Budget
    cost: Cost
    points: tuple[Point, ...]
    uniform: tuple[Point, ...]
    chosen_index: int | None
    certain_index: int | None
    skipped: int
    groups: tuple[Group, ...]
    check: Check
    samples: Mapping[str, int]
    float_bytes: int
    float_seconds: float | None
    left: Mapping[str, str]
    level: float
    seed: int
    evaluations: int
    elapsed: float
    calibration: Any = field(default=None, repr=False, compare=False)

    @property
    def chosen(self) -> Point | None:
        """The point that meets the budget; ``None`` where none does, or none was asked for."""
        return None if self.chosen_index is None else self.points[self.chosen_index]

    @property
    def certain(self) -> Point | None:
        """The boldest point that is certain to keep ``max_drop``; ``None`` without a limit."""
        return None if self.certain_index is None else self.points[self.certain_index]

    @property
    def recipe(self) -> Recipe:
        """The chosen point's.

        Raises:
            ValueError: no point meets the budget; the message says how near they come.
        """
        if self.chosen is None:
            raise ValueError(self.verdict)
        return self.chosen.recipe

    @property
    def verdict(self) -> str:
        """A few sentences for someone who reads nothing else."""
        from .table import verdict

        return verdict(self)

    def within(
        self,
        max_drop: float | None = None,
        max_bytes: int | None = None,
        max_latency: float | None = None,
        *,
        certain: bool = False,
    ) -> Front:
        """The same front, with the point that meets another budget chosen. Nothing is run.

        The points lie where the first budget put them; a search for this one may find another that
        comes nearer to it.
        """
        from .budgets import certain as find_certain
        from .budgets import choose

        budget = Budget(max_drop, max_bytes, max_latency)
        boldest = find_certain(self.points, budget)
        chosen, skipped = choose(self.points, budget, boldest if certain else 0)
        return replace(
            self, budget=budget, chosen_index=chosen, certain_index=boldest, skipped=skipped
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, as :func:`schema` describes them."""
        content = plain_fields(self, {Point: ("measured",)}, leave=("calibration",))
        return {"schema_version": SCHEMA_VERSION, "verdict": self.verdict, **content}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Front:
        """The inverse of :meth:`to_dict`; unknown fields are ignored.

        Raises:
            ValueError: another schema version, or a field that is missing or of the wrong type.
        """
        return read("front", SCHEMA_VERSION, data, _front)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON text, also written to ``path`` (atomically) where one is given."""
        text = to_text(self.to_dict())
        if path is not None:
            write_text(path, text)
        return text

    def __rich__(self) -> Any:
        from .table import View

        return View(self)

    def __str__(self) -> str:
        from ..terminal import plain_text

        return plain_text(self)


def drop(c: Comparison) -> Estimate:
    """``before − after`` with its interval."""
    x = c.change
    return Estimate(0.0 - x.value, 0.0 - x.high, 0.0 - x.low, x.n, x.level, x.method)


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of :meth:`Front.to_dict`."""
    return schema_of(__package__)


def _point(d: Mapping[str, Any]) -> Point:
    return made(
        Point,
        d,
        recipe=Recipe.from_dict(d["recipe"]),
        layers=dict(d["layers"]),
        estimated_drop=number(d["estimated_drop"]),
        search_drop=Estimate.from_dict(d["search_drop"]),
        comparison=Comparison.from_dict(d["comparison"]),
    )


def _choice(d: Mapping[str, Any]) -> Choice:
    recipe = d["recipe"]
    return made(Choice, d, recipe=None if recipe is None else LayerRecipe.from_dict(recipe))


def _front(d: Mapping[str, Any]) -> Front:
    check = d["check"]
    return made(
        Front,
        d,
        budget=made(Budget, d["budget"]),
        points=tuple(_point(p) for p in d["points"]),
        uniform=tuple(_point(p) for p in d["uniform"]),
        groups=tuple(
            Group(tuple(g["layers"]), tuple(_choice(c) for c in g["choices"])) for g in d["groups"]
        ),
        check=Check(
            tuple(made(Pair, p) for p in check["pairs"]),
            number(check["spearman"]),
            number(check["ratio"]),
            check["used"],
        ),
        samples=dict(d["samples"]),
        left=dict(d["left"]),
        calibration=None,
    )
