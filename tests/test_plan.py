"""plan: what is timed, what the rule chooses, and that quantize and prepack_model follow it."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import zeropoint
from small_models import mlp
from zeropoint import PackedLinear, Plan, QuantizedLinear, kernels, plan, prepack_model, quantize
from zeropoint.plan import FORMS, MARGIN, ShapePlan, Time, choose, measure

needs_core = pytest.mark.skipif(
    kernels.active_isa() == kernels.REFERENCE, reason="the reference computes"
)


@pytest.fixture
def fake_times(monkeypatch):
    """Times by form, instead of measured ones."""

    def use(**times):
        named = {form.replace("_", "-"): Time(t, t, t) for form, t in times.items()}
        monkeypatch.setattr(measure, "_time", lambda key, total, seconds: named)

    return use


# The rule


@pytest.mark.parametrize(
    ("times", "choice"),
    [
        ((100, 100, 100, 100, 100), "float"),
        ((100, 96, 96, 96, 96), "float"),
        ((100, 90, 90, 90, 90), "packed"),
        ((100, 90, 87, 86, 86), "packed"),
        ((100, 90, 80, 78, 50), "int8-weight-only"),
        ((100, 90, 80, 50, 50), "int8-dynamic"),
        ((100, 90, 80, 50, 40), "int8-dynamic"),
        ((10, 90, 80, 50, 40), "float"),
    ],
)
def test_the_one_that_loses_least_among_the_fastest(times, choice):
    assert choose(dict(zip(FORMS, times, strict=True)), FORMS[:-1])[0] == choice


def test_never_slower_than_float():
    generator = torch.Generator().manual_seed(0)
    for row in torch.rand(500, 5, generator=generator).tolist():
        times = dict(zip(FORMS, row, strict=True))
        form, _ = choose(times)
        assert times[form] <= times["float"]
        assert times[form] <= min(row) * (1 + MARGIN)


def test_static_only_where_it_is_allowed():
    times = dict(zip(FORMS, (100, 90, 80, 50, 40), strict=True))
    assert choose(times) == ("int8-static", "2.5 × as fast as float")
    form, reason = choose(times, ["int8-dynamic"])
    assert form == "int8-dynamic"
    assert reason.endswith("int8-static, 1.2 × as fast, is not allowed")


def test_reasons():
    assert choose({"float": 1.0})[1] == "nothing is faster"
    assert choose({"float": 1.02, "packed": 1.0})[1] == "within 5 % of packed, and loses less"


def test_rule_refuses_nonsense():
    with pytest.raises(ValueError, match=r"forms are .*; got 'int4'"):
        choose({"float": 1.0, "int4": 0.5})
    with pytest.raises(ValueError, match="must hold 'float', got packed"):
        choose({"packed": 1.0})


# What is timed


@needs_core
def test_a_small_model_is_timed_in_every_form():
    model = mlp()
    found = plan(model, torch.randn(2, 3, 16), seconds=0.05)
    assert [s.layers for s in found.shapes] == [("0",), ("2",)]
    first = found.shapes[0]
    assert (first.in_features, first.out_features, first.bias) == (16, 32, True)
    assert (first.dtype, first.calls) == ("float32", ((6, 1),))
    for shape in found.shapes:
        assert tuple(shape.times) == FORMS
        assert all(0 < t.low <= t.median <= t.high for t in shape.times.values())
        medians = {form: t.median for form, t in shape.times.items()}
        assert (shape.choice, shape.reason) == choose(medians, FORMS[:-1])
    assert found.isa == kernels.active_isa()
    assert found.notes == ()


@needs_core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).to(dtype)
    (shape,) = plan(model, torch.randn(2, 16).to(dtype), seconds=0.01).shapes
    assert ("packed" in shape.times) == (dtype == torch.bfloat16)
    assert shape.dtype == str(dtype).removeprefix("torch.")


@needs_core
def test_layers_that_are_timed_have_the_models_number_of_weights_and_are_right():
    key = (16, 8, True, torch.float32, ((2, 1),))
    layers = measure._layers(key, 3)
    x = torch.randn(2, 16)
    expected = layers["float"][0](x)
    for form, copies in layers.items():
        assert len({id(layer) for layer in copies}) == 3, form
        for layer in copies:
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=0.1)
    addresses = {layer.weight.data_ptr() for layer in layers["int8-static"]}
    assert addresses == {layer.weight.data_ptr() for layer in layers["int8-dynamic"]}
    assert len(addresses) == 3


def test_equal_layers_are_timed_once_and_rows_counted(fake_times):
    fake_times(float=1.0)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused = (nn.Linear(4, 4) for _ in range(3))
            self.twice = nn.Linear(4, 4)

        def forward(self, x):
            x = self.b(self.a(x))
            return self.twice(self.twice(self.twice(x))[:1])

    found = plan(Loop(), torch.randn(3, 4))
    assert [(s.layers, s.calls) for s in found.shapes] == [
        (("a", "b"), ((3, 1),)),
        (("twice",), ((1, 1), (3, 2))),
    ]
    assert found.left == {"unused": "the batch never calls it"}


@pytest.mark.parametrize(
    "batch", [torch.ones(2, 16), (torch.ones(2, 16),), {"input": torch.ones(2, 16)}]
)
def test_kinds_of_batches(batch, fake_times):
    fake_times(float=1.0)
    assert plan(mlp(), batch).shapes[0].calls == ((2, 1),)


def test_include_exclude_and_what_cannot_be_replaced(fake_times):
    fake_times(float=1.0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].register_forward_hook(lambda *a: None)
    found = plan(model, torch.randn(1, 4), exclude="1")
    assert list(found.choices) == ["0"]
    assert found.left["1"] == "excluded by '1'"
    assert "hooks" in found.left["2"]
    assert list(plan(model, torch.randn(1, 4), include="1").choices) == ["1"]


def test_threads_are_restored_and_the_model_untouched(fake_times):
    fake_times(float=1.0)
    before, model = torch.get_num_threads(), mlp().train()
    assert plan(model, torch.randn(1, 16), threads=before + 1).threads == before + 1
    assert torch.get_num_threads() == before
    assert model.training
    assert not model[0]._forward_pre_hooks
    with pytest.raises(TypeError, match="a batch must be"):
        plan(model, 3)
    assert torch.get_num_threads() == before


def test_the_reference_is_not_timed():
    with zeropoint.force_isa("reference"):
        found = plan(mlp(), torch.randn(1, 16), seconds=0.01)
    assert {s.choice for s in found.shapes} == {"float"}
    assert "slow by design" in str(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads must be positive, got 0"),
        ({"seconds": 0}, "seconds must be positive"),
        ({"allow": ["int4"]}, "allow must hold forms of .* got 'int4'"),
        ({"include": "7"}, "no Linear layer matches '7'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(mlp(), torch.randn(1, 16), **arguments)
    with pytest.raises(TypeError, match="model must be"):
        plan(1, torch.randn(1, 16))


# What is done with it


def planned(**choices):
    """A plan for mlp(): layer → form."""
    names = {"first": "0", "second": "2"}
    times = {form: Time(10.0 - i, 9.0 - i, 11.0 - i) for i, form in enumerate(FORMS)}
    shapes = tuple(
        ShapePlan(16, 32, True, "float32", ((4, 1),), (names[k],), times, form, "so")
        for k, form in choices.items()
    )
    return Plan(shapes, {}, 1, "avx2", FORMS)


def test_quantize_and_prepack_follow_the_plan():
    made = planned(first="int8-weight-only", second="packed")
    model = quantize(mlp(), plan=made)
    assert model[0].mode == "weight-only"
    assert type(model[2]) is nn.Linear
    assert model.quantization.left == {
        "2": "the plan keeps it float, packed: that is for prepack_model to do"
    }
    model = prepack_model(model, include=made.names("packed"), inplace=True)
    assert [type(m) for m in model] == [QuantizedLinear, nn.GELU, PackedLinear]


def test_quantize_follows_every_integer_form():
    made = planned(first="int8-static", second="int8-dynamic")
    with pytest.raises(ValueError, match="calibration must be given"):
        quantize(mlp(), plan=made)
    model = quantize(mlp(), plan=made, calibration=[torch.randn(4, 16)])
    assert [model[i].mode for i in (0, 2)] == ["static", "dynamic"]


def test_what_the_plan_keeps_float_stays():
    made = planned(first="int8-dynamic", second="float")
    left = quantize(mlp(), plan=made).quantization.left
    assert left == {"2": "the plan keeps it float: so"}
    only = dataclasses.replace(made, shapes=made.shapes[:1])
    assert quantize(mlp(), plan=only).quantization.left == {"2": "it is not in the plan"}
    assert list(quantize(mlp(), plan=only, exclude="2").quantization.quantized) == ["0"]


def test_names_with_the_characters_of_patterns():
    model = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "a*": nn.Linear(4, 4), "ab": nn.Linear(4, 4)})
    shape = dataclasses.replace(planned(first="int8-dynamic").shapes[0], layers=("a[0]", "a*"))
    made = Plan((shape,), {}, 1, "avx2", FORMS)
    assert list(quantize(model, plan=made).quantization.quantized) == ["a[0]", "a*"]


def test_plans_that_do_not_fit():
    made = planned(first="int8-dynamic")
    with pytest.raises(ValueError, match="plan: the model has no Linear layer '0'"):
        quantize(nn.Linear(4, 4), plan=made)
    with pytest.raises(ValueError, match="recipe must be None where a plan is given"):
        quantize(mlp(), "int8-dynamic", plan=made)
    with pytest.raises(TypeError, match=r"plan must be a zeropoint.Plan, got dict"):
        quantize(mlp(), plan=made.to_dict())


def test_json_and_back():
    made = planned(first="int8-static", second="packed")
    d = json.loads(json.dumps(made.to_dict()))
    assert d["choices"] == {"0": "int8-static", "2": "packed"}
    assert Plan.from_dict(d) == made
    for broken, error in (
        ([], TypeError),
        ({"shapes": []}, ValueError),
        (d | {"version": 2}, ValueError),
        (d | {"shapes": [{"in_features": 1}]}, ValueError),
        ({k: v for k, v in d.items() if k != "threads"}, ValueError),
        ({k: v for k, v in d.items() if k != "allow"}, ValueError),
        (d | {"shapes": [d["shapes"][0] | {"choice": "int4"}]}, ValueError),
    ):
        with pytest.raises(error):
            Plan.from_dict(broken)


def test_how_it_prints():
    text = str(planned(first="int8-weight-only", second="packed"))
    assert "16 × 32" in text
    assert "8.0" in text
    assert "16 × 32: int8-weight-only: so." in text
    assert "0.02 ms float, 0.02 ms as planned (1 threads, avx2)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_seconds():
    made = planned(first="int8-dynamic", second="packed")
    assert made.seconds("float") == pytest.approx(20e-6)
    assert made.seconds() == pytest.approx(16e-6)
    with pytest.raises(ValueError, match="form must be one of"):
        made.names("int4")
