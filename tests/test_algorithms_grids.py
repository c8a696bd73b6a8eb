"""Grids chosen by search, by a robust fit, and by what errors do to the output."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropoint import PerChannel, PerGroup, PerTensor, QuantSpec, quantize_to_spec
from zeropoint.affine import choose_qparams
from zeropoint.algorithms.awq import clip_to_inputs, output_error
from zeropoint.algorithms.clip import clip
from zeropoint.algorithms.grid import SHRINKING, group_size, grouped, minmax_grid, nearest
from zeropoint.algorithms.hqq import hqq

SPECS = [
    QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerGroup(8)),
    QuantSpec(bits=4, granularity=PerGroup(7)),
    QuantSpec(bits=2, signed=False, symmetric=False, granularity=PerChannel(0)),
    QuantSpec(bits=3, granularity=PerChannel(0)),
    QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerTensor()),
    QuantSpec(8, False, False, PerGroup(8), torch.bfloat16),
    QuantSpec(4, True, True, PerGroup(100), torch.float16),
]


def squared(grid, weight):
    """Squared error of each group, (rows, groups)."""
    return grouped(grid.nearest(weight) - weight, grid.spec).square().sum(2)


# Grids


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(3, 20), (1, 1), (4, 1), (2, 8)])
def test_smallest_to_largest_is_what_quantize_to_spec_does(spec, shape):
    weight = torch.randn(shape)
    grid, expected = minmax_grid(weight, spec), quantize_to_spec(weight, spec)
    found = grid.qtensor(weight)
    assert torch.equal(found.int_repr(), expected.int_repr())
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero_point, expected.zero_point)
    assert found.spec.granularity == expected.spec.granularity
    torch.testing.assert_close(grid.nearest(weight), found.dequantize())


def test_group_sizes():
    assert group_size(QuantSpec(bits=4, granularity=PerGroup(32)), 100) == 32
    assert group_size(QuantSpec(bits=4, granularity=PerGroup(32)), 5) == 5
    assert group_size(QuantSpec(granularity=PerChannel(0)), 100) == 100


# Clipping


@pytest.mark.parametrize("spec", SPECS)
def test_clipping_never_loses_and_wins_with_outliers(spec):
    weight = torch.randn(6, 40)
    weight[::2, 5] *= 12
    before, after = squared(minmax_grid(weight, spec), weight), squared(clip(weight, spec), weight)
    assert bool((after <= before).all())
    if spec.bits < 8:
        assert after.sum() < 0.98 * before.sum()


def test_clipping_finds_the_best_of_all_ranges_it_may_choose():
    spec = QuantSpec(bits=3, granularity=PerChannel(0))
    weight = torch.randn(4, 30)
    found = squared(clip(weight, spec), weight)
    largest = weight.abs().amax(1)
    for f in SHRINKING:
        scale, zero_point = choose_qparams(-f * largest, f * largest, spec)
        error = nearest(weight, scale[:, None], zero_point[:, None], spec) - weight
        assert bool((found[:, 0] <= error.square().sum(1) * (1 + 1e-6)).all())


@pytest.mark.parametrize("sign", [1, -1])
def test_one_end_is_clipped_alone_where_only_it_has_an_outlier(sign):
    spec = QuantSpec(bits=4, signed=False, symmetric=False, granularity=PerChannel(0))
    weight = sign * torch.cat([torch.linspace(-1, 1, 5000), torch.tensor([4.0])])[None]
    grid = clip(weight, spec)
    ends = (grid.scale * (q - grid.zero_point) * sign for q in (spec.qmin, spec.qmax))
    low, high = sorted(float(end) for end in ends)
    assert high < 2
    assert low < -0.9


def test_chunks_do_not_matter(monkeypatch):
    weight, spec = torch.randn(7, 24), SPECS[0]
    whole = clip(weight, spec)
    monkeypatch.setattr("zeropoint.algorithms.grid._CHUNK", 50)
    parts = clip(weight, spec)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero_point, parts.zero_point)


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from(SPECS),
    st.sampled_from(["zero", "constant", "tiny", "huge", "normal"]),
    st.integers(0, 10**6),
)
def test_any_weight_gets_grids_that_can_be_used(out, features, spec, kind, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, features, generator=g)
    if kind in ("zero", "constant"):
        weight = torch.full_like(weight, 0.0 if kind == "zero" else -2.5)
    elif kind in ("tiny", "huge") and spec.scale_dtype != torch.float16:
        weight = weight * (1e-38 if kind == "tiny" else 1e36)
    gram = torch.randn(features, features, generator=g)
    for grid in (
        clip(weight, spec),
        hqq(weight, spec),
        clip_to_inputs(weight, spec, gram @ gram.T),
    ):
        q = grid.qtensor(weight)  # checks scales and zero points
        assert q.shape == weight.shape
        assert bool(q.dequantize().isfinite().all())
        if kind == "zero":
            assert bool((q.dequantize() == 0).all())


# HQQ


@pytest.mark.parametrize("spec", SPECS)
def test_hqq_lowers_what_it_minimizes_in_every_group(spec):
    weight = torch.distributions.StudentT(3.0).sample((8, 64))

    def cost(grid):
        return grouped(grid.nearest(weight) - weight, spec).abs().pow(0.7).sum(2)

    before, after = cost(minmax_grid(weight, spec)), cost(hqq(weight, spec))
    assert bool((after <= before * (1 + 1e-6)).all())
    assert after.sum() < 0.995 * before.sum() or spec.bits == 8


def test_hqq_lets_an_outlier_go():
    spec = QuantSpec(bits=3, granularity=PerChannel(0))
    weight = torch.cat([torch.linspace(-1, 1, 200), torch.tensor([4.0])])[None]
    grid = hqq(weight, spec)
    assert float(grid.scale) < 0.9 * float(minmax_grid(weight, spec).scale)


@pytest.mark.parametrize(
    "number", [{"norm": 0}, {"norm": 1.5}, {"beta": 0}, {"kappa": 0.9}, {"steps": 0}]
)
def test_hqq_refuses_numbers_out_of_range(number):
    with pytest.raises(ValueError, match=f"{next(iter(number))} is out of range"):
        hqq(torch.randn(2, 4), SPECS[0], **number)


# Clipping by what the errors do to the output


def block_diagonal(gram, size):
    at = torch.arange(len(gram)) // size
    return gram * (at[:, None] == at)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("features", [40, 45])
def test_errors_are_weighed_by_the_inputs(spec, features):
    weight, x = torch.randn(6, features), torch.randn(300, features)
    x[:, ::5] *= 10
    gram = x.T @ x / len(x)
    if isinstance(spec.granularity, PerTensor):
        weigh = torch.diag(gram.diagonal())
    else:
        weigh = block_diagonal(gram, group_size(spec, features))
    before, plain, after = (
        output_error(grid.nearest(weight) - weight, weigh)
        for grid in (
            minmax_grid(weight, spec),
            clip(weight, spec),
            clip_to_inputs(weight, spec, gram),
        )
    )
    assert after <= before
    if spec.bits < 8:
        assert after < 0.98 * min(before, plain if spec.symmetric else before)


def test_output_error_is_the_error_of_the_output():
    error, x = torch.randn(5, 12), torch.randn(50, 12)
    expected = float((x @ error.T).square().sum())
    assert output_error(error, x.T @ x) == pytest.approx(expected, rel=1e-5)
