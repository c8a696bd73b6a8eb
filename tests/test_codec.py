from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bits import assert_same_bits
from zeropoint import codec

WIDTHS = range(1, 9)


def codes_of(data: st.DataObject, bits: int) -> Tensor:
    size = data.draw(st.integers(0, 40))
    code = st.integers(0, 2**bits - 1)
    rows = data.draw(st.lists(st.lists(code, min_size=size, max_size=size), max_size=3))
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), size)


@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
def test_round_trip(bits: int, data: st.DataObject) -> None:
    codes = codes_of(data, bits)
    packed = codec.pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(codes), codec.packed_size(codes.shape[1], bits))
    assert_same_bits(codec.unpack(packed, bits, codes.shape[1]), codes)
    assert codec.padding_is_zero(packed, bits, codes.shape[1])


@pytest.mark.parametrize("bits", WIDTHS)
@given(data=st.data())
def test_a_row_is_one_little_endian_number(bits: int, data: st.DataObject) -> None:
    codes = codes_of(data, bits)
    size = codec.packed_size(codes.shape[1], bits)
    expected = [
        sum(code << bits * i for i, code in enumerate(row)).to_bytes(size, "little")
        for row in codes.tolist()
    ]
    assert [bytes(row) for row in codec.pack(codes, bits).tolist()] == expected


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [1, 2, 15], [0x21, 0x0F]),  # the low half first
        (2, [1, 2, 3, 0, 3], [0b00111001, 0b11]),  # four a byte
        (3, [7, 0, 7, 0, 7, 0, 7, 0, 1], [0b11000111, 0b01110001, 0b00011100, 0b1]),
        (1, [1, 0, 0, 0, 0, 0, 0, 1], [0b10000001]),
        (8, [0, 255], [0, 255]),
    ],
)
def test_the_order_of_the_format_page(bits: int, codes: list[int], packed: list[int]) -> None:
    assert codec.pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_input(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (13, 6)).to(torch.uint8)
    packed = codec.pack(codes.T, bits)
    assert_same_bits(packed, codec.pack(codes.T.contiguous(), bits))
    apart = torch.zeros(packed.shape[0], packed.shape[1] * 2, dtype=torch.uint8)[:, ::2]
    apart.copy_(packed)
    assert_same_bits(codec.unpack(apart, bits, 13), codes.T.contiguous())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 3)])
def test_empty(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.empty(shape, dtype=torch.uint8)
    packed = codec.pack(codes, bits)
    assert packed.shape == (*shape[:-1], codec.packed_size(shape[-1], bits))
    assert codec.unpack(packed, bits, shape[-1]).shape == shape
    assert codec.padding_is_zero(packed, bits, shape[-1])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
def test_each_padding_bit_counts(bits: int) -> None:
    for size in range(1, 9):
        packed = codec.pack(torch.full((2, size), 2**bits - 1, dtype=torch.uint8), bits)
        for bit in range(size * bits % 8 or 8, 8):
            changed = packed.clone()
            changed[1, -1] |= 1 << bit
            assert not codec.padding_is_zero(changed, bits, size), (size, bit)
