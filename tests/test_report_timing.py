"""Latency: in turn, within a budget, layers within their model."""

from __future__ import annotations

import jsonschema
import torch
from torch import Tensor, nn

from twins import chain, fast, quantized
from zeropoint import compare
from zeropoint.report import schema


class Recorder(nn.Module):
    def __init__(self, log: list[str], name: str) -> None:
        super().__init__()
        self.log, self.name = log, name

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        return x


def test_models_take_turns() -> None:
    log: list[str] = []
    report = compare(Recorder(log, "f"), Recorder(log, "q"), [torch.ones(1)], repeats=5)
    assert report.latency[0].before.repeats == report.latency[0].after.repeats == 5
    # the data, two rounds of warm-up, then turns that alternate in who goes first
    assert "".join(log).startswith("fq" + "fqfq" + "fqqffqqffq")


def test_budget_bounds_the_repeats() -> None:
    log: list[str] = []
    model, twin = Recorder(log, "f"), Recorder(log, "q")
    batches = {"a": torch.ones(1), "b": torch.ones(2, 3)}
    report = compare(model, twin, [torch.ones(1)], timing=batches, repeats=10**6, time_budget=0)
    assert [(x.name, x.before.repeats) for x in report.latency] == [("a", 1), ("b", 1)]
    assert report.latency[1].inputs == "2×3 float32"


def test_layers_are_timed_within_the_model() -> None:
    model = chain()
    report = compare(model, quantized(model), [torch.randn(64, 12)], repeats=3)
    total = report.latency[0].before.median
    for x in report.layers:
        assert x.seconds_before is not None
        assert x.seconds_after is not None
        assert 0 < x.seconds_before < 100 * total
    assert report.latency[0].before.q1 <= total <= report.latency[0].before.q3


def test_nothing_timed() -> None:
    model = chain()
    report = fast(model, quantized(model), [torch.randn(2, 12)])
    assert report.latency == ()
    assert report.layers[0].seconds_before is None
    assert "Latency" not in str(report)
    jsonschema.validate(report.to_dict(), schema())
