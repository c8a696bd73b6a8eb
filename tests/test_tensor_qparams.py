from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zeropoint
from bits import assert_same_bits
from zeropoint import PerChannel, QuantSpec, choose_qparams, quantize_to_spec
from zeropoint.tensor import SMALLEST_SCALE

INF, NAN = math.inf, math.nan
SMALLEST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max
JUST_ABOVE_2_TO_128 = 2.0**-128 + 2.0**-149  # the smallest scale with a finite reciprocal
DTYPES = [(torch.quint8, torch.uint8), (torch.qint8, torch.int8)]
SPECS = [QuantSpec(signed=g, symmetric=y) for g in (True, False) for y in (True, False)]


# ---- choosing scale and zero point --------------------------------------------------------------


@given(
    a=st.floats(width=32, allow_nan=False, allow_infinity=False),
    b=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
@pytest.mark.parametrize("spec", SPECS)
def test_zero_is_exact_and_the_range_is_covered(spec: QuantSpec, a: float, b: float) -> None:
    lo, hi = min(a, b), max(a, b)
    scale, zero_point = choose_qparams(torch.tensor(lo), torch.tensor(hi), spec)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    s, z = float(scale), int(zero_point)
    assert math.isfinite(s)
    assert s >= SMALLEST_SCALE
    assert spec.qmin <= z <= spec.qmax
    q = zeropoint.quantize_per_tensor(torch.tensor([0.0, lo, hi]), s, z, spec.dtype)
    assert q.int_repr()[0] == z  # real zero has an integer of its own, exactly
    assert q.dequantize()[0] == 0.0
    # Both ends are represented within a step (half of one, plus the rounding of zero).
    for value, integer in zip((lo, hi), q.int_repr().tolist()[1:], strict=True):
        assert abs(s * (integer - z) - value) <= s * 1.0001
    if spec.symmetric:
        assert z == spec.zero_point_if_symmetric
        biggest = max(abs(lo), abs(hi))
        assert s * 127 >= biggest * (1 - 1e-6) or s == SMALLEST_SCALE


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("lo", "hi"),
    [(0.0, 0.0), (-0.0, 0.0), (SMALLEST, SMALLEST), (-SMALLEST, 2e-40), (3.0, 3.0), (-3.0, -3.0),
     (-LARGEST, LARGEST), (0.0, LARGEST), (-LARGEST, 0.0), (-1e-38, 1e-38)],
)  # fmt: skip
def test_constant_denormal_and_huge_ranges(spec: QuantSpec, lo: float, hi: float) -> None:
    scale, zero_point = choose_qparams(torch.tensor(lo), torch.tensor(hi), spec)
    assert SMALLEST_SCALE <= float(scale) < INF
    q = quantize_to_spec(torch.tensor([lo, hi, 0.0]), spec)
    assert_same_bits(q.scale, scale)
    assert_same_bits(q.zero_point, zero_point)
    assert q.dequantize()[2] == 0.0
    for value, integer in zip((lo, hi), q.int_repr().tolist()[:2], strict=True):
        assert abs(float(scale) * (integer - int(zero_point)) - value) <= float(scale)


def test_choose_qparams_by_hand() -> None:
    unsigned = QuantSpec(signed=False, symmetric=False)
    lo, hi = torch.tensor([-1.0, 2.0, -4.0]), torch.tensor([1.55, 5.1, -2.0])
    scale, zero_point = choose_qparams(lo, hi, unsigned)
    expected = [2.55 / 255, 5.1 / 255, 4 / 255]
    assert scale.tolist() == pytest.approx(expected, rel=1e-6)
    assert zero_point.tolist() == [100, 0, 255]
    scale, zero_point = choose_qparams(lo, hi, QuantSpec(symmetric=False))
    assert zero_point.tolist() == [-28, -128, 127]
    scale, zero_point = choose_qparams(lo, hi, QuantSpec())
    assert scale.tolist() == pytest.approx([1.55 / 127, 5.1 / 127, 4 / 127], rel=1e-6)
    assert zero_point.tolist() == [0, 0, 0]


def test_choose_qparams_refuses() -> None:
    one = torch.tensor(1.0)
    for bad in (NAN, INF, 1e300):
        value = torch.tensor(bad, dtype=torch.float64)
        with pytest.raises(ValueError, match="hi must be finite, got"):
            choose_qparams(-one, value, QuantSpec())
        with pytest.raises(ValueError, match="lo must be finite, got"):
            choose_qparams(-value, one, QuantSpec())
    with pytest.raises(ValueError, match=r"lo must not be above hi, got 1.0 above -1.0"):
        choose_qparams(one, -one, QuantSpec())
    with pytest.raises(ValueError, match="one shape"):
        choose_qparams(torch.zeros(2), torch.ones(3), QuantSpec())


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_quantize_to_spec_uses_each_channels_own_range(axis: int) -> None:
    x = torch.randn(3, 4, 5) * torch.arange(1.0, 6.0)
    spec = QuantSpec(granularity=PerChannel(axis))
    q = quantize_to_spec(x, spec)
    assert q.axis == axis % 3
    for i in range(x.shape[axis]):
        part = quantize_to_spec(x.select(axis, i), QuantSpec())
        assert_same_bits(q.int_repr().select(axis, i), part.int_repr())
        assert float(q.scale[i]) == part.q_scale()
    assert int(q.int_repr().abs().max()) == 127


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_quantize_to_spec_of_empties(shape: tuple[int, ...]) -> None:
    for spec in (QuantSpec(), QuantSpec(granularity=PerChannel(0))):
        q = quantize_to_spec(torch.zeros(shape), spec)
        assert q.shape == shape
        assert bool((q.scale == SMALLEST_SCALE).all())


def test_quantize_to_spec_of_a_vector_and_a_scalar() -> None:
    q = quantize_to_spec(torch.tensor([1.0, -4.0]), QuantSpec(granularity=PerChannel(0)))
    assert q.int_repr().tolist() == [127, -127]
    assert quantize_to_spec(torch.tensor(2.0), QuantSpec()).int_repr().item() == 127


def test_quantize_to_spec_refuses() -> None:
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        quantize_to_spec(torch.arange(3), QuantSpec())
    for bad in (NAN, INF, -INF):
        with pytest.raises(ValueError, match=rf"x must be finite, got {bad} .*\(1,\)"):
            quantize_to_spec(torch.tensor([0.0, bad]), QuantSpec())
    with pytest.raises(ValueError, match="axis 2 is not an axis"):
        quantize_to_spec(torch.ones(2, 2), QuantSpec(granularity=PerChannel(2)))
