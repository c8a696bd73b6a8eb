"""What diagnose measures, against definitions computed another way."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from small_models import batches, sqnr
from zeropoint import LayerRecipe, Linear, diagnose, quantize
from zeropoint.diagnose.inputs import Inputs
from zeropoint.diagnose.layer_numbers import outlier_channels, split_error
from zeropoint.diagnose.variants import Integers
from zeropoint.spec import WEIGHT_INT4


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), Linear(32, 8))


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-static", "int8-weight-only", "int4"])
def test_damages_as_defined(recipe: str) -> None:
    model, data = mlp(), batches(3)
    found = diagnose(model, data, recipe=recipe, samples=96)
    assert found.samples == found.rows == 96
    x = torch.cat(data)
    calibration = data if recipe == "int8-static" else None
    whole = quantize(model, recipe, calibration=calibration)
    with torch.no_grad():
        y = model(x)
        assert found.damage_before.sqnr_db == pytest.approx(sqnr(y, whole(x)), abs=0.05)
        for name in ("0", "2", "4"):
            alone, others = copy.deepcopy(model), copy.deepcopy(whole)
            alone[int(name)], others[int(name)] = whole[int(name)], model[int(name)]
            layer = found.layer(name)
            assert layer.only_this.sqnr_db == pytest.approx(sqnr(y, alone(x)), abs=0.05)
            assert layer.all_but_this.sqnr_db == pytest.approx(sqnr(y, others(x)), abs=0.05)
            cosine = F.cosine_similarity(y.double(), alone(x).double()).mean()
            assert layer.only_this.cosine == pytest.approx(float(cosine), abs=1e-6)
    assert sum(x.noise_share for x in found.layers) == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight-only"])
def test_layer_alone_as_defined(mode: Any) -> None:
    layer = nn.Linear(24, 16)
    x = torch.randn(100, 24)
    [found] = diagnose(layer, [x], recipe=LayerRecipe(mode)).layers
    made = quantize(layer, LayerRecipe(mode), calibration=[x] if mode == "static" else None)
    weight = made.dequantize().weight
    y = layer(x)
    assert found.weight_sqnr_db == pytest.approx(sqnr(layer.weight, weight), abs=1e-3)
    with torch.no_grad():
        both, weights_only = made(x), F.linear(x, weight, layer.bias)
    assert found.both_sqnr_db == pytest.approx(sqnr(y, both), abs=0.01)
    assert found.weights_only_sqnr_db == pytest.approx(sqnr(y, weights_only), abs=0.01)
    if mode == "weight-only":
        assert found.activations_only_sqnr_db == math.inf
        assert found.activation_error is None
    else:
        # The two noises are all but independent, so that their powers add up.
        powers = [
            10 ** (-db / 10) for db in (found.weights_only_sqnr_db, found.activations_only_sqnr_db)
        ]
        assert found.both_sqnr_db == pytest.approx(-10 * math.log10(sum(powers)), abs=0.5)
        assert found.activation_error is not None
        assert found.activation_error.rounding + found.activation_error.clipping == 1.0
    assert found.float_bytes == 24 * 16 * 4
    assert found.bytes >= 24 * 16 + 16 * 8


@pytest.mark.parametrize("method", ["smooth", "hadamard", ("smooth", "hadamard")])
def test_layers_that_change_their_input(method: Any) -> None:
    layer, x = nn.Linear(32, 16), torch.randn(120, 32)
    x[:, 3] *= 40
    recipe = LayerRecipe("dynamic", method=method)
    [found] = diagnose(layer, [x], recipe=recipe).layers
    needed = [x] if recipe.needs_calibration else None
    made = quantize(layer, recipe, calibration=needed)
    y = layer(x)
    assert found.both_sqnr_db == pytest.approx(sqnr(y, made(x)), abs=0.01)
    weights_only = made.dequantize()(x)
    assert found.weights_only_sqnr_db == pytest.approx(sqnr(y, weights_only), abs=0.05)
    powers = [
        10 ** (-db / 10) for db in (found.weights_only_sqnr_db, found.activations_only_sqnr_db)
    ]
    assert found.both_sqnr_db == pytest.approx(-10 * math.log10(sum(powers)), abs=1.0)


def test_simulation_is_the_layer_but_for_rounding() -> None:
    from zeropoint.diagnose.variants import simulated

    x = torch.randn(30, 48)
    x[4, 2] = math.nan
    for recipe in (
        LayerRecipe("dynamic"),
        LayerRecipe("static"),
        LayerRecipe("weight-only", WEIGHT_INT4),
        LayerRecipe("dynamic", WEIGHT_INT4, method=("hadamard",)),
    ):
        layer = nn.Linear(48, 20)
        calibration = [x[:4]] if recipe.needs_calibration else None
        made = quantize(layer, recipe, calibration=calibration)
        y, other = made(x), simulated(made)(x)
        assert y[4].isnan().all()
        assert torch.allclose(y, other, atol=1e-5, equal_nan=True)
        bits = simulated(made)(x.bfloat16())
        assert bits.dtype == torch.bfloat16


# Outliers, clipping, saturation


def test_outlier_channels_by_hand() -> None:
    amax = torch.tensor([1.0, 2.0, 0.0, 3.0, 50.0, 1.0, 17.0])
    found = outlier_channels(amax)  # the median of those not zero is 2
    assert [(o.index, o.amax, o.ratio) for o in found] == [(4, 50.0, 25.0), (6, 17.0, 8.5)]
    assert outlier_channels(torch.zeros(3)) == []
    assert outlier_channels(None) == []


def test_outliers_are_those_of_all_the_data() -> None:
    data = [torch.rand(400, 16) for _ in range(8)]
    data[5][333, 7] = 60.0  # one value of 51,200, surely not among the rows that are kept
    [layer] = diagnose(nn.Linear(16, 4), data).layers
    assert [o.index for o in layer.outliers] == [7]
    assert layer.outliers[0].ratio == pytest.approx(60, rel=0.05)


def test_clipping_and_rounding_by_hand() -> None:
    x = torch.tensor([0.4, -3.0, 2.25, 1.0])
    q = torch.tensor([0, -2, 1, 1])
    grid = [torch.tensor(v) for v in (-2.0, 1.0, 1.0)]
    found = split_error(x, Integers(q, q.float(), -2, 1, *grid))
    # errors 0.4 rounding, 1.0 and 1.25 clipping, 0
    assert found.clipping == pytest.approx((1.0 + 1.5625) / (0.16 + 1.0 + 1.5625))
    assert found.rounding == pytest.approx(1 - found.clipping)
    nothing = split_error(x[3:], Integers(q[3:], q[3:].float(), -2, 1, *grid))
    assert (nothing.clipping, nothing.rounding) == (0.0, 0.0)


def test_min_max_clips_nothing() -> None:
    data = [torch.randn(64, 16)]
    recipe = LayerRecipe("static", observer="minmax")
    [layer] = diagnose(nn.Linear(16, 8), data, recipe=recipe).layers
    assert layer.activation_error is not None
    assert layer.activation_error.clipping == 0
    assert layer.weight_error.clipping == 0


def test_narrow_range_clips() -> None:
    data = [torch.randn(64, 16)]
    recipe = LayerRecipe("static", observer="minmax")
    narrow = [data[0] / 4]
    [layer] = diagnose(nn.Linear(16, 8), data, recipe=recipe, calibration=narrow).layers
    assert layer.activation_error is not None
    assert layer.activation_error.clipping > 0.95
    assert layer.saturation.activation is not None
    assert layer.saturation.activation > 0.05


def test_zeros_at_the_end_of_the_range_are_not_saturated() -> None:
    x = torch.randn(64, 16).relu()
    recipe = LayerRecipe("static", observer="minmax")
    [layer] = diagnose(nn.Linear(16, 8), [x], recipe=recipe).layers
    assert layer.saturation.activation is not None
    assert layer.saturation.activation < 0.02  # with the zeros it would be one half


# The rows that are kept


@pytest.mark.parametrize("sizes", [[1000], [1] * 1000, [7, 500, 0, 493]])
def test_kept_rows_do_not_depend_on_the_batches(sizes: list[int]) -> None:
    x = torch.arange(2000.0).reshape(1000, 2)
    inputs = Inputs(2, 50)
    for part in x.split(sizes):
        inputs.see(part)
    assert torch.equal(inputs.rows(), x[::16])
    assert torch.equal(inputs.amax, x.amax(0))
    assert inputs.calls == len(sizes)


def test_rows_with_nan_are_left_out() -> None:
    inputs = Inputs(3, 10)
    x = torch.ones(4, 3)
    x[1, 2], x[3, 0] = math.nan, math.inf
    inputs.see(x)
    assert inputs.non_finite == 2
    assert torch.equal(inputs.rows(), torch.ones(2, 3))
    assert torch.equal(inputs.amax, torch.ones(3))
