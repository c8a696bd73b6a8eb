"""Calibration, search and evaluation data, so that nothing is tuned on what is reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHARES = (0.2, 0.3, 0.5)
"""Of the samples: for calibration, for search, and for evaluation, the one that is reported."""


@dataclass(frozen=True)
class Split:
    """Batches in three parts that share no sample; made by :func:`split`.

    Args:
        calibration: for what looks at inputs only, the ranges of static activations say.
        search: for every choice that is made by looking at results.
        evaluation: for the numbers that are reported; looked at once, when all is decided.
        indices: name of each part → int64 ``(n,)``, the numbers of its samples in ``data``, counted
            through all batches, ascending: in the order of the part.
    """

    calibration: list[Any]
    search: list[Any]
    evaluation: list[Any]
    indices: Mapping[str, np.ndarray]


def split(
    data: Iterable[Any],
    *,
    shares: tuple[float, float, float] = SHARES,
    stratify: Any = None,
    seed: int = 0,
) -> Split:
    """Split batches, sample by sample, by scikit-learn's ``train_test_split``.

    A sample is a row along dimension 0 of all of a batch's tensors; tensors without dimensions
    belong to every row. A batch whose tensors differ in length there is one sample. Rows of one
    batch that get into the same part stay a batch, and are joined with their neighbours' where the
    shapes allow, up to the largest batch that came.

    Args:
        data: an iterable of batches: tensors, tuples or lists, or mappings.
        shares: of calibration, search and evaluation; they add up to 1. A share of 0 is an empty
            part.
        stratify: a class for each sample, 1-d: all parts then hold the classes in equal proportion.
        seed: the same seed gives the same parts.

    Raises:
        TypeError: ``data`` is one batch, or holds something else than batches.
        ValueError: shares that do not add up to 1; too few samples; a wrong number of classes.
        ImportError: scikit-learn is not installed.

    >>> parts = split([torch.arange(10)], shares=(0.2, 0.3, 0.5))
    >>> [len(batch) for part in (parts.calibration, parts.search, parts.evaluation)
    ...  for batch in part]
    [2, 3, 5]
    """
    if isinstance(data, Tensor | Mapping | str | bytes) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be an iterable of batches, got {type(data).__name__}; put a single batch "
            "in a list: [batch]"
        )
    batches = list(data)
    counts = [rows(batch) for batch in batches]
    indices = split_indices(sum(counts), shares=shares, stratify=stratify, seed=seed)
    largest = max(counts)
    parts = {name: _part(batches, counts, part, largest) for name, part in indices.items()}
    return Split(**parts, indices=indices)


def split_indices(
    count: int,
    *,
    shares: tuple[float, float, float] = SHARES,
    stratify: Any = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """The numbers 0 … ``count`` − 1 in three ascending parts; arguments as :func:`split`."""
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "splitting data needs scikit-learn: pip install 'zeropoint[search]'"
        ) from error
    names = ("calibration", "search", "evaluation")
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6 or not shares[2]:
        raise ValueError(
            f"shares must be three numbers that add up to 1, the last not 0, got {shares!r}"
        )
    labels = None
    if stratify is not None:
        labels = np.asarray(stratify.cpu() if isinstance(stratify, Tensor) else stratify)
        if labels.shape != (count,):
            raise ValueError(
                f"stratify must hold a class for each of {count} samples, got {labels.shape}"
            )
    left, parts = np.arange(count), {}
    for name, share in zip(names[:2], shares[:2], strict=True):
        wanted = round(share * count)
        if share and not 0 < wanted < len(left):
            raise ValueError(
                f"data must hold enough samples for shares {shares}, got {count}; pass more, or "
                "parts of your own"
            )
        if not share:
            parts[name] = np.arange(0)
            continue
        parts[name], left = train_test_split(
            left,
            train_size=wanted,
            random_state=seed,
            stratify=None if labels is None else labels[left],
        )
    parts[names[2]] = left
    return {name: np.sort(part) for name, part in parts.items()}


def rows(batch: Any) -> int:
    """How many samples a batch holds, by the rule of :func:`split`."""
    if not isinstance(batch, Tensor | tuple | list | Mapping):
        raise TypeError(
            f"a batch must be a tensor, a tuple or list, or a mapping, got {type(batch).__name__}"
        )
    lengths = {len(t) for t in _tensors(batch) if t.ndim}
    return lengths.pop() if len(lengths) == 1 else 1


def take(batch: Any, keep: Tensor) -> Any:
    """The rows of a batch that ``keep``, int64 ``(n,)``, names."""
    if rows(batch) == 1:
        return batch
    return _map(batch, lambda t: t[keep] if t.ndim else t)


def _part(batches: list[Any], counts: list[int], part: np.ndarray, largest: int) -> list[Any]:
    result: list[Any] = []
    start = 0
    for batch, count in zip(batches, counts, strict=True):
        keep = part[(part >= start) & (part < start + count)] - start
        start += count
        if not len(keep):
            continue
        piece = batch if len(keep) == count else take(batch, torch.from_numpy(keep))
        if result and (joined := _join(result[-1], piece, largest)) is not None:
            result[-1] = joined
        else:
            result.append(piece)
    return result


def _join(a: Any, b: Any, largest: int) -> Any | None:
    """Two batches as one, or ``None`` where they do not fit together."""
    ours, theirs = list(_tensors(a)), list(_tensors(b))
    count = rows(a) + rows(b)
    if (
        type(a) is not type(b)
        or count > largest
        or (isinstance(a, Mapping) and list(a) != list(b))
        or (isinstance(a, tuple | list) and not len(a) == len(ours) == len(theirs))
        or (isinstance(a, Mapping) and not len(a) == len(ours) == len(theirs))
        or any(
            not x.ndim or x.shape[1:] != y.shape[1:] or x.dtype != y.dtype
            for x, y in zip(ours, theirs, strict=False)
        )
        or {len(x) for x in ours} != {rows(a)}
        or {len(x) for x in theirs} != {rows(b)}
    ):
        return None
    following = iter(theirs)
    return _map(a, lambda t: torch.cat([t, next(following)]))


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [v for v in values if isinstance(v, Tensor)]


def _map(batch: Any, function: Any) -> Any:
    def one(v: Any) -> Any:
        return function(v) if isinstance(v, Tensor) else v

    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {k: one(v) for k, v in batch.items()}
    values = [one(v) for v in batch]
    return tuple(values) if isinstance(batch, tuple) else values
