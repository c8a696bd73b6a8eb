"""A report says how sure its numbers are, and whether a change is one."""

from __future__ import annotations

import json
import sys

import jsonschema
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from twins import chain, fast, quantized
from zeropoint import QuantizedLinear, Report
from zeropoint.report import schema
from zeropoint.running import cosines


def scored(before: list[float], after: list[float]) -> Report:
    model = chain()

    def accuracy(m: nn.Module) -> list[float]:
        return after if any(isinstance(x, QuantizedLinear) for x in m.modules()) else before

    return fast(model, quantized(model), [torch.randn(30, 12)], accuracy)


def test_scores_of_samples_give_intervals_and_a_verdict() -> None:
    report = scored([1.0] * 97 + [0.0] * 3, [1.0] * 95 + [0.0] * 5)
    assert report.metric is not None
    assert (report.metric.before, report.metric.after) == (0.97, 0.95)
    c = report.metric.comparison
    assert c is not None
    assert c.before.low < 0.97 < c.before.high
    assert c.change.low < -0.02 < 0 < c.change.high
    assert "goes from 0.97 to 0.95: not significant at 100 samples" in report.verdict
    assert "about 389 would settle it" in " ".join(str(report).split())


def test_a_change_that_is_one_is_called_so() -> None:
    report = scored([1.0] * 100, [1.0] * 80 + [0.0] * 20)
    assert "goes from 1 to 0.8: significant at 100 samples (p < 0.001)" in report.verdict


@pytest.mark.parametrize("scores", [[1.0, 0.0, 1.0], [0.5, float("nan"), 0.1], 0.75])
def test_json_and_back(scores: list[float]) -> None:
    report = scored(scores, scores)
    data = json.loads(report.to_json())
    jsonschema.validate(data, schema())
    for where in (data["outputs"]["cosine"], (data["metric"]["comparison"] or {}).get("change")):
        if where is not None:
            assert set(where) == set(schema()["$defs"]["estimate"]["properties"])
    assert Report.from_dict(data).to_json() == report.to_json()
    assert str(Report.from_dict(data)) == str(report)


def test_reports_written_before_intervals_are_read() -> None:
    data = json.loads(scored([1.0, 0.0], [1.0, 0.0]).to_json())
    del data["outputs"]["cosine"], data["metric"]["comparison"]
    report = Report.from_dict(data)
    assert report.outputs.cosine is None
    assert report.metric is not None
    assert report.metric.comparison is None


def test_other_number_of_scores() -> None:
    with pytest.raises(ValueError, match="got 2 scores of float_model and 3 of quantized_model"):
        scored([1.0, 1.0], [1.0, 1.0, 0.0])


def test_a_sample_is_an_index_of_dimension_0() -> None:
    # 4 samples of 50 vectors each, alike within a sample: 200 vectors say no more than 4 samples.
    class Model(nn.Module):
        def __init__(self, y: Tensor) -> None:
            super().__init__()
            self.y = y

        def forward(self, x: Tensor) -> Tensor:
            return self.y

    y = torch.tensor([1.0, 0.0]).expand(4, 50, 2)
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4])
    other = torch.stack([angles.cos(), angles.sin()], 1)[:, None].expand(4, 50, 2)
    found = fast(Model(y), Model(other), [y]).outputs.cosine
    assert found is not None
    assert found.n == 4
    assert found.value == pytest.approx(float(angles.cos().mean()))
    assert found.high - found.low > float(angles.cos().std())
    jagged = fast(Model(y), Model(other.masked_fill(other > 0.99, torch.nan)), [y]).outputs
    assert jagged.cosine is not None
    assert (jagged.vectors, jagged.cosine.n) == (150, 3)


def test_equal_models_have_no_interval_of_luck() -> None:
    # Cosines that are all 1 are no coin flips.
    model = nn.Sequential(nn.ReLU())
    found = fast(model, nn.Sequential(nn.ReLU()), [torch.randn(30, 12)]).outputs.cosine
    assert found is not None
    assert found.low > 1 - 1e-12


def test_without_scipy_the_table_says_why_there_are_no_intervals(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    report = scored([1.0, 0.0], [1.0, 1.0])
    assert report.outputs.cosine is None
    assert report.metric is not None
    assert report.metric.comparison is None
    text = " ".join(str(report).split())
    assert "No intervals: they need scipy, pip install 'zeropoint[search]'" in text


def test_cosines_by_sample() -> None:
    y = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [torch.inf, 0.0]]])
    other = torch.tensor([[[4.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])
    found = cosines(y, other).numpy()
    np.testing.assert_allclose(found, [[0.96, 1.0], [0.0, np.nan]])
    assert cosines(y[0, 0], other[0, 0]).shape == (1, 1)
