"""Embedding tables of integers: rows bit for bit, indices as torch takes them, dtypes, state."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zeropoint
from bits import assert_same_bits
from zeropoint import (
    WEIGHT_INT4,
    WEIGHT_INT8,
    PerChannel,
    PerGroup,
    PerTensor,
    QTensor,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantSpec,
    int4,
    quantize_to_spec,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECS = [
    WEIGHT_INT8,
    WEIGHT_INT4,
    QuantSpec(8, False, False, PerChannel(0)),
    QuantSpec(8, True, False, PerGroup(3)),
    QuantSpec(8, False, False, PerTensor()),
    int4(None),
    int4(None, symmetric=True),
    int4(2, scale_dtype=torch.float16),
    int4(1000),
    *(QuantSpec(bits, False, False, PerGroup(5)) for bits in (2, 3, 5, 6, 7)),
    QuantSpec(3, granularity=PerChannel(0)),
]


def table(rows: int, columns: int, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Embedding:
    return nn.Embedding(rows, columns, _weight=torch.randn(rows, columns).to(dtype), **more)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(0, 13),
    spec=st.sampled_from(SPECS),
    dtype=st.sampled_from(FLOATS),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    shape=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 2**16),
)
def test_rows_are_those_quantized_and_back(
    rows: int, columns: int, spec: QuantSpec, dtype: Any, index_dtype: Any, shape: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    embedding = table(rows, columns, dtype)
    ids = torch.randint(rows, tuple(shape)).to(index_dtype)
    reals = quantize_to_spec(embedding.weight, spec).dequantize().to(dtype)
    made = QuantizedEmbedding.from_embedding(embedding, spec)
    got = made(ids)
    assert got.shape == (*shape, columns)
    assert_same_bits(got, reals[ids.long()])
    assert_same_bits(made.dequantize().weight.detach(), reals)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_table_is_never_unpacked(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    made = QuantizedEmbedding.from_embedding(table(50, 8), spec)
    seen: list[int] = []
    dequantize = QTensor.dequantize

    def watched(self: QTensor) -> torch.Tensor:
        seen.append(self.shape[0])
        return dequantize(self)

    monkeypatch.setattr(QTensor, "dequantize", watched)
    made(torch.tensor([[1, 2], [2, 49]]))
    assert seen == [4]


@pytest.mark.parametrize("spec", [WEIGHT_INT8, WEIGHT_INT4], ids=str)
@pytest.mark.parametrize(
    "ids", [[10], [-1], [[0, 99]], 1.5, [True]], ids=["end", "negative", "far", "float", "bool"]
)
def test_wrong_indices_are_refused_as_by_torch(spec: QuantSpec, ids: Any) -> None:
    embedding = table(10, 4)
    made = QuantizedEmbedding.from_embedding(embedding, spec)
    with pytest.raises(Exception) as torchs:  # noqa: PT011
        embedding(torch.tensor(ids))
    with pytest.raises(type(torchs.value)) as ours:
        made(torch.tensor(ids))
    assert str(ours.value).splitlines()[0] == str(torchs.value).splitlines()[0]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_padding_row_of_zeros_stays_exactly_zero(spec: QuantSpec) -> None:
    embedding = nn.Embedding(5, 7, padding_idx=-2)
    made = QuantizedEmbedding.from_embedding(embedding, spec)
    assert made.padding_idx == 3
    assert_same_bits(made(torch.tensor(3)), torch.zeros(7))


def test_a_padding_row_that_was_trained_is_kept() -> None:
    embedding = table(5, 7, padding_idx=3)  # many published models have one
    assert embedding.weight[3].abs().min() > 0
    made = QuantizedEmbedding.from_embedding(embedding)
    assert (made(torch.tensor(3)) - embedding.weight[3]).abs().max() < 0.02


def test_what_only_gradients_see_is_ignored() -> None:
    embedding = table(5, 4, sparse=True, scale_grad_by_freq=True)
    ids = torch.tensor([0, 4])
    expected = QuantizedEmbedding.from_embedding(
        nn.Embedding.from_pretrained(embedding.weight.detach())
    )
    assert_same_bits(QuantizedEmbedding.from_embedding(embedding)(ids), expected(ids))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "embedding must be a torch.nn.Embedding, got Linear"),
        (lambda: table(3, 2, max_norm=1.0), ValueError, "no max_norm, got 1.0: looking a row up"),
        (
            lambda: nn.Embedding(2, 2, _weight=torch.full((2, 2), torch.nan)),
            ValueError,
            "NaN|finite",
        ),
        (lambda: nn.Embedding(2, 2, _weight=torch.full((2, 2), torch.inf)), ValueError, "finite"),
        (lambda: table(2, 2, torch.complex64), TypeError, "must be one of .*complex64"),
    ],
)
def test_tables_that_are_refused(make: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        QuantizedEmbedding.from_embedding(make())


def test_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match="padding_idx must be within the 3 rows, got 3"):
        QuantizedEmbedding(3, 2, 3)
    with pytest.raises(ValueError, match="bits must be from 2 to 8, got 1"):
        QuantizedEmbedding(3, 2, bits=1)
    with pytest.raises(TypeError, match=r"output_dtype .* must be one of .*got torch.int8"):
        QuantizedEmbedding(3, 2, output_dtype=torch.int8)
    with pytest.raises(ValueError, match="axis 1"):
        QuantizedEmbedding.from_embedding(table(3, 2), QuantSpec(granularity=PerChannel(1)))
    with pytest.raises(ValueError, match="weight must be 2-d"):
        QuantizedEmbedding.from_quantized(quantize_to_spec(torch.ones(3), QuantSpec()))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_and_layers_hold_the_same_integers(spec: QuantSpec) -> None:
    """So that a tied output layer can use them."""
    q = quantize_to_spec(torch.randn(6, 10), spec)
    rows, linear = QuantizedEmbedding.from_quantized(q), QuantizedLinear.from_quantized(q)
    for name, buffer in rows.named_buffers():
        assert_same_bits(buffer, getattr(linear, name), name)
    assert set(rows.state_dict()) == {"weight", "scale", "zero_point"}
    assert rows.weight_qtensor()._layout == linear.weight_qtensor()._layout
    assert rows.weight_qtensor()._int_repr is rows.weight


# dtypes, devices, state


def test_output_dtype_follows_casts_and_scales_do_not() -> None:
    made = QuantizedEmbedding.from_embedding(table(6, 4))
    ids, scale = torch.arange(6), made.scale
    reals = made(ids)
    for cast, dtype in (
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: nn.Sequential(m).float()[0], torch.float32),
    ):
        made = cast(made)
        assert made.output_dtype == dtype
        assert made.scale is scale
        assert_same_bits(made(ids), reals.to(dtype))
    assert "bfloat16" in repr(made.bfloat16())


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_cast_that_rows_cannot_follow_changes_nothing() -> None:
    made = QuantizedEmbedding.from_embedding(table(6, 4))
    before = {name: (id(b), b.dtype) for name, b in made.named_buffers()}
    with pytest.raises(TypeError, match="complex64"):
        made.to(torch.complex64)
    assert {name: (id(b), b.dtype) for name, b in made.named_buffers()} == before
    assert made.output_dtype == torch.float32


def test_on_the_meta_device() -> None:
    made = QuantizedEmbedding(6, 4, device="meta", bits=4, group_size=2)
    assert made(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 4)
    assert made.to_empty(device="cpu").weight.device.type == "cpu"
    assert made.output_dtype == torch.float32


@pytest.mark.parametrize("spec", [WEIGHT_INT8, WEIGHT_INT4], ids=str)
def test_state_dict_copy_and_torch_save(spec: QuantSpec) -> None:
    made = QuantizedEmbedding.from_embedding(table(6, 70, torch.bfloat16), spec)
    ids = torch.arange(6)
    other = QuantizedEmbedding.from_embedding(table(6, 70, torch.bfloat16), spec)
    other.load_state_dict(made.state_dict())
    assert_same_bits(other(ids), made(ids))
    assert_same_bits(copy.deepcopy(made)(ids), made(ids))
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    assert_same_bits(torch.load(file)["scale"], made.scale)


def test_a_row_changed_in_place_is_the_row_looked_up() -> None:
    made = QuantizedEmbedding.from_embedding(table(6, 4))
    made.weight[2] = 0
    assert_same_bits(made(torch.tensor(2)), torch.zeros(4))


def test_a_group_size_far_above_a_row_takes_no_memory() -> None:
    made = QuantizedEmbedding(3, 5, bits=4, group_size=2**60)
    assert made(torch.tensor([1])).shape == (1, 5)


@pytest.mark.parametrize(
    "spec", [WEIGHT_INT8, WEIGHT_INT4, QuantSpec(3, granularity=PerChannel(0))]
)
def test_compiled_whole_with_the_same_bits(spec: QuantSpec) -> None:
    made = QuantizedEmbedding.from_embedding(table(20, 70, torch.bfloat16), spec)
    ids = torch.randint(20, (3, 5))
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(ids), made(ids))
    program = torch.export.export(made, (ids,))
    assert_same_bits(program.module()(ids), made(ids))


def test_bytes() -> None:
    model = nn.Sequential(table(1000, 64))
    quantized = nn.Sequential(QuantizedEmbedding.from_embedding(model[0], WEIGHT_INT4))
    assert zeropoint.running.model_bytes(quantized) == 1000 * (32 + 2 * 2 + 2)
