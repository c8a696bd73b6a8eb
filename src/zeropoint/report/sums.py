"""What is added up while two models run: powers, largest errors, cosines. All in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..running import cosines
from ..statistics import Estimate, estimate
from .numbers import Difference

_CHUNK = 1 << 20  # elements compared at a time: the float64 copies stay small


class Sums:
    """Accumulates a :class:`Difference`."""

    def __init__(self) -> None:
        self.signal = self.noise = self.largest = 0.0
        self.elements = self.non_finite = self.skipped = 0

    def add(self, y: Tensor, other: Tensor) -> None:
        other = other.to(y.device)
        for a, b in zip(y.reshape(-1).split(_CHUNK), other.reshape(-1).split(_CHUNK), strict=True):
            a, b = a.to(torch.float64), b.to(torch.float64)
            finite = a.isfinite() & b.isfinite()
            same = (a == b) | (a.isnan() & b.isnan())
            noise = torch.where(finite, a - b, 0.0)
            self.signal += float(torch.where(finite, a, 0.0).square().sum())
            self.noise += float(noise.square().sum())
            if a.numel():
                self.largest = max(self.largest, float(noise.abs().max()))
            self.elements += a.numel()
            self.non_finite += int((~(finite | same)).sum())

    def result(self) -> Difference:
        return Difference(
            self.signal, self.noise, self.largest, self.elements, self.non_finite, self.skipped
        )


class Cosines:
    """Cosines between the outputs' vectors, by sample: :func:`zeropoint.running.cosines`.

    Vectors with NaN or Inf are left out.
    """

    def __init__(self) -> None:
        self.lowest, self.count = math.nan, 0
        self._sums: list[float] = []  # of each sample's cosines
        self._counts: list[int] = []

    def add(self, y: Tensor, other: Tensor) -> None:
        found = cosines(y, other)
        finite = found.isfinite()
        counts = finite.sum(1)
        if not counts.any():
            return
        self._sums += found.nansum(1)[counts > 0].tolist()
        self._counts += counts[counts > 0].tolist()
        self.count += int(counts.sum())
        self.lowest = float(np.fmin(self.lowest, float(found[finite].min())))

    @property
    def mean(self) -> float:
        return math.fsum(self._sums) / self.count if self.count else math.nan

    def estimate(self) -> Estimate | None:
        """The mean and its interval over the samples; ``None`` without any, or without scipy."""
        if not self.count:
            return None
        counts = np.array(self._counts, dtype=np.float64)
        try:
            return estimate(np.array(self._sums) / counts, weights=counts, binary=False)
        except ImportError:
            return None
