"""The definition against oracles in Python integers and fractions, checkable by eye."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from bits import assert_same_bits
from zeropoint import QTensor, reference
from zeropoint.tensor import SMALLEST_SCALE

INF, NAN = math.inf, math.nan
SMALLEST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


# ---- the oracles --------------------------------------------------------------------------------


def round_half_even(x: Fraction) -> int:
    return round(x)  # Python's round of a Fraction goes to the nearest, ties to even


def to_float32(x: Fraction) -> float:
    """The float32 nearest to ``x``, ties to even: a mantissa of 24 bits, exponents from −149 on."""
    if x == 0:
        return 0.0
    exponent = -149
    while abs(x) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    mantissa = round_half_even(x / Fraction(2) ** exponent)
    if (abs(mantissa) == 2**24 and exponent == 104) or exponent > 104:
        return math.copysign(INF, x)
    return math.ldexp(mantissa, exponent)


def oracle_rows(row: list[float]) -> tuple[list[int], float, int]:
    lo, hi = min([0.0, *row]), max([0.0, *row])
    part = [to_float32(Fraction(to_float32(Fraction(v) / 255))) for v in (hi, lo)]
    scale = max(to_float32(Fraction(part[0]) - Fraction(part[1])), SMALLEST_SCALE)
    inverse = Fraction(to_float32(1 / Fraction(scale)))

    def steps(x: float) -> int:
        return round_half_even(Fraction(to_float32(Fraction(x) * inverse)))

    zero_point = min(max(steps(-lo), 0), 255)
    return [min(max(steps(x) + zero_point, 0), 255) for x in row], scale, zero_point


def oracle_product(
    q: list[list[int]], zero: list[int], weight: list[list[int]], weight_zero: list[int]
) -> list[list[int]]:
    out = [[0] * len(weight) for _ in q]
    for m in range(len(q)):
        for n in range(len(weight)):
            for k in range(len(weight[n])):
                out[m][n] += (q[m][k] - zero[m]) * (weight[n][k] - weight_zero[n])
    return out


def test_the_oracle_rounds_as_the_machine_does() -> None:
    for x in (
        0.1,
        -1 / 3,
        1e-45,
        7e-46,
        1e-40,
        3.4028235e38,
        3.5e38,
        1 + 2.0**-24,
        1 + 3 * 2.0**-24,
    ):
        try:
            expected = struct.unpack("f", struct.pack("f", x))[0]
        except OverflowError:  # how struct says infinity
            expected = math.copysign(INF, x)
        assert to_float32(Fraction(x)) == expected


# ---- fma ----------------------------------------------------------------------------------------


@given(a=finite, b=finite, c=finite)
@example(a=1 + 2.0**-12, b=1 + 2.0**-12, c=2.0**-80)  # just above a halfway point
@example(a=1 + 2.0**-12, b=1 + 2.0**-12, c=-(2.0**-80))  # just below
@example(a=2.0**-75, b=2.0**-75, c=2.0**-149)  # halfway between two subnormals
@example(a=2.0**-75, b=1.5 * 2.0**-75, c=0.0)  # a subnormal that rounds up
@example(a=2.0**-76, b=2.0**-76, c=0.0)  # below half the smallest
@example(a=2.0**-60, b=-(2.0**-60), c=SMALLEST)
@example(a=LARGEST, b=1.0, c=2.0**103)  # halfway to infinity
@example(a=LARGEST, b=LARGEST, c=-LARGEST)
@example(a=3.0, b=5.0, c=-15.0)
def test_fma_is_the_exact_sum_rounded_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = reference.fma(*(torch.tensor(v) for v in (a, b, c)))
    assert got.dtype == torch.float32
    assert float(got) == to_float32(exact)


def test_fma_near_halfway_points() -> None:
    """Sums whose float64 rounding lies on a float32 halfway point: rounding twice goes wrong."""
    generator = torch.Generator().manual_seed(1)
    wrong_if_rounded_twice = 0
    for _ in range(300):
        mantissa = int(torch.randint(2**23, 2**24, (), generator=generator))
        # c is a float32; a·b is half a unit of c plus a residue far below float64's last bit.
        c = float(mantissa)
        a, b = 0.5 + 2.0**-24, (1 - 2.0**-23)  # (1 + 2⁻²³)(1 − 2⁻²³)/2 = ½ − 2⁻⁴⁷
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        expected = to_float32(exact)
        got = float(reference.fma(*(torch.tensor(v, dtype=torch.float32) for v in (a, b, c))))
        assert got == expected
        twice = float(torch.tensor(a * b + c, dtype=torch.float64).to(torch.float32))
        wrong_if_rounded_twice += twice != expected
    assert wrong_if_rounded_twice > 50


def test_fma_of_infinities_and_nan() -> None:
    a = torch.tensor([INF, INF, 1.0, NAN, 0.0, 2.0])
    b = torch.tensor([1.0, 1.0, 1.0, 1.0, INF, 3.0])
    c = torch.tensor([0.0, -INF, -INF, 0.0, 1.0, 4.0])
    got = reference.fma(a, b, c).tolist()
    assert got[0] == INF
    assert math.isnan(got[1])
    assert got[2] == -INF
    assert math.isnan(got[3])
    assert math.isnan(got[4])
    assert got[5] == 10.0


# ---- rows ---------------------------------------------------------------------------------------


@given(row=st.lists(finite, max_size=9))
@example(row=[])
@example(row=[0.0, -0.0])
@example(row=[SMALLEST, -SMALLEST, 2e-39])
@example(row=[LARGEST, -LARGEST])
@example(row=[LARGEST, 0.0])
@example(row=[-LARGEST, -1.0])
@example(row=[255.0, 0.5, 1.5, 2.5, 253.5])  # scale 1: halfway points
@example(row=[-127.5, 127.5, 0.5])  # the zero point itself halfway
@example(row=[3.0, 3.0])
def test_rows_are_quantized_as_the_oracle_does(row: list[float]) -> None:
    q, scale, zero_point, fine = reference.quantize_rows(torch.tensor([row], dtype=torch.float32))
    integers, s, z = oracle_rows(row)
    assert bool(fine[0])
    assert float(scale[0]) == s
    assert int(zero_point[0]) == z
    assert q[0].tolist() == integers


@given(row=st.lists(finite, min_size=1, max_size=9))
def test_rows_represent_zero_exactly_and_the_rest_within_a_step(row: list[float]) -> None:
    q, scale, zero_point, _ = reference.quantize_rows(torch.tensor([[0.0, *row]]))
    s, z = float(scale[0]), int(zero_point[0])
    assert SMALLEST_SCALE <= s < INF
    assert int(q[0, 0]) == z
    for x, integer in zip(row, q[0, 1:].tolist(), strict=True):
        assert 0 <= integer <= 255
        assert abs(s * (integer - z) - x) <= s * 1.001


def test_zero_and_denormal_rows() -> None:
    x = torch.tensor([[0.0, -0.0], [SMALLEST, 1e-41], [-1e-38, 1e-38]])
    q, scale, zero_point, fine = reference.quantize_rows(x)
    assert bool(fine.all())
    assert q[:2].tolist() == [[0, 0], [0, 0]]
    assert zero_point[:2].tolist() == [0, 0]
    assert bool((scale == SMALLEST_SCALE).all())
    assert (q[2] - zero_point[2]).tolist() == [-1, 1]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_touches_no_other(bad: float) -> None:
    x = torch.randn(5, 7)
    alone = reference.quantize_rows(x)
    x[2, 3] = bad
    q, scale, zero_point, fine = reference.quantize_rows(x)
    assert fine.tolist() == [True, True, False, True, True]
    for got, expected in zip((q, scale, zero_point), alone[:3], strict=True):
        keep = [0, 1, 3, 4]
        assert_same_bits(got[keep], expected[keep])


def test_static_quantization_clamps_infinities_and_marks_nan() -> None:
    x = torch.tensor([[INF, -INF, 0.0], [NAN, 1.0, 2.0], [1e38, -1e38, 0.5]])
    q, no_nan = reference.quantize_static(x, torch.tensor(0.5), torch.tensor(100))
    assert no_nan.tolist() == [True, False, True]
    assert q[0].tolist() == [255, 0, 100]
    assert q[2].tolist() == [255, 0, 101]


# ---- products -----------------------------------------------------------------------------------

byte, signed = st.integers(0, 255), st.integers(-128, 127)


@given(data=st.data(), m=st.integers(0, 3), k=st.integers(0, 6), n=st.integers(0, 3))
def test_integer_product_is_a_triple_loop(data: st.DataObject, m: int, k: int, n: int) -> None:
    def matrix(rows: int, elements: st.SearchStrategy[int]) -> list[list[int]]:
        one = st.lists(elements, min_size=k, max_size=k)
        return data.draw(st.lists(one, min_size=rows, max_size=rows))

    q, w = matrix(m, byte), matrix(n, signed)
    zero = data.draw(st.lists(byte, min_size=m, max_size=m))
    weight_zero = data.draw(st.lists(signed, min_size=n, max_size=n))
    got = reference.integer_product(
        torch.tensor(q, dtype=torch.uint8).reshape(m, k),
        torch.tensor(zero, dtype=torch.int32),
        torch.tensor(w, dtype=torch.int8).reshape(n, k),
        torch.tensor(weight_zero, dtype=torch.int32),
    )
    expected = torch.tensor(oracle_product(q, zero, w, weight_zero), dtype=torch.float64)
    assert_same_bits(got, expected.reshape(m, n))  # bits: no negative zero either


def test_integer_product_has_one_zero_point_for_all() -> None:
    q = torch.tensor([[7, 3], [0, 255]])
    w = torch.tensor([[1, -2]])
    got = reference.integer_product(q, torch.tensor(3), w, torch.tensor(1))
    assert got.tolist() == [[0.0], [-756.0]]


@pytest.mark.parametrize(("k", "weight_zero"), [(65_793, 0), (65_794, 0), (33_026, 127)])
def test_integer_product_is_exact_where_int32_overflows(k: int, weight_zero: int) -> None:
    q = torch.full((1, k), 255, dtype=torch.uint8)
    w = torch.full((1, k), -128, dtype=torch.int8)
    exact = 255 * (-128 - weight_zero) * k
    assert (exact < -(2**31)) == (k != 65_793)
    got = reference.integer_product(q, torch.tensor(0), w, torch.tensor(weight_zero))
    assert got.item() == exact


def test_epilogue_rounds_each_operation_once() -> None:
    # 16777217 is no float32: it becomes 16777216 before it is scaled.
    acc, scale, weight_scale, bias = 2**24 + 1, 3.0, 0.1, 0.7
    y = reference.epilogue(
        torch.tensor([[float(acc)]], dtype=torch.float64),
        torch.tensor(scale),
        torch.tensor([weight_scale]),
        torch.tensor([bias]),
    )
    both = to_float32(Fraction(scale) * Fraction(to_float32(Fraction(weight_scale))))
    product = to_float32(Fraction(2**24) * Fraction(both))
    assert y.item() == to_float32(Fraction(product) + Fraction(to_float32(Fraction(bias))))


@given(
    row=st.lists(finite, min_size=3, max_size=3),
    w=st.lists(signed, min_size=3, max_size=3),
    weight_zero=signed,
    scale=st.floats(2.0**-20, 4.0, width=32),
    bias=st.floats(-8, 8, width=32),
)
def test_linears_follow_the_oracles(
    row: list[float], w: list[int], weight_zero: int, scale: float, bias: float
) -> None:
    weight = QTensor(
        torch.tensor([w], dtype=torch.int8),
        torch.tensor([scale]),
        torch.tensor([weight_zero], dtype=torch.int32),
        0,
    )
    x, b = torch.tensor([row]), torch.tensor([bias])

    def epilogue(acc: int, input_scale: float) -> float:
        both = to_float32(Fraction(input_scale) * Fraction(scale))
        product = to_float32(Fraction(to_float32(Fraction(acc))) * Fraction(both))
        return product if math.isinf(product) else to_float32(Fraction(product) + Fraction(bias))

    integers, s, z = oracle_rows(row)
    acc = oracle_product([integers], [z], [w], [weight_zero])[0][0]
    if s * scale < 1e38:
        assert reference.linear_dynamic(x, weight, b).item() == epilogue(acc, s)
        q = torch.tensor([integers])
        got = reference.linear_integer(q, torch.tensor(s), torch.tensor(z), weight, b)
        assert got.item() == epilogue(acc, s)

    chain = 0.0
    for x_k, w_k in zip(row, w, strict=True):
        if not math.isinf(chain):
            chain = to_float32(Fraction(x_k) * (w_k - weight_zero) + Fraction(chain))
    if not math.isinf(chain):
        product = to_float32(Fraction(chain) * Fraction(scale))
        if not math.isinf(product):
            expected = to_float32(Fraction(product) + Fraction(bias))
            assert reference.linear_weight_only(x, weight, b).item() == expected


def _weight(n: int, k: int) -> QTensor:
    integers = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return QTensor(integers, torch.rand(n) + 0.1, torch.randint(-5, 6, (n,)), 0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_row_is_nan_and_touches_no_other(bad: float) -> None:
    x, w, b = torch.randn(4, 6), _weight(3, 6), torch.randn(3)
    scale, zero_point = torch.tensor(0.02), torch.tensor(120)

    def results(x: Tensor) -> dict[str, Tensor]:
        return {
            "dynamic": reference.linear_dynamic(x, w, b),
            "static": reference.linear_static(x, scale, zero_point, w, b),
            "weight-only": reference.linear_weight_only(x, w, b),
        }

    before = results(x)
    x[1, 2] = bad
    for name, y in results(x).items():
        assert_same_bits(y[[0, 2, 3]], before[name][[0, 2, 3]], name)
        if name == "static" and math.isinf(bad):
            assert bool(y[1].isfinite().all())
        else:
            assert not bool(y[1].isfinite().any())


def test_rows_do_not_depend_on_the_batch() -> None:
    x, w = torch.randn(6, 20) * torch.logspace(-20, 20, 6)[:, None], _weight(5, 20)
    whole = reference.linear_dynamic(x, w, None)
    for i in range(6):
        assert_same_bits(whole[i : i + 1], reference.linear_dynamic(x[i : i + 1], w, None))
