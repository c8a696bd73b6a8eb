"""Choose one scale and zero point for activations from the values seen on sample data.

An :class:`Observer` sees batches of values and answers with a scale and zero point for the whole
tensor. They differ in what they do with rare large values: keep them (and take coarse steps
everywhere) or clip them. :func:`zeropoint.calibrate.calibrate` feeds them from a running model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from .affine import choose_qparams
from .spec import PerTensor, QuantSpec

Range = tuple[float, float]


class Observer(ABC):
    """Sees values, answers with the scale and zero point that represent them.

    Subclasses implement ``_update`` (finite float32 values, 1-d, at least one) and ``_range``.
    ``lo`` and ``hi`` are the smallest and largest value seen.
    """

    def __init__(self) -> None:
        self.lo = math.inf
        self.hi = -math.inf

    @property
    def is_empty(self) -> bool:
        """Whether no value was seen yet."""
        return self.lo > self.hi

    def observe(self, x: Tensor) -> None:
        """Take in the values of ``x``: any shape, floating point; it may be empty.

        Raises:
            TypeError: ``x`` is not a floating-point tensor.
            ValueError: NaN or Inf in ``x`` (after conversion to float32). Nothing is taken in.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {got}")
        values = x.detach().to(torch.float32).flatten()
        if not values.numel():
            return
        lo, hi = (float(v) for v in values.aminmax())  # NaN propagates into both
        if not (math.isfinite(lo) and math.isfinite(hi)):
            bad = int((~values.isfinite()).sum())
            raise ValueError(
                f"x must be finite, got NaN or Inf in {bad} of {values.numel()} values"
            )
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self._update(values, lo, hi)

    def range(self, spec: QuantSpec) -> Range:
        """The smallest and largest real to represent; what lies outside is clipped.

        Raises:
            ValueError: no value was seen, or ``spec`` is not per tensor.
        """
        if not isinstance(spec.granularity, PerTensor):
            raise ValueError(f"spec must be per tensor, got {spec.granularity!r}")
        if self.is_empty:
            raise ValueError("no values were observed")
        return self._range(spec)

    def qparams(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)`` for the values seen: float32 and int32, both 0-d.

        Raises:
            ValueError: no value was seen, or ``spec`` is not per tensor.
        """
        lo, hi = self.range(spec)
        ends = torch.tensor([lo, hi], dtype=torch.float32)
        return choose_qparams(ends[0], ends[1], spec)

    @abstractmethod
    def _update(self, values: Tensor, lo: float, hi: float) -> None: ...

    @abstractmethod
    def _range(self, spec: QuantSpec) -> Range: ...


class MinMaxObserver(Observer):
    """The smallest and largest value seen: nothing is clipped, one outlier coarsens every step.

    >>> observer = MinMaxObserver()
    >>> observer.observe(torch.tensor([-1.0, 1.55]))
    >>> observer.qparams(QuantSpec(signed=False, symmetric=False))
    (tensor(0.0100), tensor(100, dtype=torch.int32))
    """

    def _update(self, values: Tensor, lo: float, hi: float) -> None:
        pass  # the base class keeps lo and hi

    def _range(self, spec: QuantSpec) -> Range:
        return self.lo, self.hi


class MovingAverageObserver(Observer):
    """An exponential moving average of each batch's minimum and maximum.

    Source: Jacob et al. 2018, section 3.1 (https://arxiv.org/abs/1712.05877), who collect
    activation ranges during training in this way. The result depends on the order of the batches
    and on their size.

    Args:
        momentum: weight of a new batch, in (0, 1]. The first batch starts the average.

    Raises:
        ValueError: ``momentum`` out of range.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be within (0, 1], got {momentum!r}")
        self.momentum = momentum
        self._average: Range | None = None

    def _update(self, values: Tensor, lo: float, hi: float) -> None:
        a, b = self._average if self._average is not None else (lo, hi)
        self._average = (a + self.momentum * (lo - a), b + self.momentum * (hi - b))

    def _range(self, spec: QuantSpec) -> Range:
        assert self._average is not None
        return self._average


class GrowingHistogram:
    """A histogram that grows with its data and does not depend on the order it came in.

    Bin ``i`` holds the values in ``[i·w, (i+1)·w)``, where ``w`` is the smallest power of two that
    covers all values seen, and zero, with at most :attr:`LIMIT` bins. When the range grows, bins
    are merged by halving their indices, which is exact. Zeros are counted apart: every
    quantization represents them exactly, so that no choice of range is theirs to make.
    """

    LIMIT = 1 << 14

    def __init__(self) -> None:
        self.zeros = 0
        self.exponent = -149  # of w; float32 has no finer step
        self.first = 0  # index of the first bin
        self.counts: np.ndarray = np.zeros(0)
        self.sums: np.ndarray = np.zeros(
            0
        )  # of the values in each bin: a bin is represented by its mean

    def _bins(self, lo: float, hi: float, exponent: int) -> tuple[int, int]:
        low = math.floor(math.ldexp(min(lo, 0.0), -exponent))
        high = math.floor(math.ldexp(max(hi, 0.0), -exponent))
        return low, high - low + 1

    def add(self, values: Tensor, lo: float, hi: float) -> None:
        """Count float32 ``values``; all values so far lie within ``lo``…``hi``."""
        nonzero = values[values != 0]
        self.zeros += values.numel() - nonzero.numel()
        if not nonzero.numel():
            return
        self._cover(lo, hi)
        scaled = nonzero.to(torch.float64) * math.ldexp(1.0, -self.exponent)  # exact
        index = scaled.floor_().to(torch.int64) - self.first
        n = len(self.counts)
        self.counts += torch.bincount(index, minlength=n).cpu().numpy()
        weights = nonzero.to(torch.float64)
        self.sums += torch.bincount(index, weights, minlength=n).cpu().numpy()

    def _cover(self, lo: float, hi: float) -> None:
        exponent = self.exponent
        first, n = self._bins(lo, hi, exponent)
        while n > self.LIMIT:
            exponent += 1
            first, n = self._bins(lo, hi, exponent)
        if (exponent, first, n) == (self.exponent, self.first, len(self.counts)):
            return
        old = np.arange(self.first, self.first + len(self.counts))
        index = (old >> (exponent - self.exponent)) - first
        if len(old):
            self.counts = np.bincount(index, self.counts, n)
            self.sums = np.bincount(index, self.sums, n)
        else:
            self.counts, self.sums = np.zeros(n), np.zeros(n)
        self.exponent, self.first = exponent, first

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """``(means, counts)`` of the bins that hold something; zeros left out."""
        full = self.counts > 0
        return self.sums[full] / self.counts[full], self.counts[full]

    def quantile(self, q: float) -> float:
        """The value below which a fraction ``q`` lies, linear within a bin, zeros included."""
        width = math.ldexp(1.0, self.exponent)
        edges = (self.first + np.arange(len(self.counts) + 1)) * width
        # All zeros stand at zero: an edge there is doubled and the step between holds them.
        at = -self.first
        counts = np.insert(self.counts, at, self.zeros) if len(edges) > 1 else [self.zeros]
        edges = np.insert(edges, at, 0.0)
        below = np.concatenate(([0.0], np.cumsum(counts)))
        target = q * below[-1]
        i = max(1, int(np.searchsorted(below, target)))
        step = below[i] - below[i - 1]
        part = (target - below[i - 1]) / step if step else 0.0
        return float(edges[i - 1] + part * (edges[i] - edges[i - 1]))


class _HistogramObserver(Observer):
    def __init__(self) -> None:
        super().__init__()
        self._histogram = GrowingHistogram()

    def _update(self, values: Tensor, lo: float, hi: float) -> None:
        self._histogram.add(values, self.lo, self.hi)


class PercentileObserver(_HistogramObserver):
    """The range that holds ``percentile`` percent of the values, the rest cut evenly on both sides.

    Sources: McKinstry et al. 2018 (https://arxiv.org/abs/1809.04191) and Wu et al. 2020
    (https://arxiv.org/abs/2004.09602), who find 99.99 to 99.9999 percent to serve most networks.
    Quantiles come from a histogram of at least 8192 bins, linear within a bin.

    Args:
        percentile: in (0, 100].

    Raises:
        ValueError: ``percentile`` out of range.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must be within (0, 100], got {percentile!r}")
        self.percentile = percentile

    def _range(self, spec: QuantSpec) -> Range:
        cut = (100 - self.percentile) / 200
        ends = (self._histogram.quantile(q) for q in (cut, 1 - cut))
        lo, hi = (min(max(end, self.lo), self.hi) for end in ends)
        return lo, hi


def _search(cost: Callable[[float, float], float], lo: float, hi: float, symmetric: bool) -> Range:
    """The range within ``lo``…``hi`` that costs least, of 100 a sweep.

    A first sweep shrinks both ends in proportion; two more move the upper and the lower end alone,
    since what follows a GELU, say, has a short end full of values and a long sparse one. Of equal
    costs the wider range wins.
    """
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    best, least = (lo, hi), math.inf

    def sweep(candidates: Iterable[Range]) -> None:
        nonlocal best, least
        for candidate in candidates:
            c = cost(*candidate)
            if c < least:
                best, least = candidate, c

    fractions = [k / 100 for k in range(100, 0, -1)]
    sweep((f * lo, f * hi) for f in fractions)
    if not symmetric and lo < 0 < hi:
        low = best[0]
        sweep((low, f * hi) for f in fractions)
        high = best[1]
        sweep((f * lo, high) for f in fractions)
    return best


class MSEObserver(_HistogramObserver):
    """The range whose quantization has the least mean squared error.

    The error, rounding and clipping together, is computed on a histogram of at least 8192 bins,
    each represented by its mean, for ranges shrunk in steps of one percent: both ends, then each
    alone.
    Sources: the search over clipping ranges of Sung et al. 2015
    (https://arxiv.org/abs/1511.06488) and Nagel et al. 2021, section 3.1
    (https://arxiv.org/abs/2106.08295).
    """

    def _range(self, spec: QuantSpec) -> Range:
        values, counts = self._histogram.points()

        def cost(lo: float, hi: float) -> float:
            scale, zero_point = _qparams(lo, hi, spec)
            q = np.clip(np.rint(values / scale) + zero_point, spec.qmin, spec.qmax)
            return float(counts @ np.square(values - (q - zero_point) * scale))

        return _search(cost, self.lo, self.hi, spec.symmetric)


def _qparams(lo: float, hi: float, spec: QuantSpec) -> tuple[float, int]:
    """:func:`choose_qparams` for one range, without the cost of tensors."""
    tiny = torch.finfo(torch.float32).tiny
    steps = spec.qmax - spec.qmin
    if spec.symmetric:
        return max(max(-lo, hi) / (steps // 2), tiny), spec.zero_point_if_symmetric
    scale = max(hi / steps - lo / steps, tiny)
    return scale, min(max(round(-lo / scale) + spec.qmin, spec.qmin), spec.qmax)


class EntropyObserver(_HistogramObserver):
    """The range whose quantized histogram loses least information (Kullback-Leibler divergence).

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017
    (https://on-demand.gputechconf.com/gtc/2017/presentation/s7310-8-bit-inference-with-tensorrt.pdf):
    P is the histogram within the range, what lies outside added to its edge bins; Q is the same
    histogram without the outside, its bins merged into as many as there are integers and spread
    evenly again over those that were not empty; the range with the least KL(P‖Q) wins. There the
    range is symmetric; here both ends move (see :class:`MSEObserver`). Exact zeros are left out: no
    quantization changes them, and behind a ReLU their count would drown everything else.

    Made for convolutions and ReLU. Where most values crowd near zero and few matter (softmax, GELU,
    a transformer's residual stream), it clips too much; see :data:`DEFAULT_OBSERVER`.
    """

    BINS = 1 << 12

    def _range(self, spec: QuantSpec) -> Range:
        h = self._histogram
        shift = (GrowingHistogram.LIMIT // self.BINS).bit_length() - 1
        index = np.arange(h.first, h.first + len(h.counts)) >> shift
        first = int(index[0]) if len(index) else 0
        counts = np.bincount(index - first, h.counts) if len(index) else np.zeros(0)
        width = math.ldexp(1.0, h.exponent + shift)
        levels = spec.qmax - spec.qmin + 1

        def cost(lo: float, hi: float) -> float:
            if spec.symmetric:
                lo, hi = min(lo, -hi), max(hi, -lo)
            a = max(math.floor(lo / width) - first, 0)
            b = min(math.ceil(hi / width) - first, len(counts))
            return _divergence(counts, a, b, levels)

        return _search(cost, self.lo, self.hi, spec.symmetric)


def _divergence(counts: np.ndarray, a: int, b: int, levels: int) -> float:
    """KL(P‖Q) in nats of bins ``a``…``b`` merged into ``levels``; Inf where it has no meaning."""
    inside = counts[a:b]
    total = float(inside.sum())
    if len(inside) < levels or total == 0:
        return math.inf  # fewer bins than integers: nothing would be merged, whatever is cut off
    p = inside.copy()
    p[0] += counts[:a].sum()
    p[-1] += counts[b:].sum()
    group = np.arange(len(inside)) * levels // len(inside)
    full = inside > 0
    if np.any((p > 0) & ~full):
        return math.inf
    mass = np.bincount(group, inside, levels)
    occupied = np.bincount(group, full, levels)
    q = (mass[group[full]] / occupied[group[full]]) / total
    p = p[full] / p.sum()
    return float(np.sum(p * np.log(p / q)))


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving-average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "entropy": EntropyObserver,
}
"""Observers by the names that recipes use."""

DEFAULT_OBSERVER = "mse"
"""What static recipes use unless told otherwise.

``benchmarks/bench_observers.py`` compares them on nine kinds of activation-like data: normal,
Laplace, Student's t, behind ReLU, GELU, a gated SiLU and softmax, with outlier channels, with rare
massive values. A Linear layer's output keeps 31.9 dB SQNR on average by ``mse``, 31.7 by
``moving-average``, 30.9 by ``minmax``, 30.2 by ``percentile``, 27.0 by ``entropy``; at worst these
are 0.1, 0.6, 2.1, 8.8 and 28.5 dB behind the best. On MiniLM's sentence embeddings, all layers
static, the mean cosine to float is 0.9931, 0.9929, 0.9928, 0.907 and 0.904, in the same order.
"""
