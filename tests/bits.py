"""Comparison bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(got: Tensor, expected: Tensor, note: str = "") -> None:
    """Same dtype, shape and bits; any NaN counts as the same as any other."""
    assert got.dtype == expected.dtype, f"{note}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{note}: shape {got.shape}, expected {expected.shape}"
    width = _INTEGERS[got.element_size()]
    different = got.contiguous().view(width) != expected.contiguous().view(width)
    if got.is_floating_point():
        different &= ~(got.isnan() & expected.isnan())
    if bool(different.any()):
        at = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{note}: {int(different.sum())} of {different.numel()} differ, first at {at}: got "
            f"{got[at].item()!r}, expected {expected[at].item()!r}"
        )
