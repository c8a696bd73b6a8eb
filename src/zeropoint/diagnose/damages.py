"""The damage to a model's output, where some of its layers compute something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..running import cosines, real
from .cache import Cache
from .numbers import Damage
from .samples import Sample, extent
from .switching import Forward, run, switched

_CHUNK = 1 << 20  # elements compared at a time: the float64 copies stay small
KEPT = 32 << 20
"""Bytes of float outputs that are kept, so that a later round need not compute them again."""


class Meter:
    """Counts what a diagnosis costs, in runs of the model over all the data."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.evaluations = 0.0

    def ran(self, batch: Any) -> None:
        """One run on a batch."""
        self.evaluations += extent(batch) / self.total

    def ran_over(self, batches: list[Any], runs: int) -> None:
        """So many runs, evenly over the batches."""
        self.evaluations += sum(map(extent, batches)) / len(batches) * runs / self.total


class Damages:
    """Measures damages on a sample of the data.

    Args:
        model: in eval mode, see :func:`ready`.
        sample: the rows.
        pick: the tensor of the model's output that counts.
        cache: what was measured already.
        meter: counts the runs.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Sample,
        pick: Callable[[Any], Tensor],
        cache: Cache,
        meter: Meter,
    ) -> None:
        self.model, self.sample, self.pick = model, sample, pick
        self.cache, self.meter = cache, meter
        self._outputs: dict[int, Tensor] = {}
        self._bytes = 0

    def measure(
        self, variants: Mapping[str, Callable[[], Mapping[nn.Module, Forward]]], bar: tqdm
    ) -> dict[str, Damage]:
        """The damage of each variant.

        Args:
            variants: name → a function that gives the layers' functions in that variant. What a
                name means must not change within one cache.
            bar: is moved on by one for each variant and batch of the sample.
        """
        # One batch after the other, not one variant after the other: so the float model's output
        # for one batch is all that must be held.
        for number, batch in enumerate(self.sample.batches):
            for name, forwards in variants.items():
                key = f"{name} @ {number}"
                if key not in self.cache.entries:
                    expected = self._expected(number, batch)
                    with switched(forwards()):
                        found = self._run(batch)
                    self.cache.put(key, _sums(expected, found))
                bar.update()
        return {
            name: _damage(
                [self.cache.entries[f"{name} @ {i}"] for i in range(len(self.sample.batches))]
            )
            for name in variants
        }

    def _run(self, batch: Any) -> Tensor:
        y = real(self.pick(run(self.model, batch)))
        self.meter.ran(batch)
        return y

    def _expected(self, number: int, batch: Any) -> Tensor:
        if number in self._outputs:
            return self._outputs[number]
        y = self._run(batch)
        if self._bytes + y.numel() * y.element_size() > KEPT:
            self._outputs.clear()
            self._bytes = 0
        self._outputs[number] = y
        self._bytes += y.numel() * y.element_size()
        return y


def _sums(y: Tensor, other: Tensor) -> list[float]:
    """Signal power, noise power, elements, non-finite ones, sum of cosines, vectors."""
    if y.shape != other.shape:
        return [0.0, 0.0, 0, 0, 0.0, 0]
    signal = noise = 0.0
    non_finite = 0
    flat, others = y.detach().reshape(-1), other.detach().to(y.device).reshape(-1)
    for a, b in zip(flat.split(_CHUNK), others.split(_CHUNK), strict=True):
        a, b = a.to(torch.float64), b.to(torch.float64)
        finite = a.isfinite() & b.isfinite()
        same = (a == b) | (a.isnan() & b.isnan())
        signal += float(torch.where(finite, a, 0.0).square().sum())
        noise += float(torch.where(finite, a - b, 0.0).square().sum())
        non_finite += int((~(finite | same)).sum())
    found = cosines(y, other)
    found = found[~found.isnan()]
    return [signal, noise, y.numel(), non_finite, float(found.sum()), found.numel()]


def _damage(parts: list[list[float]]) -> Damage:
    signal, noise, elements, non_finite, cosine, vectors = (
        sum(column) for column in zip(*parts, strict=True)
    )
    if elements == non_finite:
        error = math.nan
    elif noise == 0:
        error = 0.0
    else:
        error = math.sqrt(noise / signal) if signal > 0 else math.inf
    return Damage(
        relative_error=error,
        cosine=cosine / vectors if vectors else math.nan,
        elements=int(elements),
        non_finite=int(non_finite),
    )
