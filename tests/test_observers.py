import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropoint import ACTIVATION_UINT8, PerChannel, QuantSpec, choose_qparams, quantize_per_tensor
from zeropoint.observers import (
    DEFAULT_OBSERVER,
    OBSERVERS,
    EntropyObserver,
    GrowingHistogram,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
    _divergence,
    _qparams,
)

SYMMETRIC = QuantSpec(signed=True, symmetric=True)
every_observer = pytest.mark.parametrize("name", OBSERVERS)
every_spec = pytest.mark.parametrize("spec", [ACTIVATION_UINT8, SYMMETRIC], ids=["uint8", "int8"])


def observed(name, *batches):
    observer = OBSERVERS[name]()
    for batch in batches:
        observer.observe(batch)
    return observer


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_error(x, qparams):
    return float((x - quantize_per_tensor(x, *qparams, torch.uint8).dequantize()).square().mean())


@every_observer
@every_spec
def test_qparams_are_0d_and_valid(name, spec):
    scale, zero_point = observed(name, normal(64, 8)).qparams(spec)
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert (zero_point.dtype, zero_point.shape) == (torch.int32, ())
    assert 0 < scale < math.inf
    assert spec.qmin <= zero_point <= spec.qmax
    if spec.symmetric:
        assert zero_point == spec.zero_point_if_symmetric


@every_observer
@every_spec
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(5),
        torch.tensor([3.0]),
        torch.tensor(-2.5),
        torch.full((4, 4), 7.0),
        torch.tensor([1e-45, -1e-45]),
        torch.tensor([3.4e38, -3.4e38]),
        torch.tensor([1e-40, 3e38]),
        torch.arange(6.0).to(torch.bfloat16),
        torch.arange(6.0, dtype=torch.float64),
    ],
    ids=["zeros", "one", "0d", "constant", "denormal", "huge", "wide", "bfloat16", "float64"],
)
def test_degenerate_values(name, spec, x):
    observer = observed(name, x)
    lo, hi = observer.range(spec)
    assert min(0, x.min()) <= lo <= max(0, x.max())
    assert min(0, x.min()) <= hi <= max(0, x.max())
    assert lo <= hi
    scale, zero_point = observer.qparams(spec)
    assert 0 < scale < math.inf
    assert spec.qmin <= zero_point <= spec.qmax


@every_observer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused_and_leave_no_trace(name, bad):
    observer = observed(name, torch.tensor([1.0, 2.0]))
    before = observer.range(ACTIVATION_UINT8)
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 3 values"):
        observer.observe(torch.tensor([9.0, bad, -9.0]))
    assert observer.range(ACTIVATION_UINT8) == before


@every_observer
def test_nothing_observed(name):
    observer = OBSERVERS[name]()
    observer.observe(torch.empty(0, 7))
    assert observer.is_empty
    with pytest.raises(ValueError, match="no values were observed"):
        observer.qparams(ACTIVATION_UINT8)


@every_observer
def test_wrong_types_and_specs(name):
    observer = OBSERVERS[name]()
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        observer.observe(torch.arange(3))
    with pytest.raises(TypeError, match="got list"):
        observer.observe([1.0])
    observer.observe(torch.ones(2))
    with pytest.raises(ValueError, match="per tensor"):
        observer.qparams(QuantSpec(granularity=PerChannel(0)))


@every_observer
def test_gradients_and_strides_do_not_matter(name):
    x = normal(8, 6)
    plain = observed(name, x).range(ACTIVATION_UINT8)
    assert observed(name, x.clone().requires_grad_()).range(ACTIVATION_UINT8) == plain
    strided = torch.stack((x, x), -1)[..., 0]
    assert not strided.is_contiguous()
    assert observed(name, strided).range(ACTIVATION_UINT8) == plain


@pytest.mark.parametrize("name", [n for n in OBSERVERS if n != "moving-average"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), parts=st.integers(1, 6), growth=st.floats(-20, 20))
def test_order_and_batching_do_not_matter(name, seed, parts, growth):
    x = normal(240, seed=seed) * torch.logspace(0, growth, 240, base=2.0)
    whole = observed(name, x).range(ACTIVATION_UINT8)
    split = observed(name, *reversed(x.chunk(parts))).range(ACTIVATION_UINT8)
    assert split == pytest.approx(whole, rel=1e-6, abs=1e-30)


def test_min_max_keeps_everything():
    observer = observed("minmax", torch.tensor([-1.0, 0.0]), torch.tensor([5.0]))
    assert observer.range(ACTIVATION_UINT8) == (-1.0, 5.0)
    expected = choose_qparams(torch.tensor(-1.0), torch.tensor(5.0), ACTIVATION_UINT8)
    assert observer.qparams(ACTIVATION_UINT8) == expected


def test_moving_average_is_the_recurrence():
    observer = MovingAverageObserver(momentum=0.25)
    for lo, hi in ((-1.0, 2.0), (-5.0, 10.0), (-1.0, 4.0)):
        observer.observe(torch.tensor([lo, hi]))
    lo = -1 + 0.25 * (-5 + 1)
    hi = 2 + 0.25 * (10 - 2)
    expected = (lo + 0.25 * (-1 - lo), hi + 0.25 * (4 - hi))
    assert observer.range(ACTIVATION_UINT8) == pytest.approx(expected)


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.1, math.nan])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match="momentum"):
        MovingAverageObserver(momentum)


@pytest.mark.parametrize("percentile", [0.0, -1, 100.1, math.nan])
def test_percentile_out_of_range(percentile):
    with pytest.raises(ValueError, match="percentile"):
        PercentileObserver(percentile)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.9])
@pytest.mark.parametrize("relu", [False, True])
def test_percentile_agrees_with_numpy(percentile, relu):
    x = normal(20_010)  # so that no cut falls between two values, where definitions differ
    x = x.relu() if relu else x
    observer = PercentileObserver(percentile)
    observer.observe(x)
    cut = (100 - percentile) / 2
    expected = np.percentile(x.numpy(), [cut, 100 - cut], method="inverted_cdf")
    assert observer.range(ACTIVATION_UINT8) == pytest.approx(expected, abs=2e-3)


def test_percentile_100_is_min_max():
    x = normal(1000)
    observer = PercentileObserver(100)
    observer.observe(x)
    assert observer.range(ACTIVATION_UINT8) == (float(x.min()), float(x.max()))


def test_percentile_counts_zeros():
    observer = PercentileObserver(80)
    observer.observe(torch.cat((torch.zeros(95), torch.full((5,), 9.0))))
    assert observer.range(ACTIVATION_UINT8)[1] == 0.0


@every_spec
def test_cost_of_a_range_uses_choose_qparams(spec):
    for lo, hi in ((-1.0, 1.55), (0.0, 6.0), (-3.0, 0.0), (-1e-30, 2e30), (0.0, 0.0)):
        scale, zero_point = choose_qparams(torch.tensor(lo), torch.tensor(hi), spec)
        ours = _qparams(lo, hi, spec)
        assert ours[0] == pytest.approx(float(scale), rel=1e-6)
        assert ours[1] == zero_point


def test_mse_finds_nearly_the_best_range_of_a_fine_grid():
    x = normal(8000) * (1 + normal(8000, seed=1).square())
    found = squared_error(x, observed("mse", x).qparams(ACTIVATION_UINT8))
    ends = torch.linspace(0.2, 1.0, 25)
    best = min(
        squared_error(x, choose_qparams(a * x.min(), b * x.max(), ACTIVATION_UINT8))
        for a in ends
        for b in ends
    )
    assert found <= 1.02 * best


@pytest.mark.parametrize("sign", [1, -1])
def test_mse_keeps_a_short_end_full_of_values(sign):
    # As behind a GELU: a crowd at −1, and a long thin tail on the other side that is best cut.
    # Cutting both ends in proportion would lose the crowd.
    tail = torch.cat((torch.linspace(0, 2, 10_000), torch.tensor([40.0])))
    x = torch.cat((torch.full((100_000,), -1.0) + 0.01 * normal(100_000), tail))
    ends = observed("mse", sign * x).range(ACTIVATION_UINT8)
    lo, hi = sorted(sign * end for end in ends)
    assert lo < -0.9
    assert hi < 0.9 * x.max()


def test_mse_keeps_outliers_that_are_worth_it():
    x = torch.cat((normal(1000), torch.tensor([60.0])))
    assert observed("mse", x).range(ACTIVATION_UINT8)[1] > 50


@pytest.mark.parametrize("name", ["percentile", "mse", "entropy"])
def test_long_tails_are_clipped(name):
    x = torch.distributions.StudentT(3.0).sample((100_000,))
    lo, hi = observed(name, x).range(ACTIVATION_UINT8)
    assert x.min() < lo < 0 < hi < x.max()
    if name == "mse":
        least = squared_error(x, observed("minmax", x).qparams(ACTIVATION_UINT8))
        assert squared_error(x, observed(name, x).qparams(ACTIVATION_UINT8)) < least


def test_symmetric_search_uses_the_larger_side():
    x = torch.cat((normal(2000), torch.tensor([-4.0])))
    scale, _ = MSEObserver.qparams(observed("mse", x), SYMMETRIC)
    assert 3.0 / 127 < scale < 5.0 / 127


def test_divergence_by_hand():
    # Four bins into two: P = (1, 3, 2, 2)/8, Q spreads each pair evenly: (2, 2, 2, 2)/8.
    counts = np.array([1.0, 3.0, 2.0, 2.0])
    expected = (math.log(1 / 2) + 3 * math.log(3 / 2)) / 8
    assert _divergence(counts, 0, 4, 2) == pytest.approx(expected)
    # An empty bin gets nothing back: (0, 4) spreads to (0, 4), a perfect copy.
    assert _divergence(np.array([0.0, 4.0, 1.0, 1.0]), 0, 4, 2) == pytest.approx(0)
    # Clipped: the tail joins the edge bin of P only. P = (1, 3, 2, 2+8)/16, Q as above.
    expected = sum(p / 16 * math.log(p / 16 / 0.25) for p in (1, 3, 2, 10))
    assert _divergence(np.array([1.0, 3, 2, 2, 8]), 0, 4, 2) == pytest.approx(expected)
    assert _divergence(np.array([1.0, 3, 2, 0, 8]), 0, 4, 2) == math.inf
    assert _divergence(counts, 0, 1, 2) == math.inf


def test_entropy_ignores_the_zeros_behind_a_relu():
    x = normal(30_000).relu()
    nonzero = x[x > 0]
    assert observed("entropy", x).range(ACTIVATION_UINT8) == observed("entropy", nonzero).range(
        ACTIVATION_UINT8
    )
    assert EntropyObserver.BINS < GrowingHistogram.LIMIT


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=8),
        min_size=1,
        max_size=5,
    )
)
def test_histogram_grows_exactly(batches):
    histogram, lo, hi = GrowingHistogram(), math.inf, -math.inf
    for batch in batches:
        x = torch.tensor(batch)
        if batch:
            lo, hi = min(lo, float(x.min())), max(hi, float(x.max()))
            histogram.add(x, lo, hi)
    values = np.concatenate([np.asarray(b, np.float32) for b in batches]).astype(np.float64)
    nonzero = values[values != 0]
    assert histogram.zeros == len(values) - len(nonzero)
    if not len(nonzero):
        return
    assert len(histogram.counts) <= GrowingHistogram.LIMIT
    index = np.floor(np.ldexp(nonzero, -histogram.exponent)).astype(np.int64) - histogram.first
    expected = np.bincount(index, minlength=len(histogram.counts))
    assert np.array_equal(histogram.counts, expected)
    means, counts = histogram.points()
    total = np.abs(nonzero).sum()
    assert float(means @ counts) == pytest.approx(nonzero.sum(), abs=1e-6 * total)


def test_histogram_is_fine():
    histogram = GrowingHistogram()
    histogram.add(torch.tensor([-1.0, 3.0]), -1.0, 3.0)
    assert GrowingHistogram.LIMIT / 2 <= len(histogram.counts) <= GrowingHistogram.LIMIT


def test_default_is_best_on_activation_like_data():
    # Why "mse" is the default: no other is close to the best on all of these.
    train, test = normal(2048, 128, seed=1), normal(2048, 128, seed=2)
    wild = torch.ones(128)
    wild[::40] = 25
    kinds = {
        "plain": lambda x: x,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "outlier channels": lambda x: x * wild,
        "massive values": lambda x: torch.where(x > 4.0, 300.0, x),
        "cubed": lambda x: x**3,
        "softmax": lambda x: torch.softmax(3 * x, -1),
    }
    worst = dict.fromkeys(OBSERVERS, 0.0)
    for f in kinds.values():
        errors = {
            name: squared_error(f(test), observed(name, f(train)).qparams(ACTIVATION_UINT8))
            for name in OBSERVERS
        }
        for name, error in errors.items():
            worst[name] = max(worst[name], 10 * math.log10(error / min(errors.values())))
    assert min(worst, key=worst.__getitem__) == DEFAULT_OBSERVER == "mse"
    assert worst["mse"] < 1  # decibels behind the best observer of each kind


def test_names():
    assert list(OBSERVERS) == ["minmax", "moving-average", "percentile", "mse", "entropy"]
    assert OBSERVERS["minmax"] is MinMaxObserver
