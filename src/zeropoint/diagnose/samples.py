"""Part of the data: on which rows of which batches the damages are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..running import tensors
from ..splits import rows, take

PARTS = 4
"""In how many batches the sample lies, where there are so many: each has a cost of its own."""


def batches_of(name: str, data: Any) -> list[Any]:
    """The batches of an iterable, at least one.

    Raises:
        TypeError: one batch instead of many, or something else than batches in it.
        ValueError: there are none.
    """
    if isinstance(data, Tensor | Mapping | str | bytes) or not isinstance(data, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches (tensors, tuples or mappings), got "
            f"{type(data).__name__}; put a single batch in a list: [batch]"
        )
    batches = list(data)
    if not batches:
        raise ValueError(f"{name} must hold at least one batch, got none")
    for batch in batches:
        rows(batch)  # refuses what is no batch
    return batches


def extent(batch: Any) -> int:
    """How large a batch is: the elements of its largest tensor, at least 1. Of batches for one
    model, the time it takes grows with that."""
    return max((t.numel() for t in tensors(batch)), default=1) or 1


@dataclass(frozen=True)
class Sample:
    """Some of the rows of some data.

    Args:
        batches: the rows, as batches.
        rows: how many they are.
        share: of the data's extent.
    """

    batches: list[Any]
    rows: int
    share: float


def sample(batches: list[Any], wanted: int) -> Sample:
    """About ``wanted`` rows, from batches evenly apart, the first rows of each.

    A batch whose tensors do not have one length along dimension 0 is one row, and taken whole.

    Args:
        batches: at least one.
        wanted: how many rows, at least 1; all are taken where there are not so many.

    >>> found = sample([torch.zeros(10, 2)] * 8, 20)
    >>> [len(batch) for batch in found.batches]
    [5, 5, 5, 5]
    """
    counts = [rows(batch) for batch in batches]
    total = sum(extent(batch) for batch in batches)
    if wanted >= sum(counts):
        return Sample(batches, sum(counts), 1.0)
    # As few batches as hold that many rows, but not fewer than PARTS where there are rows for it.
    for parts in range(min(PARTS, len(batches), wanted), len(batches) + 1):
        chosen = [(2 * i + 1) * len(batches) // (2 * parts) for i in range(parts)]
        if sum(counts[i] for i in chosen) >= wanted:
            break
    left, picked = wanted, []
    for done, i in enumerate(chosen):
        count = min(counts[i], max(1, round(left / (len(chosen) - done))))
        left = max(0, left - count)
        piece = batches[i] if count == counts[i] else take(batches[i], torch.arange(count))
        picked.append((piece, count))
    return Sample(
        [piece for piece, _ in picked],
        sum(count for _, count in picked),
        sum(extent(piece) for piece, _ in picked) / total,
    )


def whole_batches(batches: list[Any], wanted: int) -> Sample:
    """As :func:`sample`, of whole batches: the fewest, evenly apart, with ``wanted`` rows."""
    counts = [rows(batch) for batch in batches]
    for parts in range(1, len(batches) + 1):
        chosen = [(2 * i + 1) * len(batches) // (2 * parts) for i in range(parts)]
        if sum(counts[i] for i in chosen) >= wanted:
            break
    picked = [batches[i] for i in chosen]
    total = sum(extent(batch) for batch in batches)
    return Sample(
        picked, sum(counts[i] for i in chosen), sum(extent(batch) for batch in picked) / total
    )
