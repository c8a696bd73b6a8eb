"""A search keeps its budget on held-out data, spares what is sensitive, and repeats itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import zeropoint
from quick_search import FOUR, INT8, batches, mlp, needed_by, quick
from zeropoint import quantize
from zeropoint.running import model_bytes
from zeropoint.search import FLOAT, Front, schema, search


@pytest.fixture(autouse=True, scope="module")
def _quick_intervals() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zeropoint.statistics.RESAMPLES", 499)
        yield


@pytest.fixture(scope="module")
def front() -> Front:
    return quick(mlp(), batches(), max_drop=2e-6)


# Budgets


def test_the_drop_is_kept_on_held_out_data(front: Front) -> None:
    assert front.chosen is not None
    assert front.chosen.measured.value <= 2e-6
    assert front.chosen.bytes < front.float_bytes
    # Not by being more careful than it must: the next bolder one loses too much.
    bolder = front.points[: front.chosen_index]
    assert bolder
    assert all(max(p.search_drop.value, p.measured.value) > 2e-6 for p in bolder)


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_the_size_is_kept_to_the_byte(share: float) -> None:
    model = mlp()
    limit = round(share * model_bytes(model))
    found = quick(model, batches(), max_bytes=limit)
    assert found.chosen is not None
    assert found.chosen.bytes <= limit
    quantized = quantize(model, found.recipe, calibration=needed_by(found.chosen, found))
    assert model_bytes(quantized) == found.chosen.bytes


def test_every_point_has_the_bytes_it_says(front: Front) -> None:
    model = mlp()
    for p in (*front.points, *front.uniform):
        made = quantize(model, p.recipe, calibration=needed_by(p, front))
        assert model_bytes(made) == p.bytes
        assert sum(p.layers.values()) == 3


def test_no_point_keeps_the_budget_and_it_says_so() -> None:
    found = quick(mlp(), batches(), max_bytes=1000)
    assert found.chosen is None
    with pytest.raises(
        ValueError, match=r"No point keeps at most 1.00 kB. The most careful one has"
    ):
        found.recipe  # noqa: B018
    assert "No point keeps" in str(found)


def test_without_a_budget_there_is_a_front_and_no_choice() -> None:
    found = quick(mlp(), batches())
    assert found.chosen is None
    assert len(found.points) >= 3
    assert "no budget was given" in found.verdict


def test_the_front_is_monotone(front: Front) -> None:
    sizes = [p.bytes for p in front.points]
    drops = [p.estimated_drop for p in front.points]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 4
    assert drops == sorted(drops, reverse=True)
    assert front.points[-1].layers == {FLOAT: 3}
    assert front.points[-1].measured.high == 0


def test_single_choices_that_measured_better_are_on_the_front(front: Front) -> None:
    # Where the estimates were too hopeful, what was measured on search data counts.
    for u in front.uniform:
        as_cheap = [p.search_drop.value for p in front.points if p.bytes <= u.bytes]
        assert min(as_cheap) <= u.search_drop.value


def test_uniform_allocations_are_never_expected_to_be_better(front: Front) -> None:
    assert len(front.uniform) == 3
    for u in front.uniform:
        same = [p for p in front.points if p.bytes <= u.bytes]
        assert min(p.estimated_drop for p in same) <= u.estimated_drop


def test_another_budget_chooses_another_point_of_the_same_front(front: Front) -> None:
    bold = front.within(max_drop=1.0)
    assert bold.chosen_index == 0
    assert bold.points is front.points
    assert front.within(max_bytes=front.points[1].bytes).chosen in front.points[:2]
    assert front.within().chosen is None
    assert front.within(max_drop=2e-6) == front


def test_by_default_four_bits_are_a_choice() -> None:
    found = search(mlp(), batches(100), max_drop=1.0, points=1, checks=0, progress=False)
    assert {label for p in found.uniform for label in p.layers} == {*INT8, *FOUR}
    assert found.chosen is not None
    assert set(found.chosen.layers) <= set(FOUR)


# What is sensitive


def test_a_planted_sensitive_layer_is_kept_careful() -> None:
    model = mlp()
    with torch.no_grad():  # one weight a hundred times the others: its channel's steps are coarse
        model[2].weight[:, 0] *= 200
        model[0].weight[0] /= 200
        model[0].bias[0] /= 200
    found = quick(model, batches(), max_drop=1e-4, points=8)
    damage = {
        g.layers[0]: max(c.damage for c in g.choices if c.label == "int8-weight-only")
        for g in found.groups
    }
    assert damage["2"] > 20 * max(damage["0"], damage["4"])
    p = found.chosen
    assert p is not None
    assert p.layers[FLOAT] == 1
    assert "2" not in dict(p.recipe.overrides)
    assert p.measured.value <= 1e-4


def test_estimates_are_checked_and_replaced_where_they_are_wrong(monkeypatch) -> None:
    from zeropoint.search import sensitivities

    model = mlp()
    assert quick(model, batches(), checks=9).check.used == "estimated"
    honest = sensitivities.estimate

    def upside_down(*args, **kwargs):
        damages, called = honest(*args, **kwargs)
        return {n: {x: 1e-9 / d for x, d in row.items()} for n, row in damages.items()}, called

    monkeypatch.setattr(sensitivities, "estimate", upside_down)
    found = quick(model, batches(), checks=9)
    assert found.check.spearman < 0
    assert found.check.used == "measured"
    for g in found.groups:
        for c in g.choices:
            if c.label != FLOAT:
                pair = next(
                    (p for p in found.check.pairs if (p.layer, p.label) == (*g.layers, c.label)),
                    None,
                )
                assert pair is None or c.damage == max(0.0, pair.measured)


def test_no_gradient_is_no_obstacle() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.body(x)

    found = quick(Cut().eval(), batches(), max_drop=1e-4)
    assert found.chosen is not None
    assert found.chosen.measured.value <= 1e-4
    assert all(c.damage > 0 for g in found.groups for c in g.choices if c.label != FLOAT)


# Metrics


def test_scores_on_search_data_decide_and_those_on_held_out_data_are_reported() -> None:
    model, data = mlp(), batches()
    x = torch.cat(data)
    labels = model(x).argmax(1)
    calls = []

    def accuracy(m: nn.Module) -> Tensor:
        calls.append(m)
        return m(x).argmax(1) == labels

    found = quick(model, data, accuracy, max_drop=0.05)
    p = found.chosen
    assert p is not None
    assert found.metric == "accuracy"
    every = {q.recipe for q in (*found.points, *found.uniform)}
    assert len(calls) == len(every)  # each allocation is run once, the float model too
    assert p.comparison.before.value == 1
    assert (p.search_drop.n, p.measured.n) == (found.samples["search"], found.samples["evaluation"])
    quantized = quantize(model, p.recipe, calibration=needed_by(p, found))
    held_out = (quantized(x).argmax(1) == labels)[
        zeropoint.splits.split(data).indices["evaluation"]
    ]
    assert p.comparison.after.value == pytest.approx(float(held_out.double().mean()))


def test_a_metric_that_is_one_number_is_not_called_certain() -> None:
    model, data = mlp(), batches()
    x = torch.cat(data)
    y = model(x).detach()
    found = quick(model, data, lambda m: -float((m(x) - y).abs().max()), max_drop=0.05)
    p = found.chosen
    assert p is not None
    assert 0 < p.measured.value <= 0.05
    assert (p.measured.n, p.measured.high) == (1, math.inf)
    assert found.certain is None or found.certain.layers == {FLOAT: 3}
    jsonschema.validate(json.loads(found.to_json()), schema())


def test_too_few_samples_are_no_certainty() -> None:
    model, data = mlp(), batches(60)
    x = torch.cat(data)
    labels = model(x).argmax(1)

    def accuracy(m: nn.Module) -> Tensor:
        return m(x).argmax(1) == labels

    found = quick(model, data, accuracy, max_drop=0.01)
    assert found.chosen is not None
    assert "At 95% that is not certain with 30 samples" in found.verdict
    careful = quick(model, data, accuracy, max_drop=0.01, certain=True)
    assert careful.chosen is not None
    assert careful.chosen.layers == {FLOAT: 3}  # what alone is certain by so few


# The same again


def test_same_seed_same_front(front: Front) -> None:
    def content(f: Front) -> dict:
        return {k: v for k, v in f.to_dict().items() if k != "elapsed"}

    again = quick(mlp(), batches(), max_drop=2e-6)
    assert content(again) == content(front)
    other = quick(mlp(), batches(), max_drop=2e-6, seed=1)
    assert content(other)["points"] != content(front)["points"]


def test_held_out_samples_are_held_out() -> None:
    # What the search decides does not change with what held-out samples hold.
    model, data = mlp(), torch.cat(batches())
    held_out = zeropoint.splits.split([data]).indices["evaluation"]
    other = data.clone()
    other[torch.from_numpy(held_out)] = 5.0
    first, second = (quick(model, [x]) for x in (data, other))
    assert [p.recipe for p in first.points] == [p.recipe for p in second.points]
    assert [p.search_drop for p in first.points] == [p.search_drop for p in second.points]
    assert first.groups == second.groups
    assert first.points[0].measured != second.points[0].measured


# Forms


def test_json_follows_its_schema_and_comes_back(front: Front, tmp_path) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    path = tmp_path / "front.json"
    data = json.loads(front.to_json(path))
    assert json.loads(path.read_text()) == data
    jsonschema.validate(data, schema())
    assert set(data) == set(schema()["properties"])
    point = schema()["$defs"]["point"]["properties"]
    assert set(data["points"][0]) == set(point)
    again = Front.from_dict(data)
    assert again.to_dict() == data
    assert again == front
    assert str(again) == str(front)


@pytest.mark.parametrize("data", [{}, {"schema_version": 2}, {"schema_version": 1}, 3])
def test_what_is_no_front_is_refused(data) -> None:
    with pytest.raises(ValueError, match=r"schema_version|not a front"):
        Front.from_dict(data)


def test_the_table_tells_what_was_found(front: Front) -> None:
    text = str(front)
    assert text.startswith("Sequential keeps a drop of at most 2e-06 at")
    assert "held-out samples. That is certain at 95%." in " ".join(text.split())
    assert "▶" in text
    assert "rank correlation" in text
    for label in INT8:
        assert label in text
