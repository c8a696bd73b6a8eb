"""How sure a number is: intervals, differences of two models on the same samples, and splits.

Scores are one number a sample (an image named rightly: 1, else 0; a text's loss; a cosine). Their
mean is the metric, and how far the mean may be off is what this file tells. Needs scipy, and for
:func:`split` scikit-learn: ``pip install 'zeropoint[search]'``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
"""How sure an interval is by default: of 100 such intervals, about 95 hold the true mean."""
POWER = 0.8
"""With which probability :func:`samples_needed` samples would show a difference that is there."""
FEW, MANY = 20, 2000
"""From how many samples on, and up to how many, an interval is a bootstrap one."""
RESAMPLES = 9999
_ROUNDING = 1e-12  # of float64 sums: samples that differ by no more are equal


@dataclass(frozen=True)
class Estimate:
    """A mean over samples, and the interval in which the true mean lies with probability ``level``.

    Args:
        value: the mean of the samples.
        low, high: ends of the interval. −inf and inf: one sample says nothing about them; NaN:
            some sample is not a finite number.
        n: how many samples.
        level: of confidence, between 0 and 1.
        method: how the interval was found, see :func:`estimate`.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = LEVEL
    method: str = ""

    def __str__(self) -> str:
        """``0.9833 (0.9685 … 0.9912, n = 540)``."""
        value, low, high = (f"{x:.4g}" for x in (self.value, self.low, self.high))
        return f"{value} ({low} … {high}, n = {self.n})".replace("-", "−")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; what is not finite is ``None``."""
        return {k: _json(v) for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any] | None) -> Estimate | None:
        """The inverse of :meth:`to_dict`; ``None`` stays what it is."""
        if d is None:
            return None
        content = {f.name: d[f.name] for f in fields(cls)}
        open_ended = content["value"] is not None and content["n"] == 1
        for name, missing in (("value", math.nan), ("low", -math.inf), ("high", math.inf)):
            if content[name] is None:
                content[name] = missing if open_ended else math.nan
        return cls(**content)


@dataclass(frozen=True)
class Comparison:
    """What changed between two models that saw the same samples; made by :func:`paired`.

    Args:
        before, after: their means.
        change: ``after − before``, its interval from the differences sample by sample, which are
            far less noisy than the two means.
        p_value: probability of a change at least as large, either way, if there were none.
        samples_needed: how many samples would show a change as large as this one, if it is real,
            with probability :data:`POWER`; ``None`` where no change was seen.
    """

    before: Estimate
    after: Estimate
    change: Estimate
    p_value: float
    samples_needed: int | None

    @property
    def significant(self) -> bool:
        """Chance alone would bring such a change in less than ``1 − level`` of all cases."""
        return self.p_value <= 1 - self.change.level

    @property
    def verdict(self) -> str:
        """``significant``, or why not and what would settle it."""
        n = f"{self.change.n:,}"
        if math.isnan(self.p_value):
            return "not comparable: some score is not a finite number"
        if self.significant:
            return f"significant at {n} samples ({_p(self.p_value)})"
        if self.samples_needed is None:
            return f"no difference on {n} samples"
        return (
            f"not significant at {n} samples ({_p(self.p_value)}); if the difference is real, "
            f"about {max(self.samples_needed, self.change.n + 1):,} would settle it"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; what is not finite is ``None``."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "change": self.change.to_dict(),
            "p_value": _json(self.p_value),
            "samples_needed": self.samples_needed,
            "significant": self.significant,
            "verdict": self.verdict,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any] | None) -> Comparison | None:
        """The inverse of :meth:`to_dict`; ``None`` stays what it is."""
        if d is None:
            return None
        parts = (Estimate.from_dict(d[k]) for k in ("before", "after", "change"))
        before, after, change = parts
        assert before is not None
        assert after is not None
        assert change is not None
        p = math.nan if d["p_value"] is None else d["p_value"]
        return cls(before, after, change, p, d["samples_needed"])


def scores(name: str, value: Any) -> tuple[float, np.ndarray | None]:
    """What a metric returned: its value, and the scores of the samples where it gave them.

    Args:
        name: how errors call the metric.
        value: a number, or per-sample scores, 1-d (tensor, array or sequence), whose mean counts.

    Returns:
        The value, and float64 ``(n,)``; ``None`` for a number.

    Raises:
        TypeError: neither a number nor 1-d.

    >>> scores("metric(model)", torch.tensor([1.0, 0.0, 1.0, 1.0]))
    (0.75, array([1., 0., 1., 1.]))
    """
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        found = _array(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a number, or 1-d scores of the samples, got {type(value).__name__}"
        ) from error
    if found.size == 1 and found.ndim < 2:
        return float(found.reshape(-1)[0]), None
    if found.ndim != 1 or not found.size:
        raise TypeError(
            f"{name} must be a number, or 1-d scores of the samples, got shape {found.shape}"
        )
    return float(found.mean()), found


def estimate(
    samples: Any,
    *,
    weights: Any = None,
    binary: bool | None = None,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """The mean of the samples and its confidence interval.

    ==============  ==============================================================================
    method          where, and whose
    ==============  ==============================================================================
    ``wilson``      all samples 0 or 1: the score interval (Wilson 1927), which is right for few
                    samples too, and does not claim certainty where all are equal
    ``bca``         20 to 2,000 samples: the bias-corrected and accelerated bootstrap of the mean
                    (Efron 1987), :func:`scipy.stats.bootstrap`, 9,999 resamples
    ``t``           fewer, where the bootstrap's intervals are too narrow (at 5 samples they hold
                    the mean 84 times of 100 instead of 95), or more, where both agree: Student's
    ``constant``    samples that are all equal, and not 0 or 1: nothing varied, the interval is a
                    point
    ``none``        one sample, or samples that are not finite
    ==============  ==============================================================================

    Args:
        samples: one number a sample, 1-d: tensor, array or sequence.
        weights: how much each sample counts, positive, same length: the estimate is then
            ``Σ w·x / Σ w`` (sentences of different length, say). By default all alike.
        binary: whether samples can be nothing but 0 and 1; by default whether all are.
        level: of confidence, between 0 and 1.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: no samples, not 1-d, a level outside (0, 1), weights that do not fit.
        ImportError: scipy is not installed.

    >>> print(estimate([1.0, 1.0, 1.0, 0.0]))
    0.75 (0.3006 … 0.9544, n = 4)
    """
    x, w = _samples("samples", samples), None
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    if weights is not None:
        w = _samples("weights", weights)
        if w.shape != x.shape or not bool((w > 0).all() and np.isfinite(w).all()):
            raise ValueError(f"weights must be {len(x)} positive numbers, got {len(w)}")
        w = None if bool((w == w[0]).all()) else w
    n, value = len(x), float(np.average(x, weights=w))
    if not np.isfinite(x).all():
        return Estimate(value, math.nan, math.nan, n, level, "none")
    if w is None and (_is_binary(x) if binary is None else binary):
        test = _scipy().stats.binomtest(round(x.sum()), n)
        ends = test.proportion_ci(level, "wilson")
        return Estimate(value, float(ends.low), float(ends.high), n, level, "wilson")
    if n == 1:
        return Estimate(value, -math.inf, math.inf, n, level, "none")
    if float(np.ptp(x)) <= _ROUNDING * float(np.abs(x).max()):
        return Estimate(value, value, value, n, level, "constant")
    if n < FEW or n > MANY:
        # Of a ratio, by its first-order expansion (Cochran 1977, Sampling Techniques, 6.4).
        spread = x - value if w is None else w * (x - value) / w.mean()
        error = float(spread.std(ddof=1)) / math.sqrt(n)
        reach = float(_scipy().stats.t.ppf((1 + level) / 2, n - 1)) * error
        return Estimate(value, value - reach, value + reach, n, level, "t")
    ends = _bootstrap(x, w, level, seed)
    # Rounding may leave the ends on one side of the value where almost nothing varies.
    low, high = min(float(ends.low), value), max(float(ends.high), value)
    return Estimate(value, low, high, n, level, "bca")


def paired(
    before: Any, after: Any, *, binary: bool | None = None, level: float = LEVEL, seed: int = 0
) -> Comparison:
    """Compare two models by their scores of the same samples.

    The p-value is that of the sign-flip test: if the models were alike, each sample's difference
    would be as likely to have the other sign (Fisher 1935). With scores 0 and 1 that is McNemar's
    exact test, by :func:`scipy.stats.binomtest`; otherwise :func:`scipy.stats.permutation_test`,
    exact up to 13 samples, and from 2,001 samples on the paired t-test, which it then agrees with.
    The interval of the change is :func:`estimate`'s of the differences; with scores 0 and 1 it is
    that of Bonett & Price (2012), which holds where the models never differ, too.

    Args:
        before, after: scores, 1-d, of the same samples in the same order.
        binary: whether scores can be nothing but 0 and 1; by default whether all are.
        level: of confidence, between 0 and 1.
        seed: of the resampling.

    Raises:
        ValueError: as :func:`estimate`, or another number of scores on each side.
        ImportError: scipy is not installed.

    >>> found = paired([1.0] * 97 + [0.0] * 3, [1.0] * 95 + [0.0] * 5)
    >>> found.verdict
    'not significant at 100 samples (p = 0.5); if the difference is real, about 389 would settle it'
    """
    a, b = _samples("before", before), _samples("after", after)
    if len(a) != len(b):
        raise ValueError(f"before and after must score the same samples, got {len(a)} and {len(b)}")
    if binary is None:
        binary = _is_binary(a) and _is_binary(b)
    first, second = (estimate(x, binary=binary, level=level, seed=seed) for x in (a, b))
    d = b - a
    if not np.isfinite(d).all():
        change = Estimate(float(d.mean()), math.nan, math.nan, len(d), level, "none")
        return Comparison(first, second, change, math.nan, None)
    change = (
        _bonett_price(d, level) if binary else estimate(d, binary=False, level=level, seed=seed)
    )
    variance = float(d.var(ddof=1)) if len(d) > 1 else math.inf
    needed = samples_needed(variance, change.value, level=level)
    return Comparison(first, second, change, _sign_flips(d, binary, seed), needed)


def samples_needed(
    variance: float, change: float, *, level: float = LEVEL, power: float = POWER
) -> int | None:
    """How many samples show a change of this size with probability ``power``.

    ``N = (z₁₋α/₂ + z_power)² · σ² / δ²``, with ``α = 1 − level``, ``σ²`` the variance of the
    differences sample by sample and ``δ`` their mean: the sample size of the paired t-test by its
    normal approximation (Chow, Shao & Wang 2008, Sample Size Calculations in Clinical Research,
    3.1; for models' scores Miller 2024, https://arxiv.org/abs/2411.00640). Never fewer than the
    sign-flip test could find significant at all, ``1 + log₂(1/α)``.

    Args:
        variance: of the differences.
        change: the difference to be shown.
        level, power: probabilities, between 0 and 1.

    Returns:
        The number, or ``None`` where it is not known: no change, or no finite variance.

    >>> samples_needed(variance=0.02, change=-0.005)
    6280
    """
    if not math.isfinite(variance) or not math.isfinite(change) or change == 0:
        return None
    norm = _scipy().stats.norm
    z = float(norm.ppf((1 + level) / 2) + norm.ppf(power))
    return math.ceil(max(z * z * variance / (change * change), 1 + math.log2(1 / (1 - level))))


def _bootstrap(x: np.ndarray, w: np.ndarray | None, level: float, seed: int) -> Any:
    def mean(x: np.ndarray, w: np.ndarray | None = None, axis: int = -1) -> np.ndarray:
        return x.mean(axis) if w is None else (w * x).sum(axis) / w.sum(axis)

    return (
        _scipy()
        .stats.bootstrap(
            (x,) if w is None else (x, w),
            mean,
            paired=w is not None,
            n_resamples=RESAMPLES,
            batch=max(1, 2**21 // len(x)),
            confidence_level=level,
            method="BCa",
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )


def _bonett_price(d: np.ndarray, level: float) -> Estimate:
    """Differences of 0/1 scores: Wald's interval after one more pair of each discordant kind."""
    n, up, down = len(d), int((d > 0).sum()), int((d < 0).sum())
    p, q = (up + 1) / (n + 2), (down + 1) / (n + 2)
    z = float(_scipy().stats.norm.ppf((1 + level) / 2))
    reach = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    low, high = max(-1.0, p - q - reach), min(1.0, p - q + reach)
    return Estimate(float(d.mean()), low, high, n, level, "bonett-price")


def _sign_flips(d: np.ndarray, binary: bool, seed: int) -> float:
    stats = _scipy().stats
    if not d.any():
        return 1.0
    if binary:
        return float(stats.binomtest(int((d > 0).sum()), int((d != 0).sum())).pvalue)
    if len(d) > MANY:
        return float(stats.ttest_1samp(d, 0.0).pvalue) if d.std() > 0 else 0.0
    test = stats.permutation_test(
        (d,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2**21 // len(d)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _samples(name: str, values: Any) -> np.ndarray:
    x = _array(values)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"{name} must be 1-d and not empty, got shape {x.shape}")
    return x


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _is_binary(x: np.ndarray) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-3 else "p < 0.001"


def _json(x: Any) -> Any:
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _scipy() -> ModuleType:
    try:
        import scipy.stats
    except ImportError as error:
        raise ImportError(
            "confidence intervals need scipy: pip install 'zeropoint[search]'"
        ) from error
    return scipy
