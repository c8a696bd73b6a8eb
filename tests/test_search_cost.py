"""Latency is what kernels were measured to take, and the budget of time is kept by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeropoint
from zeropoint import LayerRecipe, Linear, QuantSpec, search
from zeropoint.plan import Plan, ShapePlan, Time
from zeropoint.search import cost, find
from zeropoint.search import front as front_module
from zeropoint.search.candidates import build, label_choices

FOUR = LayerRecipe("weight-only", QuantSpec(4, False, False, zeropoint.spec.PerGroup(8)))


@pytest.fixture
def slow_dynamic(monkeypatch) -> None:
    """A machine on which each form takes so many microseconds a call."""
    times = {"float": 100.0, "int8-weight-only": 40.0, "int8-dynamic": 25.0, "int8-static": 20.0}

    def plan(model, batch, *, include, seconds, progress):
        shapes = tuple(
            ShapePlan(
                *(8, 8, True, "float32", ((len(batch), 1),), (name.replace("[[]", "["),)),
                {form: Time(t, t, t) for form, t in times.items()},
                *("int8-dynamic", "it is so"),
            )
            for name in include
        )
        return Plan(shapes, {}, 1, "none", ())

    monkeypatch.setattr(cost, "plan", plan)
    monkeypatch.setattr(find, "model_seconds", lambda *_: 320e-6)
    monkeypatch.setattr(front_module, "relative_seconds", relative)


def relative(model: nn.Module, other: nn.Module, batch: object, seconds: float) -> float:
    took = {"weight-only": 40.0, "dynamic": 25.0, "static": 20.0}
    modes = [m.mode for m in other.modules() if isinstance(m, zeropoint.QuantizedLinear)]
    return (320 - sum(100 - took[mode] for mode in modes)) / 320


def model() -> nn.Sequential:
    return nn.Sequential(*(Linear(8, 8) for _ in range(3))).eval()


def found(**arguments) -> zeropoint.Front:
    data = [torch.randn(60, 8)]
    choices = ("int8-weight-only", "int8-dynamic", "int8-static")
    arguments = {"choices": choices, "points": 5, "checks": 3, "seconds": 0.01, **arguments}
    return search(model(), data, progress=False, **arguments)


def test_the_budget_of_time_is_kept(slow_dynamic: None) -> None:
    front = found(max_latency=200e-6)
    assert front.cost == "seconds"
    assert front.float_seconds == pytest.approx(320e-6)
    p = front.chosen
    assert p is not None
    assert p.seconds <= 200e-6
    assert p.seconds == pytest.approx(p.measured_seconds)  # the machine adds up
    seconds = [p.seconds for p in front.points]
    assert seconds == sorted(seconds)
    assert seconds[0] == pytest.approx(80e-6)
    assert "a call" in str(front)
    assert "keeps at most 200 µs a call at" in front.verdict


def test_too_fast_for_any_point(slow_dynamic: None) -> None:
    front = found(max_latency=50e-6)
    assert front.chosen is None
    assert "No point keeps at most 50.0 µs a call." in front.verdict
    assert "The fastest takes 80.0 µs a call." in front.verdict


def test_size_is_limited_too(slow_dynamic: None) -> None:
    front = found(max_latency=200e-6, max_bytes=600, cost="seconds")
    assert all(p.bytes <= 600 for p in front.points)
    assert front.chosen is not None
    impossible = found(max_latency=200e-6, max_bytes=10, cost="seconds")
    assert impossible.points == ()
    assert impossible.verdict == "No allocation keeps at most 10 bytes and at most 200 µs a call."
    assert "No allocation" in str(impossible)


def test_drop_against_time(slow_dynamic: None) -> None:
    front = found(max_drop=2e-5, cost="seconds")
    p = front.chosen
    assert p is not None
    assert p.measured.value <= 2e-5
    assert p.measured_seconds < front.float_seconds
    for bolder in front.points[: front.chosen_index]:
        assert bolder.seconds <= p.seconds
        assert max(bolder.search_drop.value, bolder.measured.value) > 2e-5


def test_forms_that_the_plan_does_not_know_are_timed_beside_float(
    slow_dynamic: None, monkeypatch
) -> None:
    def in_turn(calls, seconds):
        for call in calls.values():
            assert call().shape == (4, 8)
        return {label: [2.0] if label == "float" else [3.0] for label in calls}

    monkeypatch.setattr(cost, "interleave", in_turn)
    net = model()
    candidates = build(net, label_choices(["int8-dynamic", FOUR]), [], None, None, False)
    seconds = cost.group_seconds(net, torch.randn(4, 8), candidates, 0.01, False)
    assert [set(row) for row in seconds] == [{"int8-dynamic", "uint4 g8 weight-only", "float"}] * 3
    for row in seconds:
        assert row["float"] == pytest.approx(100e-6)
        assert row["int8-dynamic"] == pytest.approx(25e-6)
        assert row["uint4 g8 weight-only"] == pytest.approx(150e-6)  # 3 / 2 of the plan's float


def test_measured_for_real() -> None:
    net, x = model(), torch.randn(4, 8)
    candidates = build(net, label_choices(["int8-dynamic"]), [], None, None, False)
    for row in cost.group_seconds(net, x, candidates, 0.01, False):
        assert all(1e-8 < t < 1 for t in row.values())
    assert 1e-8 < cost.model_seconds(net, x, 0.001) < 1
    assert 0.1 < cost.relative_seconds(net, net, x, 0.01) < 10
