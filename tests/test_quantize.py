import copy
import math

import pytest
import torch
from torch import nn

import zeropoint
from small_models import batches, calibration_for, mlp, sqnr, tied_linears
from zeropoint import WEIGHT_INT8, QuantizedLinear, QuantSpec, quantize
from zeropoint.quantize import RECIPES, LayerRecipe, QuantizationSummary, Recipe

DYNAMIC = LayerRecipe("dynamic")


def least_sqnr(recipe):
    """dB that a small model keeps: some 6 a bit."""
    return 30 if recipe.startswith("int8") else 15


# What it is for


@pytest.mark.parametrize("recipe", RECIPES)
def test_close_to_float(recipe):
    torch.manual_seed(0)
    model, data = mlp(), batches()
    result = quantize(model, recipe, calibration=calibration_for(recipe, data))
    layer = RECIPES[recipe].default
    assert [type(m) for m in result] == [QuantizedLinear, nn.GELU, QuantizedLinear]
    assert result[0].mode == result[2].mode == layer.mode
    assert result[0].bits == result[2].bits == layer.weight.bits
    assert sqnr(model(data[0]), result(data[0])) > least_sqnr(recipe)
    assert result.quantization == QuantizationSummary(dict.fromkeys("02", layer))


def test_layer_is_from_linear_bit_for_bit():
    model, x = mlp(), batches(1)[0]
    expected = QuantizedLinear.from_linear(model[0])
    assert torch.equal(quantize(model)[0](x), expected(x))


def test_static_scale_is_the_observers():
    model, data = mlp(), batches()
    result = quantize(model, LayerRecipe("static", observer="minmax"), calibration=data)
    inner = model[:2](torch.cat(data)).detach()
    steps = (inner.max() - inner.min()) / 255
    assert float(result[2].input_scale) == pytest.approx(float(steps), rel=1e-5)


def test_zeropoint_linear_is_quantized():
    model = nn.Sequential(zeropoint.Linear(4, 4))
    assert isinstance(quantize(model)[0], QuantizedLinear)


def test_weight_spec_reaches_the_weight():
    spec = QuantSpec(symmetric=False)
    result = quantize(mlp(), LayerRecipe("dynamic", weight=spec))
    assert result[0].scale.unique().numel() == 1
    assert bool((result[0].zero_point != 0).any())
    assert quantize(mlp(), LayerRecipe("dynamic", weight=WEIGHT_INT8))[0].scale.unique().numel() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes(dtype):
    model, x = mlp().to(dtype), batches(1)[0].to(dtype)
    result = quantize(model)
    y = result(x)
    assert y.dtype == dtype
    assert sqnr(model(x).double(), y.double()) > 30


# Whose model it is


@pytest.mark.parametrize("recipe", RECIPES)
def test_not_in_place_leaves_the_model_alone(recipe):
    model, data = mlp().train(), batches()
    before = copy.deepcopy(model.state_dict())
    layers = list(model)
    result = quantize(model, recipe, calibration=calibration_for(recipe, data))
    assert list(model) == layers
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "quantization")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in result.modules())
    assert model.training
    assert result.training


def test_in_place_gives_the_same_model():
    model, x = mlp(), batches(1)[0]
    expected = quantize(model)(x)
    linear = model[0]
    assert quantize(model, inplace=True) is model
    assert torch.equal(model(x), expected)
    assert linear is not model[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weight_names_the_layer_and_changes_nothing(value):
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 1] = value
    layers = list(model)
    with pytest.raises(ValueError, match="layer '2': its weight holds NaN or Inf"):
        quantize(model, inplace=True)
    assert list(model) == layers
    quantize(model, exclude="2", inplace=True)  # a layer that stays float may hold anything


def test_failed_calibration_changes_nothing():
    model = mlp()
    layers = list(model)
    with pytest.raises(ValueError, match="layer '0': its input must be finite"):
        quantize(model, "int8-static", calibration=[torch.full((1, 16), math.nan)], inplace=True)
    assert list(model) == layers


def test_result_is_independent_of_later_training():
    model, x = mlp(), batches(1)[0]
    result = quantize(model)
    before = result(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(result(x), before)


def test_result_survives_deepcopy_and_state_dict():
    model, x = mlp(), batches(1)[0]
    result = quantize(model)
    again = copy.deepcopy(result)
    assert torch.equal(again(x), result(x))
    assert again.quantization == result.quantization
    other = quantize(mlp())
    other.load_state_dict(result.state_dict())
    assert torch.equal(other(x), result(x))


# Which layers


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"query": nn.Linear(8, 8), "value": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.encoder["query"](x) + self.encoder["value"](x))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"include": "encoder.*"}, ["encoder.query", "encoder.value"]),
        ({"include": ["head", "*.query"]}, ["encoder.query", "head"]),
        ({"exclude": "head"}, ["encoder.query", "encoder.value"]),
        ({"include": "enc*", "exclude": ("*.v?lue",)}, ["encoder.query"]),
        ({"include": iter(["head"])}, ["head"]),
    ],
)
def test_include_and_exclude(arguments, expected):
    result = quantize(Nested(), **arguments)
    assert [n for n, m in result.named_modules() if isinstance(m, QuantizedLinear)] == expected
    assert list(result.quantization.quantized) == expected
    assert len(result.quantization.left) == 3 - len(expected)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_that_matches_nothing(argument):
    for pattern, hint in (
        ("encoder", r"those inside it are 'encoder\.\*'"),
        ("encoder.qery", "did you mean 'encoder.query'"),
        ("Head", "'Head'"),
        ("", "no Linear layer matches ''"),
    ):
        with pytest.raises(ValueError, match=hint) as error:
            quantize(Nested(), **{argument: ["head", pattern]})
        assert argument in str(error.value)
    with pytest.raises(TypeError, match=f"{argument} must hold patterns"):
        quantize(Nested(), **{argument: [3]})


def test_recipe_overrides():
    recipe = Recipe(
        DYNAMIC,
        (("head", None), ("*.value", LayerRecipe("weight-only")), ("lm_head", None)),
    )
    result = quantize(Nested(), recipe)
    assert result.encoder["query"].mode == "dynamic"
    assert result.encoder["value"].mode == "weight-only"
    assert result.quantization.left == {"head": "the recipe keeps it float"}
    assert result.quantization.unmatched == ("lm_head",)


def test_only_static_layers_are_calibrated():
    recipe = Recipe(DYNAMIC, (("2", LayerRecipe("static")),))
    result = quantize(mlp(), recipe, calibration=batches())
    assert (result[0].mode, result[2].mode) == ("dynamic", "static")
    assert result[0].input_scale is None


def test_nothing_to_do_warns():
    with pytest.warns(UserWarning, match="nothing was quantized"):
        result = quantize(nn.Sequential(nn.ReLU()))
    assert result.quantization == QuantizationSummary()


def test_float_recipe_does_not_warn(recwarn):
    result = quantize(mlp(), Recipe(None))
    assert set(result.quantization.left) == {"0", "2"}
    assert not recwarn.list


# Wrong arguments


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        quantize(test_wrong_arguments)
    with pytest.raises(ValueError, match="int8-dynamic"):
        quantize(mlp(), "int5")
    with pytest.raises(ValueError, match="calibration must be given: 2 layers are static"):
        quantize(mlp(), "int8-static")
    with pytest.raises(ValueError, match="no chosen layer is static"):
        quantize(mlp(), "int8-dynamic", calibration=batches())
    with pytest.raises(ValueError, match="at least one batch"):
        quantize(mlp(), "int8-static", calibration=[])
    with pytest.raises(TypeError, match="single batch in a list"):
        quantize(mlp(), "int8-static", calibration=batches()[0])


# Models of unusual shape


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_model_is_a_linear_itself(recipe, inplace):
    model, data = nn.Linear(16, 4), batches()
    calibration = calibration_for(recipe, data)
    result = quantize(model, recipe, calibration=calibration, inplace=inplace)
    assert isinstance(result, QuantizedLinear)
    assert list(result.quantization.quantized) == [""]
    assert "(the model)" in str(result.quantization)
    assert sqnr(model(data[0]), result(data[0])) > least_sqnr(recipe)


@pytest.mark.parametrize("inplace", [False, True])
def test_layer_used_under_two_names(inplace):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model.append(model[0])
    x = torch.randn(4, 8)
    exact = model(x)
    result = quantize(model, inplace=inplace)
    assert result[0] is result[3]
    assert result.quantization.shared == {"3": "0"}
    assert list(result.quantization.quantized) == ["0", "2"]
    assert sqnr(exact, result(x)) > 30


@pytest.mark.filterwarnings("ignore:nothing was quantized")
def test_patterns_know_all_names_of_a_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model.again = model[0]
    assert quantize(model, exclude="again", include="0").quantization.left == {
        "0": "excluded by 'again'"
    }
    assert isinstance(quantize(model, include="again")[0], QuantizedLinear)
    assert quantize(model, Recipe(DYNAMIC, (("again", None),))).quantization.left


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_tied_linears_share_one_weight(recipe, inplace):
    model, data = tied_linears(), batches(features=8)
    exact = model(data[0])
    result = quantize(model, recipe, calibration=calibration_for(recipe, data), inplace=inplace)
    a, b = result[0], result[2]
    assert a is not b
    assert a.weight is b.weight
    assert a.weight_qtensor() is b.weight_qtensor()
    assert not torch.equal(a.bias, b.bias)
    assert result.quantization.tied == {"2": "0"}
    if recipe == "int8-static":
        assert a.input_scale is not b.input_scale
        assert float(a.input_scale) != float(b.input_scale)
    assert sqnr(exact, result(data[0])) > least_sqnr(recipe)


def test_tied_linears_with_different_weight_specs_part():
    recipe = Recipe(DYNAMIC, (("2", LayerRecipe("dynamic", weight=QuantSpec())),))
    result = quantize(tied_linears(), recipe)
    assert result[0].weight is not result[2].weight
    assert result.quantization.tied == {}


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.relu(self.body(self.embedding(ids))))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"include": "*"}, {"include": "h*d"}])
def test_weight_tied_to_an_embedding_stays(arguments, inplace):
    model = LanguageModel()
    if arguments.get("include") == "h*d":
        with pytest.warns(UserWarning, match="nothing"):
            result = quantize(model, inplace=inplace, **arguments)
    else:
        result = quantize(model, inplace=inplace, **arguments)
        assert isinstance(result.body, QuantizedLinear)
    assert result.head.weight is result.embedding.weight
    assert result.quantization.left["head"] == (
        "its weight is also 'embedding.weight', which stays float"
    )


def test_weight_tied_to_an_embedding_is_quantized_when_named():
    model = LanguageModel()
    result = quantize(model, include=["head", "body"])
    assert isinstance(result.head, QuantizedLinear)
    assert torch.equal(result.embedding.weight, model.embedding.weight)
    ids = torch.arange(32)
    assert sqnr(model(ids), result(ids)) > 30


def test_excluding_one_of_two_tied_linears_keeps_both():
    model = tied_linears()
    with pytest.warns(UserWarning, match="nothing"):
        result = quantize(model, exclude="2")
    assert result[0].weight is result[2].weight
    assert "'2.weight', which stays float" in result.quantization.left["0"]
    assert isinstance(quantize(model, include="0")[0], QuantizedLinear)


def test_quantizing_in_two_steps():
    first = quantize(mlp(), LayerRecipe("weight-only"), include="0")
    second = quantize(first)
    assert (second[0].mode, second[2].mode) == ("weight-only", "dynamic")
    assert second.quantization.quantized == {"0": LayerRecipe("weight-only"), "2": DYNAMIC}
    assert second.quantization.left == {}
    assert torch.equal(second[0].weight, first[0].weight)


# Words


def test_summary_in_words():
    model = LanguageModel()
    model.again = model.body
    model.twin = nn.Linear(8, 8)
    model.twin.weight = model.body.weight
    recipe = Recipe(DYNAMIC, (("nothing", None),))
    assert str(quantize(model, recipe).quantization).splitlines() == [
        "quantized 2 of 3 Linear layers",
        "  body   dynamic, weight int8 per channel",
        "  twin   dynamic, weight int8 per channel",
        "  again  is body",
        "  twin   shares the weight of body",
        "  head   left float: its weight is also 'embedding.weight', which stays float",
        "  the recipe's pattern 'nothing' decided over no layer",
    ]


def test_function_and_module_go_by_one_name():
    import zeropoint.quantize

    assert callable(zeropoint.quantize)
