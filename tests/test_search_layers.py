"""Which layers a search takes, which move together, which it leaves; and what it refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import zeropoint
from quick_search import INT8, batches, mlp, needed_by, quick
from zeropoint import LayerRecipe, Linear, QuantizedLinear, quantize
from zeropoint.running import cosines, model_bytes
from zeropoint.search import FLOAT
from zeropoint.search.candidates import label_choices


@pytest.fixture(autouse=True, scope="module")
def _quick_intervals() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zeropoint.statistics.RESAMPLES", 499)
        yield


# Models


def test_tied_layers_move_together_and_count_once() -> None:
    model = nn.Sequential(Linear(16, 16), nn.ReLU(), Linear(16, 16), nn.ReLU(), Linear(16, 8))
    model[2].weight = model[0].weight
    found = quick(model.eval(), batches(), max_bytes=model_bytes(model) // 2)
    assert [g.layers for g in found.groups] == [("0", "2"), ("4",)]
    for p in found.points:
        recipes = dict(p.recipe.overrides)
        assert recipes.get("0") == recipes.get("2")
        made = quantize(model, p.recipe, calibration=needed_by(p, found))
        assert model_bytes(made) == p.bytes


def test_a_weight_that_stays_for_others_saves_nothing() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            self.body, self.head = Linear(16, 16), Linear(16, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(self.embedding(x))))

    torch.manual_seed(0)
    model = Model().eval()
    data = list(torch.randint(0, 20, (200, 3)).split(50))
    found = quick(model, data, choices=["int8-dynamic"], include=iter(["body", "head"]))
    parts = zeropoint.splits.split(data)
    sizes = {g.layers[0]: {c.label: c.bytes for c in g.choices} for g in found.groups}
    assert sizes["head"][FLOAT] == 0 < sizes["head"]["int8-dynamic"]
    for p in found.points:
        patterns = [n for n, _ in p.recipe.overrides]
        made = quantize(model, p.recipe, include=patterns) if patterns else model
        assert model_bytes(made) == p.bytes
        with torch.inference_mode():
            held_out = [cosines(model(x), made(x)).mean(1) for x in parts.evaluation]
        assert p.measured.value == pytest.approx(1 - float(torch.cat(held_out).mean()), abs=1e-12)
    alone = quick(model, data, choices=["int8-dynamic"])
    assert list(alone.left) == ["head"]


def test_include_exclude_and_names_with_patterns() -> None:
    model = nn.ModuleDict({"a[0]": Linear(16, 16), "b*": Linear(16, 16)})
    model.forward = lambda x: model["b*"](model["a[0]"](x))  # type: ignore[method-assign]
    found = quick(model, batches(), exclude="b[*]", choices=["int8-dynamic"], max_bytes=1_900)
    assert [g.layers for g in found.groups] == [("a[0]",)]
    assert found.left == {"b*": "excluded by 'b[*]'"}
    made = quantize(model, found.recipe)
    assert isinstance(made["a[0]"], QuantizedLinear)
    assert not isinstance(made["b*"], QuantizedLinear)


def test_the_model_is_a_layer() -> None:
    layer = Linear(16, 8)
    found = quick(layer, batches(), choices=["int8-dynamic"], max_bytes=400)
    assert isinstance(quantize(layer, found.recipe), QuantizedLinear)
    assert "(model)" in str(found)


def test_layers_that_the_data_never_call_are_left() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = Linear(16, 8), Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    found = quick(Model(), batches(), choices=["int8-dynamic"])
    assert found.left == {"unused": "the search data never call it"}
    assert [g.layers for g in found.groups] == [("used",)]


def test_layers_without_effect_on_the_output_are_left() -> None:
    # Nothing tells how many bits they need: whoever needs them picks their output.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler = Linear(16, 16), Linear(16, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return h, self.pooler(h)

    found = quick(Model(), batches(), choices=["int8-dynamic"])
    assert found.left == {"pooler": "the output that is compared does not depend on it"}
    second = quick(Model(), batches(), choices=["int8-dynamic"], output=lambda y: y[1])
    assert [g.layers for g in second.groups] == [("body",), ("pooler",)]


def test_the_model_is_as_it_was() -> None:
    model = mlp().train()
    before = copy.deepcopy(model.state_dict())
    quick(model, batches(), max_drop=1e-4)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


# Arguments


def test_labels_are_short_and_tell_choices_apart() -> None:
    four = LayerRecipe("weight-only", zeropoint.spec.WEIGHT_INT4)
    static = LayerRecipe("static", observer="percentile")
    found = label_choices([*INT8, four, static, None, FLOAT])
    assert list(found) == [*INT8, "int4-weight-only", "int8 static percentile", FLOAT]
    bf16 = zeropoint.QuantSpec(4, False, False, zeropoint.spec.PerGroup(64), torch.bfloat16)
    fp32 = zeropoint.QuantSpec(4, False, False, zeropoint.spec.PerGroup(64))
    labels = label_choices([LayerRecipe("dynamic", bf16), LayerRecipe("dynamic", fp32)])
    assert len(labels) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_drop": -0.1}, ValueError, "max_drop must be at least 0"),
        ({"max_drop": math.nan}, ValueError, "max_drop must be at least 0"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be positive"),
        ({"max_latency": 0.0}, ValueError, "max_latency must be positive"),
        ({"cost": "volts"}, ValueError, "cost must be one of bytes, seconds"),
        ({"points": 0}, ValueError, "points must be positive"),
        ({"choices": []}, ValueError, "something else than float"),
        ({"choices": ["int7"]}, ValueError, "recipe must be one of"),
        ({"shares": (0.0, 0.5, 0.5)}, ValueError, "'int8-static' needs calibration data"),
        ({"include": "x"}, ValueError, "no Linear layer matches"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quick(mlp(), batches(), **arguments)


def test_wrong_models_and_data() -> None:
    with pytest.raises(TypeError, match="model must be a torch"):
        quick("model", batches())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="put a single batch in a list"):
        quick(mlp(), torch.randn(400, 16))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no Linear layer that can be quantized"):
        quick(nn.Sequential(nn.ReLU()), batches())
    with pytest.raises(ValueError, match="enough samples"):
        quick(mlp(), [torch.randn(2, 16)])


def test_scores_of_no_samples() -> None:
    with pytest.raises(TypeError, match=r"metric\(model\) must be a number, or 1-d scores"):
        quick(mlp(), batches(), lambda m: "good")
