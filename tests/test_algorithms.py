"""The methods by name, and how they go together in one layer."""

import json
import math

import pytest
import torch

import zeropoint
from method_cases import INT2, TOGETHER, recipe, seen, uneven
from small_models import batches, mlp, sqnr
from zeropoint import (
    WEIGHT_INT4,
    WEIGHT_INT8,
    LayerRecipe,
    PerGroup,
    PerTensor,
    QuantizedLinear,
    QuantSpec,
    Recipe,
    quantize,
)
from zeropoint.algorithms import (
    METHODS,
    InputStatistics,
    check_methods,
    needs_data,
    quantize_weight,
)

# Names


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("gtpq",), "method must be of smooth, awq, .*; got 'gtpq'"),
        (("gptq", "smooth"), r"method must be in the order \('smooth', 'gptq'\), got \('gptq', "),
        (("smooth", "awq"), "must hold one of 'smooth' and 'awq', which do the same step"),
        (("clip", "hqq"), "must hold one of 'clip' and 'hqq'"),
        (("gptq", "gptq"), "must hold a name once, got 'gptq' twice"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        LayerRecipe("dynamic", method=methods)


@pytest.mark.parametrize("methods", [None, 4, ("gptq", 4), {"gptq"}])
def test_methods_of_the_wrong_type_are_refused(methods):
    with pytest.raises(TypeError, match="method must be a tuple of names"):
        LayerRecipe("dynamic", method=methods)


def test_a_list_or_a_name_will_do():
    assert LayerRecipe("dynamic", method=["smooth", "gptq"]).method == ("smooth", "gptq")
    assert LayerRecipe("dynamic", method="gptq").method == ("gptq",)
    assert check_methods([]) == ()


@pytest.mark.parametrize("methods", TOGETHER)
def test_recipe_goes_through_json(methods):
    whole = Recipe(recipe(*methods), overrides=(("*.0", recipe("hqq", mode="dynamic")),))
    assert Recipe.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


def test_recipe_without_method_reads_as_before():
    assert "method" not in LayerRecipe("dynamic").to_dict()
    assert str(recipe("smooth", "gptq")).endswith("by smooth, gptq")


@pytest.mark.parametrize("name", METHODS)
def test_calibration_is_needed_exactly_where_a_method_looks_at_data(name):
    model, looks = mlp(), bool(needs_data((name,)))
    assert recipe(name).needs_calibration == looks
    if looks:
        with pytest.raises(ValueError, match=f"calibration must be given: '{name}' looks at sampl"):
            quantize(model, recipe(name))
        quantize(model, recipe(name), calibration=batches())
    else:
        with pytest.raises(ValueError, match="no chosen layer is static or has a method that look"):
            quantize(model, recipe(name), calibration=batches())
        quantize(model, recipe(name))


# One layer


@pytest.mark.parametrize("methods", TOGETHER)
@pytest.mark.parametrize(("out", "features"), [(6, 32), (5, 45), (1, 1), (4, 1), (3, 12)], ids=str)
def test_layer_stands_for_nearly_the_same_weight(methods, out, features):
    weight, bias = torch.randn(out, features), torch.randn(out)
    x = torch.randn(200, features) @ torch.randn(features, features)
    spec = QuantSpec(8, False, False, PerGroup(16))
    made = quantize_weight(weight, bias, spec, methods, seen([x], features))
    expected, found = x @ weight.T + bias, x @ made.reals().T + made.bias
    assert sqnr(expected, found) > 38
    layer = QuantizedLinear.from_quantized(
        made.weight,
        made.bias,
        "weight-only",
        input_factor=made.input_factor,
        rotation=made.rotation,
    )
    torch.testing.assert_close(layer(x), found, rtol=1e-3, atol=1e-3 * float(found.abs().max()))


@pytest.mark.parametrize("spec", [WEIGHT_INT8, INT2, QuantSpec(bits=4, granularity=PerTensor())])
def test_every_granularity_goes(spec):
    weight, x = torch.randn(6, 32), torch.randn(99, 32)
    for methods in TOGETHER:
        made = quantize_weight(weight, None, spec, methods, seen([x], 32))
        assert made.weight.spec.granularity == spec.granularity
        assert made.bias is None
        assert bool(made.reals().isfinite().all())


def test_no_method_is_rounding_to_nearest():
    weight = torch.randn(6, 32)
    made = quantize_weight(weight, None, WEIGHT_INT4, ())
    expected = zeropoint.quantize_to_spec(weight, WEIGHT_INT4)
    assert torch.equal(made.weight.int_repr(), expected.int_repr())
    assert made.notes == ()


@pytest.mark.parametrize("first", ["smooth", "awq", "hadamard"])
def test_gptq_after_a_change_of_inputs_sees_the_changed_inputs(first):
    # Were H not changed with the inputs, GPTQ would make up for errors that are not there.
    weight, x = torch.randn(24, 16), torch.cat(uneven())
    inputs = seen([x], 16)
    made = quantize_weight(weight, None, WEIGHT_INT4, (first, "gptq"), inputs)
    rounded = quantize_weight(weight, None, WEIGHT_INT4, (first, "clip"), inputs)
    assert sqnr(x @ weight.T, x @ made.reals().T) > sqnr(x @ weight.T, x @ rounded.reals().T) + 3


def test_notes_say_how_much_was_won():
    weight, x = torch.randn(24, 16), torch.cat(uneven())
    made = quantize_weight(weight, None, INT2, ("awq", "gptq"), seen([x], 16))
    nearest = zeropoint.quantize_to_spec(weight, INT2).dequantize()
    change = sqnr(x @ weight.T, x @ nearest.T) - sqnr(x @ weight.T, x @ made.reals().T)
    assert change < -3
    text = made.notes[-1]
    assert text.startswith("output error −")
    assert float(text.split()[2].replace("−", "-")) == pytest.approx(change, abs=0.1)
    assert quantize_weight(weight, None, INT2, ("clip",)).notes[0].startswith("weight error −")


def test_bad_arguments_are_named():
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match="inputs must hold sample data, which 'gptq' needs"):
        quantize_weight(weight, None, WEIGHT_INT4, ("gptq",))
    with pytest.raises(ValueError, match="inputs must hold sample data"):
        quantize_weight(weight, None, WEIGHT_INT4, ("smooth",), InputStatistics(8))
    with pytest.raises(ValueError, match="inputs must be of 8 channels, got 9"):
        quantize_weight(weight, None, WEIGHT_INT4, ("gptq",), seen([torch.randn(2, 9)], 9))
    weight[1, 2] = math.nan
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize_weight(weight, None, WEIGHT_INT4, ("clip",))
