"""A model's layers quantized by the methods of their recipes."""

import copy
import math

import pytest
import torch
from torch import nn

import zeropoint
from method_cases import INT2, TOGETHER, recipe, seen, uneven
from small_models import mlp, sqnr, tied_linears
from zeropoint import (
    WEIGHT_INT8,
    LayerRecipe,
    PerGroup,
    QuantizedLinear,
    QuantSpec,
    Recipe,
    quantize,
)
from zeropoint.algorithms import InputStatistics, quantize_weight
from zeropoint.blocks import stages

# Models


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight-only"])
@pytest.mark.parametrize("methods", TOGETHER[1:])
def test_model_by_every_method_in_every_mode(methods, mode):
    model, data = mlp(), uneven()
    spec = QuantSpec(bits=8, granularity=PerGroup(8))
    made = recipe(*methods, mode=mode, weight=spec)
    before = copy.deepcopy(model.state_dict())
    result = quantize(model, made, calibration=data if made.needs_calibration else None)
    assert [type(m) for m in result] == [QuantizedLinear, nn.GELU, QuantizedLinear]
    assert sqnr(model(data[0]), result(data[0])) > 30
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert set(result.quantization.done) == {"0", "2"}
    assert all(text in str(result.quantization) for text in result.quantization.done.values())


def test_each_layer_sees_what_the_quantized_layers_before_it_give():
    model, data = mlp(), uneven()
    result = quantize(model, recipe("gptq", weight=INT2), calibration=data)
    first, second = model[0], model[2]
    with torch.no_grad():
        inputs = seen(data, 16)
        made = quantize_weight(first.weight, first.bias, INT2, ("gptq",), inputs)
        layer = QuantizedLinear.from_quantized(made.weight, made.bias, "weight-only")
        hidden = [nn.functional.gelu(layer(x)) for x in data]
        made = quantize_weight(second.weight, second.bias, INT2, ("gptq",), seen(hidden, 32))
    assert torch.equal(result[0](data[0]), layer(data[0]))
    assert torch.equal(result[2].weight_qtensor().int_repr(), made.weight.int_repr())
    # and not what the float layers give
    floats = seen([model[:2](x).detach() for x in data], 32)
    other = quantize_weight(second.weight, second.bias, INT2, ("gptq",), floats)
    assert not torch.equal(other.weight.int_repr(), made.weight.int_repr())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_beat_rounding_to_nearest(method):
    model, data = mlp(), uneven(8)
    plain = quantize(model, recipe(weight=INT2))
    better = quantize(model, recipe(method, weight=INT2), calibration=data[:4])
    x = torch.cat(data[4:])  # data that the method did not see
    assert sqnr(model(x), better(x)) > sqnr(model(x), plain(x)) + 2


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_smoothing_and_rotating_help_8_bit_activations_with_outliers(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    data = [torch.randn(64, 64) for _ in range(4)]
    for x in data:
        x[:, 3] *= 100
    with torch.no_grad():
        model[0].weight[:, 3] /= 100

    def quality(*methods):
        made = recipe(*methods, mode=mode, weight=WEIGHT_INT8)
        result = quantize(model, made, calibration=data if made.needs_calibration else None)
        return sqnr(model(data[0]), result(data[0]))

    before = quality()
    assert quality("smooth") > before + 8
    assert quality("hadamard") > before + 3


def test_static_scale_is_that_of_the_changed_input():
    model, data = nn.Sequential(nn.Linear(16, 4)), uneven()
    made = LayerRecipe("static", WEIGHT_INT8, observer="minmax", method=("smooth",))
    layer = quantize(model, made, calibration=data)[0]
    x = torch.cat(data) * layer.input_factor
    assert float(layer.input_scale) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-5)


def test_bias_correction_takes_the_mean_error_away():
    model, data = nn.Sequential(nn.Linear(16, 8)), [x + 5 for x in uneven()]
    x = torch.cat(data)

    def shift(*methods):
        made = recipe(*methods, weight=INT2)
        result = quantize(model, made, calibration=data if methods else None)
        return float((result(x) - model(x)).mean(0).abs().max().detach())

    assert shift("bias-correction") < 0.01 * shift()
    bare = nn.Sequential(nn.Linear(16, 8, bias=False))
    result = quantize(bare, recipe("bias-correction"), calibration=data)
    assert result[0].bias is None
    assert "no bias to correct" in result.quantization.done["0"]


def test_odd_number_of_inputs_is_not_rotated_and_said():
    result = quantize(nn.Sequential(nn.Linear(9, 4)), recipe("hadamard"))
    assert result[0].input_factor is None
    assert "not rotated, the number of inputs is odd" in result.quantization.done["0"]


def test_saved_and_loaded_bit_for_bit(tmp_path):
    model, data = mlp(), uneven()
    result = quantize(model, recipe("smooth", "hadamard", "gptq"), calibration=data)
    zeropoint.save(result, tmp_path / "m.safetensors")
    again = zeropoint.load(tmp_path / "m.safetensors", mlp())
    assert torch.equal(again(data[0]), result(data[0]))
    assert again[0].rotation == 16


# Stages


class Block(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.inner = nn.Linear(features, features)
        self.twice = nn.ModuleList([nn.Linear(features, features) for _ in range(2)])

    def forward(self, x):
        for layer in self.twice:
            x = x + self.inner(layer(x).tanh())
        return x


class Repeated(nn.Module):
    """Its head is defined first and called last; its blocks call one layer twice."""

    def __init__(self, features=16):
        super().__init__()
        self.head = nn.Linear(features, 4)
        self.never = nn.Linear(features, 4)
        self.blocks = nn.ModuleList([Block(features) for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_stages_are_repeated_blocks():
    names = [n for n, m in Repeated().named_modules() if isinstance(m, nn.Linear)]
    assert list(stages(names, Repeated()).values()) == [
        ["head"],
        ["never"],
        *([f"blocks.{i}.{n}" for n in ("inner", "twice.0", "twice.1")] for i in range(3)),
    ]
    assert stages([""], nn.Linear(2, 2)) == {"": [""]}


def test_layers_are_taken_in_the_order_of_their_calls_and_see_all_of_them():
    model, data = Repeated(), uneven()
    shown = {}  # holds them, so that no two have one id
    original = InputStatistics.observe

    def spy(self, x):
        shown[self] = shown.get(self, 0) + len(x)
        original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputStatistics, "observe", spy)
        result = quantize(model, recipe("gptq"), calibration=iter(data))
    assert list(result.quantization.done) == [
        *(f"blocks.{i}.{n}" for i in range(3) for n in ("twice.0", "inner", "twice.1")),
        "head",
    ]
    rows = sum(map(len, data))
    assert sorted(shown.values()) == sorted([2 * rows, rows, rows] * 3 + [rows])
    assert result.quantization.left == {"never": "calibration never called it"}
    assert type(result.never) is nn.Linear


def test_a_stage_ends_the_run_of_the_model():
    model, data = Repeated(), uneven(2)
    runs = []
    model.head.register_forward_pre_hook(lambda *a: runs.append(1))  # so it stays float
    quantize(model, recipe("gptq"), calibration=data)
    assert len(runs) == 2  # the first run alone, which counts the calls


def test_layers_by_different_recipes():
    model, data = Repeated(), uneven()
    made = Recipe(
        recipe("gptq"),
        overrides=(
            ("head", LayerRecipe("static")),
            ("*.0.inner", None),
            ("*.1.inner", recipe("hqq")),
            ("never", LayerRecipe("dynamic")),
        ),
    )
    result = quantize(model, made, calibration=data)
    assert result.quantization.left == {"blocks.0.inner": "the recipe keeps it float"}
    assert result.head.mode == "static"
    assert result.never.mode == "dynamic"
    assert "head" not in result.quantization.done
    assert result.quantization.done["blocks.1.inner"].startswith("weight error")
    assert sqnr(model(data[0]), result(data[0])) > 8


def test_layers_that_share_a_weight_share_its_integers_and_correct_their_own_bias():
    model, data = tied_linears(), uneven(features=8)
    with torch.no_grad():
        model[2].bias += 1
    methods = ("smooth", "hadamard", "gptq", "bias-correction")
    result = quantize(model, recipe(*methods, weight=INT2), calibration=data)
    assert result[2].weight is result[0].weight
    assert result[2].input_factor is result[0].input_factor
    assert result.quantization.tied == {"2": "0"}
    x = [torch.relu(result[0](x)) for x in data]
    inputs = torch.cat(x)
    with torch.no_grad():
        shift = (result[2](inputs) - model[2](inputs)).mean(0)
    assert shift.abs().max() < 1e-3


def test_nan_in_the_data_names_the_layer_and_leaves_the_model_as_it_was():
    model, data = mlp(), [*uneven(2), torch.full((3, 16), math.nan)]
    with pytest.raises(ValueError, match="layer '0': its input must be finite"):
        quantize(model, recipe("gptq"), calibration=data, inplace=True)
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_one_batch_instead_of_many_is_refused():
    with pytest.raises(TypeError, match="put a single batch in a list"):
        quantize(mlp(), recipe("gptq"), calibration=uneven()[0])
    with pytest.raises(ValueError, match="data must hold at least one batch"):
        quantize(mlp(), recipe("gptq"), calibration=[])


def test_model_that_is_a_layer():
    layer, data = nn.Linear(16, 4), uneven()
    result = quantize(layer, recipe("gptq"), calibration=data)
    assert isinstance(result, QuantizedLinear)
    assert type(layer) is nn.Linear
    assert "forward" not in layer.__dict__
    assert sqnr(layer(data[0]), result(data[0])) > 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype):
    model, data = mlp().to(dtype), [x.to(dtype) for x in uneven()]
    result = quantize(model, recipe("smooth", "gptq"), calibration=data)
    y = result(data[0])
    assert y.dtype == dtype
    assert sqnr(model(data[0]).double(), y.double()) > 10
