"""The one codec for integers narrower than a byte.

Codes are unsigned: an integer of a range that begins at ``qmin`` has the code ``q − qmin``. The
codes of a row (the last axis) are one stream of bits: code ``i`` takes the bits ``i·bits`` to
``(i+1)·bits − 1``, and bit ``j`` of the stream is bit ``j % 8`` of byte ``j // 8``, both counted
from the lowest. So two 4-bit codes share a byte, the first in its low half. A row is padded with
zero bits to whole bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_size(size: int, bits: int) -> int:
    """Bytes that a row of ``size`` codes takes.

    >>> packed_size(3, 4)
    2
    """
    return size if bits == 8 else -(-size * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``(…, size)`` codes, uint8 below ``2**bits`` (not checked), as ``(…, packed_size)`` uint8.

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist()  # 0x21, 0x0F
    [33, 15]
    """
    if bits == 8:
        return codes
    size = codes.shape[-1]
    a_word, word_bytes, dtype = _words(bits)
    words = -(-size // a_word)
    data = torch.zeros(*codes.shape[:-1], words, dtype=dtype, device=codes.device)
    for i in range(a_word):
        part = codes[..., i::a_word].to(dtype)
        data[..., : part.shape[-1]] |= part << bits * i
    if word_bytes > 1:
        data = torch.stack([data >> 8 * j & 255 for j in range(word_bytes)], -1).flatten(-2)
    return data[..., : packed_size(size, bits)].to(torch.uint8).contiguous()


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """The inverse of :func:`pack`: ``(…, packed_size)`` uint8 as ``(…, size)`` uint8.

    >>> unpack(torch.tensor([0x21, 0x0F], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 15]
    """
    if bits == 8:
        return packed
    a_word, word_bytes, dtype = _words(bits)
    lead, words = packed.shape[:-1], -(-size // a_word)
    data = packed.to(dtype)
    if word_bytes > 1:
        data = torch.nn.functional.pad(data, (0, words * word_bytes - data.shape[-1]))
        data = data.reshape(*lead, words, word_bytes)
        data = sum((data[..., j] << 8 * j for j in range(word_bytes)), data.new_zeros(()))
    codes = torch.empty(*lead, size, dtype=torch.uint8, device=packed.device)
    for i in range(a_word):
        part = codes[..., i::a_word]
        part.copy_(data[..., : part.shape[-1]] >> bits * i & (1 << bits) - 1)
    return codes


def padding_is_zero(packed: Tensor, bits: int, size: int) -> bool:
    """Whether the bits after each row's last code are zero, as :func:`pack` leaves them.

    >>> padding_is_zero(torch.tensor([0x21, 0x1F], dtype=torch.uint8), 4, 3)
    False
    """
    used = size * bits % 8
    return not used or not bool((packed[..., -1] >> used).any())


def _words(bits: int) -> tuple[int, int, torch.dtype]:
    """The least run of codes that fills whole bytes: how many codes, how many bytes, and the type
    that holds them (below 64 bits)."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common, torch.uint8 if bits == common else torch.int64
