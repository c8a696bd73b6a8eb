"""GPTQ, against a direct implementation of its paper."""

import pytest
import torch

from zeropoint import PerChannel, PerGroup, PerTensor, QuantSpec, quantize_to_spec
from zeropoint.algorithms.awq import output_error
from zeropoint.algorithms.gptq import gptq, inverse_factor
from zeropoint.algorithms.grid import minmax_grid, nearest

CHANNEL4 = QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerChannel(0))


def group4(size, bits=4):
    return QuantSpec(bits=bits, signed=False, symmetric=False, granularity=PerGroup(size))


def layer(out, features, rows=200, seed=0):
    """A weight and the mean of xᵀx of inputs whose channels hang together; float64."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=g, dtype=torch.float64)
    x = torch.randn(rows, features, generator=g, dtype=torch.float64) @ mixing
    weight = torch.randn(out, features, generator=g, dtype=torch.float64)
    return weight, x.T @ x / rows, x


def paper(weight, spec, gram, *, size, order=None, damping=0.01, static=False):
    """Optimal Brain Quantization in a fixed order, as written: after each column, the inverse of
    the remaining H is updated by eliminating the column's row (Frantar and Alistarh 2022, eq. 3 and
    lemma 1; no Cholesky, no blocks, no lazy updates). ``order`` permutes the columns."""
    features = weight.shape[1]
    order = list(range(features)) if order is None else order
    w = weight.clone()
    h = gram + damping * gram.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    real = torch.empty_like(w)
    grid = minmax_grid(weight, spec)
    scale, zero_point = grid.columns()
    scale, zero_point = scale.clone(), zero_point.clone()
    done = []
    for j in order:
        if not static and j % size == 0:
            now = minmax_grid(w[:, j : j + size], spec).columns()
            end = min(j + size, features)
            scale[:, j:end], zero_point[:, j:end] = now
        real[:, j] = nearest(w[:, j], scale[:, j], zero_point[:, j], spec)
        error = (w[:, j] - real[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        done.append(j)
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
        inverse[done] = 0
        inverse[:, done] = 0
    return real


CASES = [
    (5, 12, CHANNEL4, 12),
    (5, 12, group4(4), 4),
    (5, 13, group4(4), 4),  # a short last group
    (3, 12, group4(5, bits=3), 5),
    (1, 7, group4(32), 7),  # one group, longer than the row
    (4, 1, CHANNEL4, 1),
    (4, 300, group4(64, bits=2), 64),  # beyond one block
    (3, 9, QuantSpec(bits=8, granularity=PerChannel(0)), 9),
]


@pytest.mark.parametrize(("out", "features", "spec", "size"), CASES)
def test_is_the_paper(out, features, spec, size):
    weight, gram, _ = layer(out, features)
    expected = paper(weight, spec, gram, size=size)
    found = gptq(weight, spec, gram, activation_order=False).dequantize().double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    if features > 1 and spec.bits < 8:  # else nothing was shown
        nearest_only = minmax_grid(weight, spec).nearest(weight)
        assert not torch.allclose(found, nearest_only)


@pytest.mark.parametrize(("out", "features", "spec", "size"), CASES)
def test_is_the_paper_in_activation_order(out, features, spec, size):
    weight, gram, _ = layer(out, features, seed=1)
    order = gram.diagonal().argsort(descending=True).tolist()
    expected = paper(weight, spec, gram, size=size, order=order, static=True)
    found = gptq(weight, spec, gram, activation_order=True).dequantize().double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("block", [1, 3, 16, 50, 1000])
@pytest.mark.parametrize("size", [1, 4, 7, 50, 64])
def test_blocks_change_nothing_but_the_order_of_sums(block, size):
    weight, gram, _ = layer(4, 50)
    for activation_order in (False, True):
        one, other = (
            gptq(weight, group4(size), gram, activation_order=activation_order, block=b)
            for b in (block, 128)
        )
        assert torch.equal(one.int_repr(), other.int_repr())
        assert torch.equal(one.scale, other.scale)


def test_float32_finds_nearly_what_float64_finds():
    weight, gram, _ = layer(32, 96, rows=1000)
    spec = group4(32)
    errors = [
        output_error(gptq(w, spec, gram).dequantize() - weight.float(), gram.float())
        for w in (weight, weight.float())
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("spec", [CHANNEL4, group4(16), group4(16, 2), QuantSpec(bits=4)])
def test_output_error_is_far_below_rounding_to_nearest(spec):
    weight, gram, _ = layer(16, 64, rows=500)
    before = output_error(quantize_to_spec(weight, spec).dequantize() - weight, gram)
    after = output_error(gptq(weight, spec, gram).dequantize() - weight, gram)
    assert after < 0.6 * before


def test_uncorrelated_channels_are_rounded_to_nearest():
    weight, _, _ = layer(5, 16)
    spec = group4(8)
    found = gptq(weight, spec, torch.eye(16, dtype=torch.float64) * 3)
    assert torch.equal(found.int_repr(), quantize_to_spec(weight, spec).int_repr())


def test_given_grid_is_kept():
    weight, gram, _ = layer(5, 16)
    grid = minmax_grid(weight * 0.7, group4(8))
    for activation_order in (False, True):
        found = gptq(weight, group4(8), gram, grid, activation_order=activation_order)
        assert torch.equal(found.scale, grid.scale)
        assert torch.equal(found.zero_point, grid.zero_point)


def test_per_tensor():
    weight, gram, _ = layer(5, 16)
    spec = QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerTensor())
    found = gptq(weight, spec, gram)
    assert found.scale.shape == ()
    before = quantize_to_spec(weight, spec).dequantize() - weight
    assert output_error(found.dequantize() - weight, gram) < output_error(before, gram)


@pytest.mark.parametrize("activation_order", [False, True])
def test_dead_channels_are_rounded_to_nearest_and_disturb_nothing(activation_order):
    weight, _, x = layer(5, 12)
    x[:, [2, 7]] = 0
    gram = x.T @ x / len(x)
    spec = QuantSpec(bits=4, granularity=PerGroup(1))  # each column by itself
    found = gptq(weight, spec, gram, activation_order=activation_order)
    assert torch.equal(
        found.int_repr()[:, [2, 7]], quantize_to_spec(weight, spec).int_repr()[:, [2, 7]]
    )
    live = [i for i in range(12) if i not in (2, 7)]
    # Alone, with H's mean diagonal, and so the damping, as it is with the dead ones.
    damping = 0.01 * float(gram.diagonal().mean() / gram.diagonal()[live].mean())
    alone = gptq(
        weight[:, live],
        spec,
        gram[live][:, live],
        activation_order=activation_order,
        damping=damping,
    )
    torch.testing.assert_close(found.dequantize()[:, live], alone.dequantize())


def test_no_activations_at_all():
    weight, _, _ = layer(3, 8)
    found = gptq(weight, CHANNEL4, torch.zeros(8, 8))
    assert torch.equal(found.int_repr(), quantize_to_spec(weight, CHANNEL4).int_repr())


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_rows_than_channels_make_a_singular_gram(damping):
    weight, gram, _ = layer(3, 24, rows=4)
    found = gptq(weight, CHANNEL4, gram, damping=damping)
    before = quantize_to_spec(weight, CHANNEL4).dequantize() - weight
    assert output_error(found.dequantize() - weight, gram) < 0.2 * output_error(before, gram)


def test_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, gram, _ = layer(1, 20)
    u = inverse_factor(gram, 0.01)
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(u, torch.linalg.cholesky(torch.linalg.inv(h), upper=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gram": torch.eye(3)}, r"gram must have shape \(4, 4\)"),
        ({"gram": torch.full((4, 4), torch.nan)}, "gram must be finite"),
        ({"gram": -torch.eye(4)}, "gram must have no negative diagonal"),
        ({"damping": -0.1}, "damping must be at least 0"),
        ({"damping": float("nan")}, "damping must be at least 0"),
        ({"block": 0}, "block must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    arguments = {"gram": torch.eye(4), **arguments}
    with pytest.raises(ValueError, match=message):
        gptq(torch.randn(2, 4), CHANNEL4, **arguments)
