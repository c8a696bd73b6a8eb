"""Parts share no sample, hold them all, and keep batches usable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeropoint.splits import Split, rows, split, split_indices, take


def numbers(part: list) -> list[int]:
    return [int(i) for batch in part for i in (batch["x"] if isinstance(batch, dict) else batch)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 3))
def test_parts_hold_every_sample_once(lengths: list[int], seed: int) -> None:
    count = sum(lengths)
    if count < 6:
        lengths, count = [*lengths, 6], count + 6
    batches = list(torch.arange(count).split(lengths))
    parts = split(batches, seed=seed)
    found = [numbers(part) for part in (parts.calibration, parts.search, parts.evaluation)]
    assert sorted(i for part in found for i in part) == list(range(count))
    for name, part in zip(("calibration", "search", "evaluation"), found, strict=True):
        assert part == parts.indices[name].tolist()
    assert all(len(b) <= max(lengths) for b in parts.evaluation)


def test_seed_decides() -> None:
    data = [torch.arange(100)]
    first, again, other = (numbers(split(data, seed=s).evaluation) for s in (0, 0, 1))
    assert first == again != other


def test_classes_in_equal_proportion() -> None:
    labels = np.array([0] * 80 + [1] * 20)
    for part in split_indices(100, stratify=labels).values():
        assert labels[part].mean() == pytest.approx(0.2, abs=0.01)
    with pytest.raises(ValueError, match="a class for each of 100 samples"):
        split_indices(100, stratify=labels[:50])


def test_rows_stay_together_and_paddings_apart() -> None:
    short, long = (
        {"x": torch.arange(a, b), "mask": torch.ones(b - a, width), "scale": torch.tensor(2.0)}
        for a, b, width in ((0, 10, 3), (10, 20, 5))
    )
    for part in (split([short, long]).search, split([short, long]).evaluation):
        assert [b["mask"].shape[1] for b in part] == [3, 5]
        assert all(len(b["x"]) == len(b["mask"]) and float(b["scale"]) == 2 for b in part)


def test_tuples_are_joined_with_their_neighbours() -> None:
    data = [(x, x + 0.5) for x in torch.arange(40.0).split(4)]
    parts = split(data, shares=(0.0, 0.5, 0.5))
    assert isinstance(parts, Split)
    assert parts.calibration == []
    assert len(parts.search) < 8  # five of four, where the rows left over have found together
    for x, y in parts.search:
        assert torch.equal(y, x + 0.5)


def test_batches_without_common_rows_are_samples() -> None:
    batch = (torch.ones(2, 3), torch.ones(5))
    assert rows(batch) == 1
    assert take(batch, torch.tensor([0])) is batch
    parts = split([batch] * 10)
    assert [len(p) for p in (parts.calibration, parts.search, parts.evaluation)] == [2, 3, 5]


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        (torch.ones(3), {}, TypeError, r"put a single batch in a list"),
        (["text"], {}, TypeError, "a batch must be a tensor"),
        ([torch.ones(2)], {}, ValueError, "enough samples"),
        ([], {}, ValueError, "enough samples"),
        ([torch.ones(20)], {"shares": (0.5, 0.5, 0.5)}, ValueError, "add up to 1"),
        ([torch.ones(20)], {"shares": (0.5, 0.5, 0.0)}, ValueError, "the last not 0"),
    ],
)
def test_wrong_arguments(data, arguments, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        split(data, **arguments)
