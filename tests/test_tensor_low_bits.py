"""QTensor below 8 bits and of groups: packed inside, like any other outside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bits import assert_same_bits
from zeropoint import PerChannel, PerGroup, PerTensor, QTensor, QuantSpec
from zeropoint.codec import packed_size
from zeropoint.spec import integer_range

WIDTHS = range(2, 9)
INDICES = [
    0,
    -1,
    slice(1, 3),
    slice(None, None, 2),
    slice(0, 0),
    ...,
    (slice(None), slice(None)),
    (1, slice(None)),
    (..., slice(None)),
    [2, 0],
    torch.tensor([1, 1, 3]),
    torch.tensor([True, False, True, True]),
]
ALONG = [  # the last axis too, within groups of 3 over 8 entries
    (slice(None), slice(0, 6)),
    (slice(None), slice(3, 8)),
    (slice(None), slice(4, 5)),
    (slice(None), slice(6, None)),
    (slice(None), slice(7, 3)),
    (slice(None), slice(3, 6, 2)),
    (slice(None), 5),
    (..., -1),
    (2, slice(3, None)),
    (2, 7),
    (slice(1, 3), 0),
]


def integers(shape: tuple[int, ...], bits: int, signed: bool, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    low, high = integer_range(bits, signed)
    q = torch.randint(low, high + 1, shape, generator=g)
    return q.to(torch.int8 if signed else torch.uint8)


def grouped(shape: tuple[int, ...], bits: int, size: int, signed: bool = False) -> QTensor:
    g = torch.Generator().manual_seed(1)
    groups = (*shape[:-1], PerGroup(size).count(shape[-1]))
    low, high = integer_range(bits, signed)
    zero_point = torch.randint(low, high + 1, groups, generator=g, dtype=torch.int32)
    scale = torch.rand(groups, generator=g) + 0.5
    return QTensor(integers(shape, bits, signed), scale, zero_point, bits=bits, group_size=size)


def reals(q: QTensor) -> Tensor:
    """What a grouped tensor stands for, entry by entry."""
    result = torch.zeros(q.shape)
    flat, ints = result.reshape(-1, q.shape[-1]), q.int_repr().reshape(-1, q.shape[-1])
    scale = q.scale.reshape(flat.shape[0], -1)
    zero_point = q.zero_point.reshape(flat.shape[0], -1)
    for row in range(flat.shape[0]):
        for k in range(q.shape[-1]):
            g = k // (q.group_size or 1)
            flat[row, k] = float(scale[row, g]) * (int(ints[row, k]) - int(zero_point[row, g]))
    return result


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
@given(data=st.data())
def test_integers_come_back(bits: int, signed: bool, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
    plain = integers(shape, bits, signed, data.draw(st.integers(0, 99)))
    q = QTensor(plain, 0.5, 0, bits=bits)
    assert_same_bits(q.int_repr(), plain)
    assert (q.bits, q.shape, q.ndim, q.numel()) == (bits, plain.shape, plain.ndim, plain.numel())
    assert q.dtype == plain.dtype
    assert q.spec.qmin == integer_range(bits, signed)[0]
    assert_same_bits(q.dequantize(), plain.to(torch.float32) * 0.5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_codes_are_stored_packed(bits: int) -> None:
    q = QTensor(integers((3, 11), bits, True), 1.0, bits=bits)
    assert q._int_repr.shape == (3, packed_size(11, bits))
    again = QTensor.from_packed(q._int_repr, (3, 11), 1.0, 0, bits=bits, signed=True)
    assert_same_bits(again.int_repr(), q.int_repr())
    assert again._int_repr is q._int_repr


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", [1, 3, 4, 8, 100])
@pytest.mark.parametrize("signed", [True, False])
def test_groups_dequantize_entry_by_entry(bits: int, size: int, signed: bool) -> None:
    q = grouped((2, 3, 8), bits, size, signed)
    assert_same_bits(q.dequantize(), reals(q))
    assert q.spec.granularity == PerGroup(size)
    assert q.group_size == size
    assert q.axis is None


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("kind", ["per tensor", "per channel", "per group"])
def test_index(bits: int, index: object, kind: str) -> None:
    plain = integers((4, 8), bits, True)
    if kind == "per group":
        q = grouped((4, 8), bits, 3, True)
    elif kind == "per channel":
        q = QTensor(plain, torch.rand(4) + 0.5, torch.tensor([0, 1, -1, 1]), 0, bits=bits)
    else:
        q = QTensor(plain, 0.5, 1, bits=bits)
    part = q[index]
    assert_same_bits(part.dequantize(), q.dequantize()[index])
    assert_same_bits(part.int_repr(), q.int_repr()[index])
    assert part.bits == bits


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("index", ALONG, ids=str)
def test_index_along_the_groups(bits: int, index: object) -> None:
    q = grouped((4, 8), bits, 3)
    part = q[index]
    assert_same_bits(part.dequantize(), q.dequantize()[index])
    # What comes out is whole in itself: made anew of its parts it is the same.
    again = QTensor(
        part.int_repr(),
        part.scale,
        part.zero_point,
        part.axis,
        bits=bits,
        group_size=part.group_size,
    )
    assert_same_bits(again.dequantize(), part.dequantize())


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(1, 5)),
        (slice(None), slice(0, 8, 2)),
        (slice(None), slice(2, None)),
        (slice(None), torch.tensor([0, 1])),
        None,
        (0, None),
    ],
    ids=str,
)
def test_index_that_cuts_groups_is_refused(index: object) -> None:
    with pytest.raises(IndexError, match=r"group"):
        grouped((4, 8), 4, 3)[index]


@pytest.mark.parametrize("index", [4, -5, (0, 8), (0, -9), (0, 0, 0)], ids=str)
def test_index_out_of_range(index: object) -> None:
    with pytest.raises(IndexError):
        grouped((4, 8), 4, 3)[index]
    with pytest.raises(IndexError):
        QTensor(integers((4, 8), 4, True), 1.0, bits=4)[index]


def test_rows_share_memory_columns_do_not() -> None:
    q = grouped((4, 8), 4, 4)
    q[1:3]._int_repr.fill_(0x21)
    assert q.int_repr()[1].tolist() == [1, 2] * 4
    before = q.int_repr()
    q[:, :4]._int_repr.zero_()
    assert_same_bits(q.int_repr(), before)


@pytest.mark.parametrize("bits", WIDTHS)
def test_copies(bits: int) -> None:
    q = grouped((4, 8), bits, 3)
    for twin in (q.clone(), copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.to("cpu")):
        assert twin.spec == q.spec
        assert_same_bits(twin.int_repr(), q.int_repr())
        assert_same_bits(twin.dequantize(), q.dequantize())
    twin = q.clone()
    twin._int_repr.zero_()
    twin.scale.zero_()
    assert q.int_repr().any()
    assert q.scale.all()


def test_print() -> None:
    ints = torch.tensor([[1, -8, 7]], dtype=torch.int8)
    assert repr(QTensor(ints, 0.5, bits=4)) == (
        "QTensor([[ 0.5000, -4.0000,  3.5000]], dtype=int4, scale=0.5, zero_point=0)"
    )
    scale, zero_point = torch.tensor([[0.5, 2.0]]), torch.tensor([[0, 1]])
    assert repr(QTensor(ints, scale, zero_point, bits=4, group_size=2)) == (
        "QTensor([[ 0.5000, -4.0000, 12.0000]], dtype=int4, scale=[0.5, 2], zero_point=[0, 1], "
        "group_size=2)"
    )
    assert "dtype=uint2" in repr(QTensor(torch.tensor(3, dtype=torch.uint8), 1.0, bits=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_groups_keep_their_type(dtype: torch.dtype) -> None:
    q = grouped((2, 8), 4, 4)
    scale = q.scale.to(dtype)
    narrow = QTensor(q.int_repr(), scale, q.zero_point, bits=4, group_size=4)
    assert narrow.scale.dtype == dtype
    assert narrow.spec.scale_dtype == dtype
    assert narrow.dequantize().dtype == torch.float32
    assert_same_bits(narrow.dequantize(), reals(narrow))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.int16])
def test_zero_points_of_groups(dtype: torch.dtype) -> None:
    q = grouped((2, 8), 4, 4)
    other = QTensor(q.int_repr(), q.scale, q.zero_point.to(dtype), bits=4, group_size=4)
    assert other.zero_point.dtype == (dtype if dtype.itemsize == 1 else torch.int32)
    assert_same_bits(other.dequantize(), q.dequantize())


def test_spec() -> None:
    ints = integers((2, 8), 4, True)
    assert QTensor(ints, 1.0, bits=4).spec == QuantSpec(4, granularity=PerTensor())
    per_channel = QTensor(ints, torch.ones(2), torch.zeros(2, dtype=torch.int32), 0, bits=4)
    assert per_channel.spec == QuantSpec(4, granularity=PerChannel(0))
    middle = torch.full((2, 2), 8)
    unsigned = QTensor(integers((2, 8), 4, False), torch.ones(2, 2), middle, bits=4, group_size=4)
    assert unsigned.spec == QuantSpec(4, False, True, PerGroup(4))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("signed", [True, False])
def test_integers_out_of_range(bits: int, signed: bool) -> None:
    low, high = integer_range(bits, signed)
    dtype = torch.int8 if signed else torch.uint8
    for value in (low - 1, high + 1):
        if value >= 0 or signed:
            with pytest.raises(ValueError, match=rf"int_repr must be within \[{low}, {high}\]"):
                QTensor(torch.tensor([0, value], dtype=dtype), 1.0, bits=bits)
        with pytest.raises(ValueError, match=rf"zero_point must be within \[{low}, {high}\]"):
            QTensor(torch.tensor([0], dtype=dtype), 1.0, value, bits=bits)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"group_size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"group_size": 2.0}, TypeError, "size must be an int"),
        ({"bits": 1}, ValueError, "bits must be from 2 to 8, got 1"),
        ({"bits": 9}, ValueError, "bits must be from 2 to 8, got 9"),
        ({"axis": 0}, ValueError, "axis must be None where there are groups"),
        (
            {"group_size": 4},
            ValueError,
            r"scale must have shape \(2, 2\) \(per group\), got \(2, 3",
        ),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have shape \(2, 3\)"),
        ({"zero_point": torch.zeros(2, 4).int()}, ValueError, "zero_point must have shape"),
        ({"zero_point": 0}, ValueError, r"zero_point must have shape \(2, 3\) .* got \(\)"),
        ({"scale": torch.zeros(2, 3)}, ValueError, "scale must be positive and finite"),
        ({"scale": torch.full((2, 3), torch.inf).half()}, ValueError, "positive and finite"),
        ({"scale": torch.full((2, 3), 2.0**-130).bfloat16()}, ValueError, "and so must 1/scale"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_parts_that_do_not_fit(changes: dict, error: type[Exception], match: str) -> None:
    parts = {
        "int_repr": integers((2, 8), 4, False),
        "scale": torch.ones(2, 3),
        "zero_point": torch.zeros(2, 3, dtype=torch.int32),
        "bits": 4,
        "group_size": 3,
    }
    QTensor(**parts)  # type: ignore[arg-type]
    with pytest.raises(error, match=match):
        QTensor(**{**parts, **changes})  # type: ignore[arg-type]


def test_groups_of_a_0_d_tensor() -> None:
    with pytest.raises(ValueError, match="group_size must be None for a 0-d tensor"):
        QTensor(torch.tensor(1, dtype=torch.int8), 1.0, bits=4, group_size=4)


@pytest.mark.parametrize(
    ("codes", "more", "error", "match"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), {}, TypeError, "codes must be a torch.uint8"),
        (torch.zeros(2, 2, dtype=torch.uint8), {}, ValueError, r"codes must have shape \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.uint8), {"bits": 8}, ValueError, r"below 8"),
        (torch.full((2, 3), 0x10, dtype=torch.uint8), {}, ValueError, "zero bits after the last"),
    ],
)
def test_packed_codes_that_do_not_fit(
    codes: Tensor, more: dict, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        QTensor.from_packed(codes, (2, 5), 1.0, 0, **{"bits": 4, **more})


def test_questions_that_torchs_tensors_answer_otherwise() -> None:
    q = grouped((2, 8), 4, 4)
    for question in ("q_scale", "q_zero_point", "q_per_channel_scales", "q_per_channel_axis"):
        with pytest.raises(ValueError, match=f"{question} needs a per-.* this one is per group"):
            getattr(q, question)()
    with pytest.raises(ValueError, match="qscheme"):
        q.qscheme()
    with pytest.raises(ValueError, match="like needs a QTensor of 8 bits; this one has 4"):
        QTensor(integers((2, 8), 4, True), 1.0, bits=4).like(integers((2, 8), 8, True))
