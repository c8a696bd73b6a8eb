"""A report with all that a page can show, for the tests of its forms."""

from __future__ import annotations

import torch
from torch import nn

from zeropoint import RECIPES, LayerRecipe, Linear, Recipe, Report, compare, quantize
from zeropoint.diagnose.numbers import (
    Cause,
    Damage,
    Diagnosis,
    ErrorSplit,
    LayerDiagnosis,
    OutlierChannel,
    Saturation,
)
from zeropoint.search.numbers import Budget, Check, Front, Point
from zeropoint.statistics import Estimate, paired

SICK = 3
"""The layer that has an outlier in one weight and one input channel."""


def report(layers: int = 12) -> Report:
    """Of a chain of Linear layers, the last of them left float."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Linear(32, 32) for _ in range(layers)), Linear(32, 4))
    with torch.no_grad():
        model[SICK].weight[2, 7] = 6.0
    twin = quantize(model, "int8-dynamic", exclude=str(layers))
    scores = torch.ones(24)
    return compare(model, twin, [torch.randn(6, 32)] * 2, lambda m: scores, repeats=3)


def damage(relative_error: float) -> Damage:
    return Damage(relative_error, 1 - relative_error**2 / 2, None, 1000, 0)


def diagnosis(r: Report) -> Diagnosis:
    """Two causes; the worse one is that of the layer ``SICK``."""
    recipe = LayerRecipe("dynamic")
    layers = tuple(
        LayerDiagnosis(
            name=x.name,
            in_features=x.in_features,
            out_features=x.out_features,
            recipe=recipe,
            calls=2,
            weight_sqnr_db=x.weight.sqnr_db,
            weights_only_sqnr_db=45.0,
            activations_only_sqnr_db=24.0,
            both_sqnr_db=x.alone.sqnr_db,
            only_this=damage(0.06 if n == SICK else 0.01),
            all_but_this=damage(0.05),
            noise_share=0.4 if n == SICK else 0.05,
            outliers=(OutlierChannel(7, 130.0, 61.2),) if n == SICK else (),
            outlier_count=int(n == SICK),
            weight_error=ErrorSplit(0.0, 1.0),
            activation_error=ErrorSplit(0.1, 0.9),
            saturation=Saturation(0.01, 0.02),
            bytes=1152,
            float_bytes=4096,
        )
        for n, x in enumerate(r.layers)
    )
    cure = LayerRecipe("weight-only")
    causes = (
        Cause(
            r.layers[SICK].name,
            "outlier-channels",
            "channel 7 is 61 times the median channel",
            cure,
            "activations stay float: 23.3 → 47.0 dB",
            damage(0.06),
            damage(0.004),
        ),
        Cause(
            r.layers[SICK + 2].name,
            "bad-range",
            "a few values take half of the range",
            None,
            "the layer stays float",
            damage(0.03),
            damage(0.0),
        ),
    )
    return Diagnosis(
        model=r.model,
        recipe=RECIPES["int8-dynamic"],
        batches=2,
        rows=12,
        samples=12,
        sample_batches=2,
        statistics_rows=12,
        damage_before=damage(0.07),
        damage_after=damage(0.01),
        metric=None,
        layers=layers,
        left=dict(r.left),
        causes=causes,
        suggestions=Recipe(LayerRecipe("dynamic"), ((r.layers[SICK].name, cure),)),
        evaluations=31.0,
        evaluation_seconds=0.01,
        seconds=0.4,
        notes=("A note.",),
    )


def point(size: int, layers: dict[str, int], lost: float, samples: int = 256) -> Point:
    before = torch.ones(samples)
    after = before.clone()
    after[: round(lost * samples)] = 0
    return Point(
        recipe=RECIPES["int8-dynamic"],
        layers=layers,
        bytes=size,
        seconds=None,
        measured_seconds=None,
        estimated_drop=0.8 * lost,
        search_drop=Estimate(lost, lost - 0.004, lost + 0.004, samples, 0.95, "t"),
        comparison=paired(before.numpy(), after.numpy()),
    )


def front(r: Report) -> Front:
    """Five points, the fourth of them chosen, the fifth certain; three of one choice for all."""
    points = (
        point(30_000, {"int4": 12}, 0.09),
        point(36_000, {"int4": 9, "int8": 3}, 0.05),
        point(41_000, {"int4": 5, "int8": 7}, 0.03),
        point(45_000, {"int4": 2, "int8": 10}, 0.012),
        point(55_000, {"int8": 12}, 0.004),
    )
    uniform = (
        point(33_000, {"int4 group 32": 12}, 0.08),
        point(55_000, {"int8": 12}, 0.004),
        point(180_000, {"float": 12}, 0.0),
    )
    return Front(
        model=r.model,
        metric="accuracy",
        budget=Budget(max_drop=0.02),
        cost="bytes",
        points=points,
        uniform=uniform,
        chosen_index=3,
        certain_index=4,
        skipped=0,
        groups=(),
        check=Check((), 0.93, 1.1, "estimated"),
        samples={"search": 256, "held-out": 256},
        float_bytes=180_000,
        float_seconds=None,
        left={},
        level=0.95,
        seed=0,
        evaluations=60,
        elapsed=12.0,
    )


def full(layers: int = 12) -> Report:
    """With diagnosis and front."""
    r = report(layers)
    return r.beside(diagnosis(r), front(r))
