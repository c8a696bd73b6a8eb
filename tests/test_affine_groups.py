"""Quantizing to 2 to 8 bits and by groups, against plain Python and per-channel quantization."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bits import assert_same_bits
from zeropoint import (
    PerChannel,
    PerGroup,
    PerTensor,
    QuantSpec,
    choose_qparams,
    int4,
    quantize_per_channel,
    quantize_per_group,
    quantize_per_tensor,
    quantize_to_spec,
)
from zeropoint.spec import SCALE_DTYPES, integer_range
from zeropoint.tensor import SMALLEST_SCALE

WIDTHS = range(2, 9)
LARGEST = torch.finfo(torch.float32).max
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def groups_of(row: list, size: int) -> list[list]:
    return [row[i : i + size] for i in range(0, len(row), size)]


def specs(size: int) -> list[QuantSpec]:
    return [
        QuantSpec(bits, signed, symmetric, PerGroup(size))
        for bits in (2, 3, 4, 8)
        for signed in (True, False)
        for symmetric in (True, False)
    ]


def draw_rows(data: st.DataObject, values: st.SearchStrategy = finite) -> Tensor:
    rows, columns = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 20))
    entries = data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(entries, dtype=torch.float32).reshape(rows, columns)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
@given(data=st.data())
def test_a_group_is_quantized_as_a_channel(bits: int, signed: bool, data: st.DataObject) -> None:
    x = draw_rows(data)
    size = data.draw(st.integers(1, 25))
    spec = QuantSpec(bits, signed, False, PerGroup(size))
    q = quantize_to_spec(x, spec)
    assert q.spec.bits == bits
    assert q.scale.shape == q.zero_point.shape == (len(x), PerGroup(size).count(x.shape[1]))
    channel = QuantSpec(bits, signed, False, PerChannel(0))
    for g in range(q.scale.shape[1]):
        part = quantize_to_spec(x[:, g * size : (g + 1) * size], channel)
        assert_same_bits(part.int_repr(), q.int_repr()[:, g * size : (g + 1) * size])
        assert_same_bits(part.scale, q.scale[:, g])
        assert_same_bits(part.zero_point, q.zero_point[:, g])


@given(data=st.data())
@pytest.mark.parametrize("spec", specs(3), ids=str)
def test_error_is_at_most_half_a_step(spec: QuantSpec, data: st.DataObject) -> None:
    x = draw_rows(data, st.floats(-100, 100, width=32))
    q = quantize_to_spec(x, spec)
    error = (q.dequantize().double() - x.double()).abs()
    step = q.scale.double().repeat_interleave(3, -1)[:, : x.shape[1]]
    # A zero point rounded to an integer moves an asymmetric range by half a step once more.
    assert bool((error <= step * (0.5 if spec.symmetric else 1.0) + 1e-5 * step + 1e-30).all())


@pytest.mark.parametrize("spec", [*specs(4), *specs(1)], ids=str)
def test_zero_is_exact(spec: QuantSpec) -> None:
    x = torch.tensor([[0.0, 5.0, 3.0, 7.0, -2.0, 0.0, -9.0, -1.0, 0.0]])
    assert bool((quantize_to_spec(x, spec).dequantize()[x == 0] == 0).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_range_is_symmetric(bits: int) -> None:
    """±the largest magnitude are both representable; the lowest integer is not used."""
    x = torch.tensor([[-3.0, 3.0, 1.0, -0.5]])
    q = quantize_to_spec(x, QuantSpec(bits, granularity=PerGroup(4)))
    largest = 2 ** (bits - 1) - 1
    assert float(q.scale) == float(np.float32(3) / np.float32(largest))
    assert q.int_repr()[0, :2].tolist() == [-largest, largest]
    assert int(q.zero_point) == 0
    unsigned = quantize_to_spec(x, QuantSpec(bits, False, True, PerGroup(4)))
    assert int(unsigned.zero_point) == 2 ** (bits - 1)
    assert_same_bits(unsigned.dequantize(), q.dequantize())


@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("signed", [True, False])
def test_integers_against_exact_arithmetic(bits: int, signed: bool) -> None:
    """Multiples of a power of two, so that every product is exact: the formula itself."""
    qmin, qmax = integer_range(bits, signed)
    x = torch.arange(-40, 41).reshape(1, -1) / 4
    scale = torch.tensor([[0.5, 1.0, 0.25]])
    zero_point = torch.tensor([[qmin, (qmin + qmax) // 2, qmax]])
    dtype = torch.int8 if signed else torch.uint8
    q = quantize_per_group(x, scale, zero_point, 30, dtype, bits=bits).int_repr()
    for k, value in enumerate(x[0].tolist()):
        s, z = float(scale[0, k // 30]), int(zero_point[0, k // 30])
        expected = round(Fraction(value) / Fraction(s) + z)
        assert int(q[0, k]) == min(max(expected, qmin), qmax), (k, value)


@pytest.mark.parametrize("bits", WIDTHS)
def test_other_granularities_below_8_bits(bits: int) -> None:
    x = torch.randn(5, 6)
    qmin, qmax = integer_range(bits, True)
    scale = torch.rand(5) + 0.1
    zero_point = torch.randint(qmin, qmax + 1, (5,))
    q = quantize_per_channel(x, scale, zero_point, 0, torch.int8, bits=bits)
    wide = quantize_per_channel(x, scale, zero_point, 0, torch.int8)
    assert_same_bits(q.int_repr(), wide.int_repr().clamp(qmin, qmax))
    q = quantize_per_tensor(x, 0.3, 1, torch.qint8, bits=bits)
    wide = quantize_per_tensor(x, 0.3, 1, torch.qint8)
    assert_same_bits(q.int_repr(), wide.int_repr().clamp(qmin, qmax))
    assert (q.bits, q.spec.granularity) == (bits, PerTensor())


def test_infinity_clamps_to_the_ends() -> None:
    x = torch.tensor([[torch.inf, -torch.inf, LARGEST, -LARGEST]])
    ones, eights = torch.ones(1, 2), torch.full((1, 2), 8)
    q = quantize_per_group(x, ones, eights, 2, torch.uint8, bits=4)
    assert q.int_repr().tolist() == [[15, 0, 15, 0]]


@pytest.mark.parametrize("spec", [int4(32), int4(32, symmetric=True)], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 1), (1, 1), (4,), (2, 3, 7)])
def test_empty_and_one_column(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    q = quantize_to_spec(x, spec)
    assert q.shape == shape
    assert q.scale.shape == (*shape[:-1], 1 if shape[-1] else 0)
    assert bool(((q.dequantize() - x).abs() <= q.scale * 0.51).all())


@pytest.mark.parametrize("spec", specs(2), ids=str)
@pytest.mark.parametrize(
    "values",
    [[0.0] * 4, [1e-40, -1e-40, 0, 0], [-0.0, 0.0, 5e-45, 0], [LARGEST / 4, -LARGEST / 4] * 2],
)
def test_extreme_ranges(spec: QuantSpec, values: list[float]) -> None:
    x = torch.tensor([values])
    q = quantize_to_spec(x, spec)
    assert bool((q.scale >= SMALLEST_SCALE).all())
    assert bool(q.dequantize().isfinite().all())


# ---- scales of a narrower type ------------------------------------------------------------------


@given(data=st.data())
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_rounded_scale_is_the_one_used(
    dtype: torch.dtype, symmetric: bool, data: st.DataObject
) -> None:
    x = draw_rows(data, st.floats(-1000, 1000, width=32))
    spec = int4(5, symmetric=symmetric, scale_dtype=dtype)
    q, wide = (
        quantize_to_spec(x, spec),
        quantize_to_spec(x, int4(5, symmetric=symmetric, scale_dtype=torch.float32)),
    )
    assert q.scale.dtype == dtype
    tiny = 2.0**-24 if dtype == torch.float16 else SMALLEST_SCALE
    assert_same_bits(q.scale, wide.scale.to(dtype).clamp(min=tiny))
    # The zero point and the integers are those of the rounded scale.
    scale = q.scale.float()
    if not symmetric:
        for row, s, z in zip(x.tolist(), scale, q.zero_point, strict=True):
            for g, part in enumerate(groups_of(row, 5)):
                lo = np.float32(min(0.0, *part)) if part else np.float32(0)
                expected = round(float(-lo * (np.float32(1) / np.float32(s[g]))))
                assert int(z[g]) == min(max(expected, 0), 15)
    again = quantize_per_group(x, scale, q.zero_point, 5, spec.dtype, bits=4)
    assert_same_bits(again.int_repr(), q.int_repr())
    assert_same_bits(again.dequantize(), q.dequantize())


@pytest.mark.parametrize("value", [0.0, 1e-9, 3e-8, 1e-6])
def test_small_scales_of_float16_do_not_become_zero(value: float) -> None:
    q = quantize_to_spec(torch.tensor([[value, -value]]), int4(2, scale_dtype=torch.float16))
    assert float(q.scale) >= 2.0**-24
    assert bool(q.dequantize().isfinite().all())


def test_scale_that_its_type_cannot_hold() -> None:
    x = torch.tensor([[2e6, 0.0]])
    with pytest.raises(ValueError, match=r"scale_dtype torch.float16 holds no scale above 65504"):
        quantize_to_spec(x, int4(2, scale_dtype=torch.float16))
    quantize_to_spec(x, int4(2, scale_dtype=torch.bfloat16))
    lo, hi = torch.tensor([-LARGEST]), torch.tensor([LARGEST])
    spec = QuantSpec(2, granularity=PerGroup(2), scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="holds no scale above"):
        choose_qparams(lo, hi, spec)


# ---- what is refused ----------------------------------------------------------------------------


def test_what_is_refused() -> None:
    x, s, z = torch.zeros(2, 5), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32)
    quantize_per_group(x, s, z, 2, torch.uint8)
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 2\)"):
        quantize_per_group(x, s, z, 3, torch.uint8)
    with pytest.raises(ValueError, match="size must be at least 1"):
        quantize_per_group(x, s, z, 0, torch.uint8)
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        quantize_per_group(x, s, z, 2, torch.uint8, bits=1)
    with pytest.raises(ValueError, match=r"zero_point must be within \[0, 15\] for uint4"):
        quantize_per_group(x, s, z + 16, 2, torch.uint8, bits=4)
    with pytest.raises(ValueError, match="NaN"):
        quantize_per_group(x / 0, s, z, 2, torch.uint8)
    with pytest.raises(TypeError, match="floating-point"):
        quantize_per_group(z, s, z, 2, torch.uint8)
    with pytest.raises(ValueError, match="0-d"):
        quantize_to_spec(torch.tensor(1.0), int4())
    with pytest.raises(ValueError, match=r"x must be finite, got inf"):
        quantize_to_spec(torch.tensor([[1.0, torch.inf]]), int4())


@pytest.mark.parametrize("columns", [1, 7, 64])
def test_rows_taken_in_several_goes(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    x = torch.randn(37, columns, generator=torch.Generator().manual_seed(0))
    for spec in (*specs(5), QuantSpec(bits=3, granularity=PerChannel(1)), QuantSpec()):
        whole = quantize_to_spec(x, spec)
        with monkeypatch.context() as patch:
            patch.setattr("zeropoint.affine.BLOCK", 3 * columns + 1)
            parts = quantize_to_spec(x, spec)
        assert_same_bits(parts.int_repr(), whole.int_repr())
        assert_same_bits(parts.scale, whole.scale)
        assert_same_bits(parts.zero_point, whole.zero_point)
        assert_same_bits(parts.dequantize(), whole.dequantize())
    monkeypatch.setattr("zeropoint.affine.BLOCK", 3 * columns)
    x[20, 0] = math.inf
    with pytest.raises(ValueError, match=r"got inf \(first at index \(20, 0\)\)"):
        quantize_to_spec(x, specs(5)[0])
