"""What is added up while two models run: powers, largest errors, cosines. All in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    """Cosines between vectors along the last dimension.

    An output without vectors there (one dimension, or a last one of size 1) counts as one vector
    a batch. Two zero vectors have cosine 1, one has 0; vectors with NaN or Inf are left out.
    """

    def __init__(self) -> None:
        self.total, self.lowest, self.count = 0.0, math.nan, 0

    def add(self, y: Tensor, other: Tensor) -> None:
        rows = y.shape[-1] if y.ndim > 1 and y.shape[-1] > 1 else max(y.numel(), 1)
        if not y.numel():
            return
        other = other.to(y.device)
        step = max(1, _CHUNK // rows)
        for a, b in zip(
            y.reshape(-1, rows).split(step), other.reshape(-1, rows).split(step), strict=True
        ):
            a, b = a.to(torch.float64), b.to(torch.float64)
            keep = (a.isfinite() & b.isfinite()).all(1)
            a, b = a[keep], b[keep]
            if not len(a):
                continue
            lengths = a.norm(dim=1) * b.norm(dim=1)
            both_zero = (a == 0).all(1) & (b == 0).all(1)
            cosine = torch.where(lengths > 0, (a * b).sum(1) / lengths, both_zero.to(a.dtype))
            cosine = cosine.clamp(-1, 1)
            self.total += float(cosine.sum())
            self.count += len(cosine)
            lowest = float(cosine.min())
            self.lowest = lowest if math.isnan(self.lowest) else min(self.lowest, lowest)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan
