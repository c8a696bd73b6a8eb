"""What compare measures, against definitions computed another way."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from torch import Tensor, nn

from twins import Function, chain, fast, quantized, sqnr
from zeropoint import Linear, QuantizedLinear, Report, compare
from zeropoint.report import model_bytes, schema


def test_sqnr_alone_and_accumulated_as_defined() -> None:
    model, data = chain(), [torch.randn(5, 12), torch.randn(3, 7, 12)]
    twin = quantized(model)
    report = fast(model, twin, data)
    x = torch.cat([b.reshape(-1, 12) for b in data])
    with torch.no_grad():
        hidden, running = model[0](x), twin[0](x)
        first, second = report.layers
        assert [first.name, second.name] == ["0", "2"]
        # Torch's float products differ in their last bits by the size of the batch.
        assert first.alone.sqnr_db == pytest.approx(sqnr(hidden, running), rel=1e-6)
        assert first.accumulated == first.alone
        hidden, running = hidden.relu(), running.relu()
        y = model[2](hidden)
        assert second.alone.sqnr_db == pytest.approx(sqnr(y, twin[2](hidden)), rel=1e-6)
        assert second.accumulated.sqnr_db == pytest.approx(sqnr(y, twin[2](running)), rel=1e-6)
        assert second.alone.noise_power != second.accumulated.noise_power
        largest = (y - twin[2](running)).abs().max()
        assert second.accumulated.max_abs_error == pytest.approx(float(largest), rel=1e-5)
        assert report.outputs.difference == second.accumulated
        cosine = torch.cosine_similarity(y.double(), twin[2](running).double(), dim=-1)
    assert report.outputs.cosine_mean == pytest.approx(float(cosine.mean()), abs=1e-9)
    assert report.outputs.cosine_min == pytest.approx(float(cosine.min()), abs=1e-9)
    assert report.outputs.vectors == len(x)
    assert report.batches == 2


def test_weight_difference_is_of_the_weights_alone() -> None:
    layer = Linear(32, 16)
    twin = QuantizedLinear.from_linear(layer)
    report = fast(layer, twin, [torch.randn(2, 32)])
    expected = sqnr(layer.weight.detach(), twin.dequantize().weight.detach())
    assert report.layers[0].weight.sqnr_db == pytest.approx(expected, rel=1e-9)
    assert report.layers[0].label == "(model)"


def test_output_changed_in_place_after_the_layer() -> None:
    model = nn.Sequential(Linear(6, 6), nn.ReLU(inplace=True))
    report = fast(model, quantized(model), [torch.randn(40, 6)])
    # Against an output that ReLU overwrote, half the elements would differ by their magnitude.
    assert report.layers[0].accumulated == report.layers[0].alone


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = chain(), [torch.randn(50, 12)]
    whole = fast(model, quantized(model), data)
    monkeypatch.setattr("zeropoint.report.sums._CHUNK", 7)
    parts = fast(model, quantized(model), data)
    assert parts.outputs.vectors == whole.outputs.vectors
    assert parts.outputs.cosine_min == whole.outputs.cosine_min
    for a, b in zip(parts.layers, whole.layers, strict=True):
        assert a.alone.noise_power == pytest.approx(b.alone.noise_power, rel=1e-12)
        assert a.alone.elements == b.alone.elements


def exact_pair() -> tuple[nn.Module, nn.Module]:
    layer = Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127.0, 1, -3, 0], [-127.0, 64, 2, 5]]))
    return layer, QuantizedLinear.from_linear(layer, "weight-only")


def test_exact_layer_is_infinite_and_survives_json() -> None:
    report = fast(*exact_pair(), [torch.ones(3, 4)])
    assert report.layers[0].alone.sqnr_db == math.inf
    assert report.outputs.difference.exact
    data = json.loads(report.to_json())
    assert data["layers"][0]["alone"]["sqnr_db"] is None
    assert data["layers"][0]["alone"]["exact"] is True
    assert Report.from_dict(data).layers[0].alone.sqnr_db == math.inf
    assert "exactly the same outputs" in report.verdict
    assert "exact" in str(report)
    assert report.worst(3) == []


def test_nan_and_inf_are_counted_and_summed_nowhere() -> None:
    layer = Linear(8, 4)
    x = torch.randn(3, 8)
    x[1, 0] = math.inf  # dynamic: the row is NaN; float: it is infinite
    report = fast(layer, QuantizedLinear.from_linear(layer), [x])
    d = report.layers[0].alone
    assert d.non_finite == 4
    assert d.elements == 12
    assert 20 < d.sqnr_db < math.inf
    assert report.outputs.vectors == 2
    assert "NaN or infinite" in report.verdict
    jsonschema.validate(json.loads(report.to_json()), schema())


def test_same_infinities_on_both_sides_are_no_error() -> None:
    model = Function(lambda y: torch.where(y > 0, torch.inf, torch.zeros_like(y)))
    report = fast(model, quantized(model, "weight-only"), [torch.randn(4, 8)])
    assert report.outputs.difference.non_finite == 0


def test_nothing_finite() -> None:
    layer = Linear(8, 4)
    report = fast(layer, QuantizedLinear.from_linear(layer), [torch.full((2, 8), math.inf)])
    assert math.isnan(report.outputs.cosine_mean)
    assert math.isnan(report.layers[0].alone.sqnr_db) == (report.layers[0].alone.non_finite == 8)
    again = Report.from_dict(json.loads(report.to_json()))
    assert math.isnan(again.outputs.cosine_mean)
    str(again)


def test_layer_called_twice_in_one_pass() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = Twice()
    report = fast(model, quantized(model), [torch.randn(5, 6)] * 2)
    assert report.layers[0].alone.elements == 2 * 2 * 30
    assert report.layers[0].accumulated.elements == 2 * 2 * 30
    assert report.layers[0].accumulated.skipped_calls == 0


def test_layer_never_called() -> None:
    model = nn.ModuleDict({"used": Linear(4, 4), "unused": Linear(4, 4)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    twin = nn.ModuleDict({k: QuantizedLinear.from_linear(v) for k, v in model.items()})
    twin.forward = lambda x: twin["used"](x)  # type: ignore[method-assign]
    report = compare(model, twin, [torch.randn(2, 4)], repeats=1)
    unused = report.layers[1]
    assert math.isnan(unused.alone.sqnr_db)
    assert unused.seconds_before is None
    assert "not run" in str(report)
    jsonschema.validate(report.to_dict(), schema())


def test_rows_routed_elsewhere_are_skipped_not_compared() -> None:
    class Routed(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.expert = Linear(4, 4)
            self.rows = rows

        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            y[: self.rows] = self.expert(x[: self.rows])
            return y

    model = Routed(3)
    twin = quantized(model)
    twin.rows = 2  # type: ignore[assignment]
    report = fast(model, twin, [torch.randn(5, 4)])
    assert report.layers[0].accumulated.skipped_calls == 1
    assert report.layers[0].accumulated.elements == 0
    assert report.layers[0].alone.elements == 12
    assert "not comparable" in str(report)


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_low_precision_model(mode: str) -> None:
    model = chain().to(torch.bfloat16)
    report = fast(model, quantized(model, mode), [torch.randn(9, 12, dtype=torch.bfloat16)])
    assert report.layers[0].bytes_before == 12 * 24 * 2
    assert report.layers[0].alone.sqnr_db > 25


def test_static_layers() -> None:
    layer = Linear(16, 4)
    x = torch.rand(30, 16)
    twin = QuantizedLinear.from_linear(
        layer, "static", input_qparams=(1 / 255, 0), output_qparams=(0.01, 128)
    )
    assert fast(layer, twin, [x]).layers[0].alone.sqnr_db > 30


# Metric, bytes, left layers


def test_metric_of_both_models() -> None:
    model = chain()
    twin = quantized(model)

    def accuracy(m: nn.Module) -> Tensor:
        return torch.tensor(0.9 if m is model else 0.8)

    report = fast(model, twin, [torch.randn(2, 12)], accuracy)
    assert report.metric is not None
    assert report.metric.name == "accuracy"
    assert (report.metric.before, report.metric.after) == pytest.approx((0.9, 0.8))
    assert "accuracy goes from 0.9 to 0.8" in report.verdict
    assert fast(model, twin, [torch.randn(2, 12)], lambda m: math.nan).metric.name == "metric"


def test_bytes_with_tied_weights_counted_once() -> None:
    a, b = Linear(8, 8, bias=False), Linear(8, 8, bias=False)
    b.weight = a.weight
    assert model_bytes(nn.Sequential(a, b)) == 8 * 8 * 4
    report = fast(nn.Sequential(Linear(8, 4)), quantized(nn.Sequential(Linear(8, 4))), [a.weight])
    assert report.bytes_before == (8 * 4 + 4) * 4
    assert report.bytes_after == 8 * 4 + (4 + 4 + 4) * 4
    assert report.layers[0].bytes_before == 8 * 4 * 4
    assert report.layers[0].bytes_after == 8 * 4 + (4 + 4) * 4


def test_left_layers_with_and_without_reasons() -> None:
    model = chain()
    twin = quantized(model, keep=("2",))
    data = [torch.randn(2, 12)]
    assert fast(model, twin, data).left == {"2": ""}
    twin.quantization = SimpleNamespace(left={"2": "too small"})  # type: ignore[assignment]
    report = fast(model, twin, data)
    assert report.left == {"2": "too small"}
    assert "too small" in str(report)


def test_model_without_quantized_layers_is_compared_as_a_whole() -> None:
    model = chain()
    report = fast(model, copy.deepcopy(model).bfloat16().float(), [torch.randn(3, 12)])
    assert report.layers == ()
    assert 30 < report.outputs.difference.sqnr_db < 70
