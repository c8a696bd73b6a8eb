"""SmoothQuant, AWQ's scaling, Hadamard rotation, bias correction, and the sums they stand on."""

import pytest
import torch

from zeropoint import WEIGHT_INT4, PerGroup, QuantSpec
from zeropoint.algorithms.awq import awq, output_error
from zeropoint.algorithms.bias_correction import correct_bias
from zeropoint.algorithms.grid import minmax_grid
from zeropoint.algorithms.hadamard import rotate_weight, rotation
from zeropoint.algorithms.inputs import InputStatistics
from zeropoint.algorithms.smooth import smooth
from zeropoint.input_transform import transform_input

INT4 = QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerGroup(16))


def outliers(rows=400, features=48):
    x = torch.randn(rows, features)
    x[:, 3] *= 60
    x[:, 20] *= 25
    return x


# SmoothQuant


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_is_equation_4(strength):
    weight, largest = torch.randn(7, 5), torch.rand(5) * 30 + 0.1
    s = largest**strength / weight.abs().amax(0) ** (1 - strength)
    torch.testing.assert_close(smooth(weight, largest, strength), 1 / s)


def test_at_one_half_activations_and_weights_are_equally_large():
    weight, x = torch.randn(16, 48), outliers()
    factor = smooth(weight, x.abs().amax(0))
    torch.testing.assert_close((x * factor).abs().amax(0), (weight / factor).abs().amax(0))


def test_channels_without_activations_or_weights_keep_the_factor_1():
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
    assert smooth(weight, torch.tensor([0.0, 5.0, 8.0, 0.0])).tolist() == [1.0, 1.0, 0.5, 1.0]


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_strength_out_of_range(strength):
    with pytest.raises(ValueError, match=r"strength must be within \[0, 1\]"):
        smooth(torch.ones(1, 1), torch.ones(1), strength)


@pytest.mark.parametrize("size", [1e-38, 1e38])
def test_extreme_sizes_give_factors_that_can_be_used(size):
    factor = smooth(torch.full((2, 3), 1 / size), torch.tensor([size, 1.0, 1e-45]))
    assert bool((factor > 0).all())
    assert bool(factor.isfinite().all())
    assert bool((1 / factor).isfinite().all())


# AWQ


def test_awq_protects_the_weights_of_large_activations():
    weight, x = torch.randn(32, 48), outliers()
    gram = x.T @ x / len(x)
    factor, exponent = awq(weight, INT4, x.abs().mean(0), gram)
    assert 0 < exponent < 1
    assert factor.argmin() == 3  # the largest activations: the most enlarged weights
    error = output_error(minmax_grid(weight, INT4).nearest(weight) - weight, gram)
    scaled = weight / factor
    left = (minmax_grid(scaled, INT4).nearest(scaled) - scaled) * factor
    assert output_error(left, gram) < 0.5 * error


def test_awq_takes_the_exponent_with_the_least_error():
    weight, x = torch.randn(8, 48), outliers()
    gram, magnitudes = x.T @ x / len(x), x.abs().mean(0)
    losses = {}
    for step in range(20):
        s = magnitudes ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        scaled = weight * s
        error = (minmax_grid(scaled, INT4).nearest(scaled) - scaled) / s
        losses[step / 20] = output_error(error, gram)
    factor, exponent = awq(weight, INT4, magnitudes, gram)
    assert exponent == min(losses, key=losses.__getitem__)
    s = magnitudes**exponent
    torch.testing.assert_close(factor, (s.max() * s.min()).sqrt() / s)


def test_awq_leaves_even_activations_alone():
    weight = torch.randn(8, 32)
    factor, exponent = awq(weight, WEIGHT_INT4, torch.ones(32), torch.eye(32))
    assert exponent == 0
    assert bool((factor == 1).all())


def test_awq_with_dead_channels():
    x = outliers()
    x[:, ::7] = 0
    factor, _ = awq(torch.randn(8, 48), INT4, x.abs().mean(0), x.T @ x / len(x))
    assert bool(((factor > 0) & factor.isfinite()).all())
    none, exponent = awq(torch.randn(8, 48), INT4, torch.zeros(48), torch.zeros(48, 48))
    assert exponent == 0
    assert bool((none == 1).all())


def test_awq_steps_out_of_range():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        awq(torch.randn(2, 4), INT4, torch.ones(4), torch.eye(4), steps=0)


# Hadamard


@pytest.mark.parametrize(
    ("features", "size"), [(1, 1), (2, 2), (12, 4), (64, 64), (384, 128), (9, 1)]
)
def test_rotation_keeps_lengths_and_the_layers_function(features, size):
    factor, block = rotation(features)
    assert block == size
    x, weight = torch.randn(20, features), torch.randn(3, features)
    turned = transform_input(x, factor, block)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(
        turned @ rotate_weight(weight, factor, block).T, x @ weight.T, rtol=1e-4, atol=1e-4
    )


def test_rotation_spreads_outliers():
    x = outliers(features=64)
    factor, block = rotation(64)
    turned = transform_input(x, factor, block)

    def peak(x):
        return float((x.abs().amax(1) / x.norm(dim=1)).mean())

    assert peak(x) > 0.8
    assert peak(turned) < 0.4


def test_signs_are_random_but_the_same_every_time_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    signs = rotation(1024)[0].sign()
    assert torch.equal(signs, rotation(1024)[0].sign())
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(signs, rotation(1024, seed=1)[0].sign())
    assert 400 < int((signs > 0).sum()) < 624


# Bias correction


def test_corrected_bias_gives_the_float_layers_mean():
    weight, bias, x = torch.randn(5, 12), torch.randn(5), torch.randn(200, 12) + 2
    rounded = weight.round()
    fixed = correct_bias(bias, weight, rounded, x.mean(0))
    before, after = (((x @ rounded.T + b) - (x @ weight.T + bias)).mean(0) for b in (bias, fixed))
    assert before.abs().max() > 0.1
    assert after.abs().max() < 1e-4


# Sums over the inputs


def test_sums_are_those_of_all_rows_together():
    x = torch.randn(3, 5000, 6)
    inputs = InputStatistics(6)
    for part in (x[0], x[1][:, None], x[2].reshape(5, 1000, 6), torch.empty(0, 6)):
        inputs.observe(part)
    rows = x.reshape(-1, 6).double()
    assert inputs.rows == 15000
    assert torch.equal(inputs.largest.double(), rows.abs().amax(0))
    torch.testing.assert_close(inputs.mean.double(), rows.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        inputs.mean_magnitude.double(), rows.abs().mean(0), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(inputs.gram.double(), rows.T @ rows / 15000, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_of_other_dtypes_are_float32(dtype):
    inputs = InputStatistics(4)
    inputs.observe(torch.ones(3, 4, dtype=dtype))
    assert inputs.gram.dtype == inputs.mean.dtype == inputs.largest.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sums_refuse_what_is_not_finite_and_take_nothing_in(value):
    inputs, x = InputStatistics(4), torch.ones(5000, 4)
    x[4999, 2] = value
    with pytest.raises(ValueError, match="x must be finite, got NaN or Inf in 1 of 20000 values"):
        inputs.observe(x)
    assert inputs.is_empty
    assert bool((inputs.gram == 0).all())


def test_sums_refuse_other_inputs():
    inputs = InputStatistics(4, gram=False)
    with pytest.raises(ValueError, match="x must have 4 channels"):
        inputs.observe(torch.ones(2, 3))
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        inputs.observe(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="products of channels were not gathered"):
        inputs.gram  # noqa: B018
