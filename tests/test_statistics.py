"""Intervals hold the truth as often as they say; differences are called what they are."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from zeropoint.statistics import FEW, MANY, Estimate, estimate, paired, samples_needed


def coverage(draw, truth: float, n: int, repeats: int = 200) -> float:
    hits = 0
    for seed in range(repeats):
        e = estimate(draw(np.random.default_rng(seed), n), seed=seed)
        hits += e.low <= truth <= e.high
    return hits / repeats


@pytest.mark.parametrize("n", [3, FEW - 1, FEW, 60])
def test_intervals_hold_the_mean_as_often_as_they_say(n: int, monkeypatch) -> None:
    monkeypatch.setattr("zeropoint.statistics.RESAMPLES", 999)
    assert 0.90 <= coverage(lambda rng, n: rng.normal(2, 3, n), 2, n) <= 0.99


@pytest.mark.parametrize("p", [0.5, 0.98])
def test_shares_near_one_are_covered_too(p: float) -> None:
    # An interval by Wald, p ± z·√(p(1 − p)/n), would hold 0.98 in two of three cases only.
    covered = 0.0
    for k in range(51):
        e = estimate([1.0] * k + [0.0] * (50 - k))
        covered += math.comb(50, k) * p**k * (1 - p) ** (50 - k) * (e.low <= p <= e.high)
    assert covered >= 0.91


@pytest.mark.parametrize("n", [1, 5, 100])
def test_all_right_is_no_certainty(n: int) -> None:
    e = estimate(np.ones(n))
    assert e.value == e.high == 1
    assert 0.05 ** (1 / n) - 0.2 < e.low < 0.05 ** (1 / n) + 0.2  # the rule of three, about
    assert e.low < 1 - 1 / n / 2


def test_one_sample_says_nothing_of_the_mean() -> None:
    e = estimate([0.3])
    assert (e.value, e.low, e.high, e.method) == (0.3, -math.inf, math.inf, "none")
    assert e.to_dict()["low"] is None


def test_constant_samples() -> None:
    e = estimate([0.3] * 50)
    assert e.low == e.high == e.value == pytest.approx(0.3)
    assert e.method == "constant"


def test_almost_constant_samples() -> None:
    for other in (0.3 + 3e-16, 0.3 + 1e-9, 0.4):
        e = estimate([0.3] * 49 + [other])
        assert e.low <= e.value <= e.high


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_not_hidden(bad: float) -> None:
    e = estimate([1.0, bad, 0.5])
    assert not math.isfinite(e.value)
    assert math.isnan(e.low)
    d = paired([1.0, 1.0, 0.5], [1.0, bad, 0.5])
    assert not d.significant
    assert "not a finite number" in d.verdict
    assert d.to_dict()["p_value"] is None


def test_methods_agree_where_they_meet() -> None:
    x = np.random.default_rng(0).exponential(size=MANY + 1)
    t, bca = estimate(x), estimate(x[:-1])
    assert (t.method, bca.method) == ("t", "bca")
    assert t.low == pytest.approx(bca.low, abs=0.2 * (t.high - t.low))
    assert t.high == pytest.approx(bca.high, abs=0.2 * (t.high - t.low))


def test_same_seed_same_interval() -> None:
    x = np.random.default_rng(0).exponential(size=50)
    assert estimate(x, seed=1) == estimate(x, seed=1)
    assert estimate(x, seed=1) != estimate(x, seed=2)


@pytest.mark.parametrize("n", [10, 40])
def test_weights_make_a_ratio(n: int) -> None:
    rng = np.random.default_rng(0)
    w = rng.integers(1, 100, n).astype(float)
    x = rng.normal(size=n)
    e = estimate(x, weights=w)
    assert e.value == pytest.approx((w * x).sum() / w.sum())
    assert e.low < e.value < e.high
    assert estimate(x, weights=np.full(n, 3.0)) == estimate(x)


def test_higher_level_wider_interval() -> None:
    for x in ([0.0, 1.0, 1.0], [0.1, 0.5, 0.2], np.random.default_rng(0).normal(size=30)):
        narrow, wide = estimate(x, level=0.5), estimate(x, level=0.99)
        assert wide.low < narrow.low < narrow.high < wide.high


def test_tensors_of_any_dtype() -> None:
    x = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    expected = estimate(x.tolist())
    for dtype in (torch.bool, torch.int64, torch.bfloat16):
        assert estimate(x.to(dtype)) == expected
    assert estimate(x.requires_grad_()) == expected


# Paired differences


def test_mcnemar_of_binary_scores() -> None:
    before = [1] * 90 + [1] * 9 + [0]
    after = [1] * 90 + [0] * 9 + [1]
    d = paired(before, after)
    assert d.p_value == pytest.approx(2 * (1 + 10) / 2**10)  # at most 1 of 10 fair coins
    assert d.significant
    assert d.change.high < 0


def test_no_discordant_pair_is_no_certainty() -> None:
    scores = [1.0] * 95 + [0.0] * 5
    d = paired(scores, scores)
    assert d.p_value == 1
    assert d.samples_needed is None
    assert d.change.value == 0
    assert d.change.high == -d.change.low > 2 / 100  # "rule of three": 3 of 100
    assert d.verdict == "no difference on 100 samples"


@pytest.mark.parametrize("n", [8, 300, MANY + 1])
def test_false_alarms_are_as_rare_as_they_should_be(n: int, monkeypatch) -> None:
    monkeypatch.setattr("zeropoint.statistics.RESAMPLES", 399)
    monkeypatch.setattr("zeropoint.statistics.estimate", lambda x, **_: Estimate(x.mean(), 0, 0, n))
    rng = np.random.default_rng(0)
    alarms = 0
    for seed in range(200):
        common = rng.normal(size=n)
        a, b = (common + 0.1 * rng.normal(size=n) for _ in range(2))
        alarms += paired(a, b, seed=seed).significant
    assert 2 <= alarms <= 20


def test_pairing_finds_what_two_means_would_not() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=200)
    after = before - 0.02 + 0.05 * rng.normal(size=200)
    d = paired(before, after)
    assert d.significant
    assert d.before.low < d.after.value < d.before.high  # apart, they are not to be told


def test_so_many_samples_settle_it(monkeypatch) -> None:
    monkeypatch.setattr("zeropoint.statistics.RESAMPLES", 399)
    rng = np.random.default_rng(1)
    needed = samples_needed(1.0, 0.2)
    assert needed == math.ceil((1.959964 + 0.841621) ** 2 / 0.04)
    found = sum(
        paired(np.zeros(needed), rng.normal(0.2, 1, needed), seed=seed).significant
        for seed in range(150)
    )
    assert 0.7 <= found / 150 <= 0.9  # POWER is 0.8


def test_verdict_says_how_many_would_settle_it() -> None:
    rng = np.random.default_rng(0)
    d = paired(np.zeros(50), rng.normal(0.1, 1, 50))
    assert not d.significant
    assert f"about {d.samples_needed:,} would settle it" in d.verdict


def test_a_constant_loss_is_significant_from_six_samples_on() -> None:
    assert not paired([0.5] * 5, [0.4] * 5).significant
    assert paired([0.5] * 6, [0.4] * 6).significant
    assert paired([0.5] * 5, [0.4] * 5).samples_needed == 6


# What is refused


@pytest.mark.parametrize(
    ("samples", "arguments", "message"),
    [
        ([], {}, "samples must be 1-d and not empty"),
        ([[1.0]], {}, r"got shape \(1, 1\)"),
        ([1.0], {"level": 1.0}, "level must be between 0 and 1"),
        ([1.0, 2.0], {"weights": [1.0]}, "weights must be 2 positive numbers"),
        ([1.0, 2.0], {"weights": [1.0, 0.0]}, "weights must be 2 positive numbers"),
    ],
)
def test_wrong_arguments(samples, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(samples, **arguments)


def test_other_samples() -> None:
    with pytest.raises(ValueError, match="same samples, got 2 and 3"):
        paired([1, 0], [1, 0, 1])


def test_without_scipy_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install 'zeropoint\[search\]'"):
        estimate([0.1, 0.2])
