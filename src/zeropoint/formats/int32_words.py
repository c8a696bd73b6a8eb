"""Integers packed into 32-bit words, as checkpoints for GPUs hold them.

Value ``i`` of a row takes the bits ``i·bits`` to ``(i+1)·bits − 1`` of its words, counted from the
lowest: the stream of :mod:`zeropoint.codec`, padded to whole words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import codec


def words(size: int, bits: int) -> int:
    """How many words hold ``size`` values.

    >>> words(9, 4)
    2
    """
    return -(-size * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``(rows, size)`` codes, uint8 below ``2**bits``, as ``(rows, words)`` int32.

    >>> hex(pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).item())
    '0x321'
    """
    packed = codec.pack(codes, bits)
    padded = packed.new_zeros(codes.shape[0], 4 * words(codes.shape[1], bits))
    padded[:, : packed.shape[1]] = packed
    return padded.view(torch.int32)


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """The inverse: ``(rows, words)`` int32 as ``(rows, size)`` uint8."""
    stream = packed.contiguous().view(torch.uint8)[:, : codec.packed_size(size, bits)]
    return codec.unpack(stream.contiguous(), bits, size)
