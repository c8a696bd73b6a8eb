"""Which models, outputs and data compare takes, what it refuses, what it leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twins import Function, chain, fast, quantized, sqnr
from zeropoint import Linear, QuantizedLinear, compare
from zeropoint.report.timing import describe

# Outputs of models


@dataclass
class Answer:
    ids: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    "function",
    [
        lambda y: (torch.arange(3), y),
        lambda y: {"loss": y.sum(), "logits": y, "hidden": 2 * y},
        lambda y: Answer(torch.arange(3), y),
        lambda y: [{"nested": (None, "text", y)}],
    ],
    ids=["tuple", "loss first", "dataclass", "nested"],
)
def test_first_floating_tensor_with_a_dimension(function: Any) -> None:
    model, x = Function(function), torch.randn(3, 8)
    twin = quantized(model)
    with torch.no_grad():
        expected = sqnr(model.layer(x), twin.layer(x))  # type: ignore[operator]
    report = fast(model, twin, [x])
    assert report.outputs.difference.sqnr_db == pytest.approx(expected, rel=1e-9)


def test_output_callable_decides() -> None:
    model = Function(lambda y: {"a": y, "b": 3 * y[:, :2]})
    report = fast(model, quantized(model), [torch.randn(3, 8)], output=lambda o: o["b"])
    assert report.outputs.difference.elements == 6


def test_scalar_output() -> None:
    model = Function(lambda y: y.sum())
    report = fast(model, quantized(model), [torch.randn(3, 8)])
    assert report.outputs.difference.elements == 1
    assert report.outputs.vectors == 1


def test_no_floating_output() -> None:
    model = Function(lambda y: {"ids": y.argmax(-1)})
    with pytest.raises(TypeError, match=r"no floating-point tensor.*output="):
        fast(model, quantized(model), [torch.randn(3, 8)])


def test_outputs_of_other_shapes() -> None:
    model = Function(lambda y: y)
    twin = quantized(model)
    twin.function = lambda y: y[:1]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"\(3, 4\) from float_model and \(1, 4\)"):
        fast(model, twin, [torch.randn(3, 8)])


def test_cosine_of_zero_vectors_and_columns() -> None:
    class Rows(nn.Module):
        def __init__(self, y: Tensor) -> None:
            super().__init__()
            self.y = y

        def forward(self, x: Tensor) -> Tensor:
            return self.y

    y, other = torch.tensor([[0.0, 0], [0, 0], [3, 4]]), torch.tensor([[0.0, 0], [1, 0], [4, 3]])
    outputs = fast(Rows(y), Rows(other), [y]).outputs
    assert outputs.cosine_mean == pytest.approx((1 + 0 + 24 / 25) / 3)
    assert outputs.cosine_min == 0
    column = fast(Rows(y[:, :1]), Rows(other[:, :1]), [y]).outputs
    assert column.vectors == 1  # (0, 0, 3) against (0, 1, 4)
    assert column.cosine_mean == pytest.approx(12 / (3 * math.sqrt(17)))


# Data, modes, hooks


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 8),
        (torch.ones(2, 8), torch.tensor(2.0)),
        [torch.ones(2, 8)],
        {"x": torch.ones(2, 8), "scale": torch.tensor(2.0)},
    ],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_kinds_of_batches_from_a_generator(batch: Any) -> None:
    model = Function(lambda y: y)
    report = compare(model, quantized(model), (batch for _ in range(3)), repeats=1)
    assert report.batches == 3
    assert report.layers[0].alone.elements == 3 * 8
    assert report.latency[0].inputs == describe(batch)


@pytest.mark.parametrize("data", [torch.ones(2, 8), {"x": torch.ones(2, 8)}])
def test_one_batch_instead_of_data(data: Any) -> None:
    model = Function(lambda y: y)
    with pytest.raises(TypeError, match="data must be an iterable of batches"):
        fast(model, quantized(model), data)


def test_batch_of_a_wrong_type() -> None:
    model = Function(lambda y: y)
    with pytest.raises(TypeError, match=r"a batch must be a tensor.*got str"):
        fast(model, quantized(model), ["text"])


def test_no_data() -> None:
    model = chain()
    with pytest.raises(ValueError, match="at least one batch"):
        fast(model, quantized(model), [])


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_training_modes_and_hooks_are_restored(fails: bool) -> None:
    model = nn.Sequential(Linear(4, 4), nn.Dropout(0.5), Linear(4, 4))
    twin = quantized(model)
    for m in (model, twin):
        m.train()
        m[0].eval()  # type: ignore[index]
    before = [[x.training for x in m.modules()] for m in (model, twin)]

    def metric(m: nn.Module) -> float:
        assert not m.training
        if fails:
            raise RuntimeError("metric")
        return 1.0

    if fails:
        with pytest.raises(RuntimeError, match="metric"):
            fast(model, twin, [torch.randn(2, 4)], metric)
        with pytest.raises(RuntimeError):
            fast(model, twin, [torch.randn(2, 5)])
    else:
        report = compare(model, twin, [torch.randn(2, 4)], metric, repeats=1)
        assert report.layers[1].accumulated.sqnr_db > 20  # with dropout it would be about 0
    assert [[x.training for x in m.modules()] for m in (model, twin)] == before
    assert hooks(model) == hooks(twin) == 0
    assert all(p.grad is None for p in model.parameters())


def test_hooks_of_the_caller_run_once_a_pass() -> None:
    layer = Linear(4, 4)
    twin, calls = QuantizedLinear.from_linear(layer), []
    for m in (layer, twin):
        m.register_forward_hook(lambda m, *_: calls.append(m))
    fast(layer, twin, [torch.randn(2, 4)])
    assert calls == [layer, twin]


# Models that do not fit


def test_same_object_twice() -> None:
    model = chain()
    with pytest.raises(ValueError, match=r"same object.*inplace=False"):
        fast(model, model, [torch.randn(2, 12)])


def test_missing_and_mis_sized_layers() -> None:
    model, data = chain(), [torch.randn(2, 12)]
    twin = quantized(model)
    with pytest.raises(ValueError, match=r"Linear named '0'.*got a ReLU"):
        fast(nn.Sequential(nn.ReLU(), nn.ReLU(), Linear(12, 6)), twin, data)
    with pytest.raises(ValueError, match=r"Linear named '0'.*got nothing"):
        fast(nn.Sequential(), twin, data)
    with pytest.raises(ValueError, match=r"layer '2'.*\(6, 24\).*\(5, 24\)"):
        fast(nn.Sequential(Linear(12, 24), nn.ReLU(), Linear(24, 5)), twin, data)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"repeats": -1}, ValueError, "repeats"),
        ({"repeats": 2.5}, ValueError, "repeats"),
        ({"time_budget": -1.0}, ValueError, "time_budget"),
        ({"time_budget": math.nan}, ValueError, "time_budget"),
        ({"metric": lambda m: "good"}, TypeError, r"metric\(float_model\) must be a number"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type, match: str) -> None:
    model = chain()
    with pytest.raises(error, match=match):
        fast(model, quantized(model), [torch.randn(2, 12)], **arguments)


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"quantized_model must be a torch\.nn\.Module"):
        fast(chain(), "model", [])
