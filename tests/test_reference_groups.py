"""The definition for groups of inputs, against oracles in Python integers and fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bits import assert_same_bits
from test_reference import to_float32
from zeropoint import QTensor, QuantSpec, functional, kernels, quantize_to_spec, reference
from zeropoint.spec import PerGroup, integer_range

WIDTHS = (2, 4, 7, 8)
few = settings(max_examples=12)  # the oracle is slow


class Float:
    """A float32 and its exact value; operations round once, ties to even, and keep signed zeros
    out of the way: the cases here have none that matter."""

    @staticmethod
    def fma(a: Fraction, b: Fraction, c: Fraction) -> Fraction:
        return Fraction(to_float32(a * b + c))


def exact(t: Tensor) -> list[Fraction]:
    return [Fraction(float(v)) for v in t.flatten().tolist()]


def weight(
    n: int, k: int, bits: int, size: int, seed: int, dtype: torch.dtype = torch.float32
) -> QTensor:
    g = torch.Generator().manual_seed(seed)
    low, high = integer_range(bits, seed % 2 == 0)
    integers = torch.randint(low, high + 1, (n, k), generator=g)
    groups = PerGroup(size).count(k)
    scale = (torch.rand(n, groups, generator=g) * 3 + 0.01).to(dtype)
    zero_point = torch.randint(low, high + 1, (n, groups), generator=g)
    storage = torch.int8 if seed % 2 == 0 else torch.uint8
    return QTensor(integers.to(storage), scale, zero_point, bits=bits, group_size=size)


def centred(w: QTensor) -> list[list[int]]:
    """``w − zero_point`` in Python's integers."""
    q, z, size = w.int_repr().tolist(), w.zero_point.tolist(), w.group_size or 1
    return [[v - z[n][k // size] for k, v in enumerate(row)] for n, row in enumerate(q)]


def runs(k: int, size: int) -> list[range]:
    return [range(i, min(i + size, k)) for i in range(0, k, size)]


def oracle_weight_only(x: Tensor, w: QTensor, bias: Tensor | None) -> list[list[float]]:
    result = []
    for row in x:
        a, line = exact(row), []
        for n, v in enumerate(centred(w)):
            y, scale = Fraction(0), exact(w.scale[n])
            for g, run in enumerate(runs(x.shape[1], w.group_size or 1)):
                p = Fraction(0)
                for k in run:
                    p = Float.fma(a[k], Fraction(v[k]), p)
                y = Float.fma(p, scale[g], y)
            line.append(to_float32(y + (0 if bias is None else exact(bias)[n])))
        result.append(line)
    return result


def oracle_integer(
    q: Tensor, scale: Tensor, zero_point: Tensor, w: QTensor, bias: Tensor | None
) -> list[list[float]]:
    middle = 0 if q.dtype == torch.int8 else 128
    result = []
    for m, row in enumerate(q.tolist()):
        a, line = [v - middle for v in row], []
        z = int(zero_point.expand(len(q))[m]) - middle
        s = Fraction(float(scale.expand(len(q))[m]))
        for n, v in enumerate(centred(w)):
            t = c = Fraction(0)
            own = exact(w.scale[n])
            for g, run in enumerate(runs(q.shape[1], w.group_size or 1)):
                t = Float.fma(
                    Fraction(to_float32(Fraction(sum(a[k] * v[k] for k in run)))), own[g], t
                )
                c = Float.fma(Fraction(to_float32(Fraction(sum(v[k] for k in run)))), own[g], c)
            y = Fraction(to_float32(Float.fma(Fraction(-z), c, t) * s))
            line.append(to_float32(y + (0 if bias is None else exact(bias)[n])))
        result.append(line)
    return result


def same(got: Tensor, expected: list[list[float]]) -> None:
    shape = got.shape
    assert_same_bits(got + 0.0, torch.tensor(expected, dtype=torch.float32).reshape(shape) + 0.0)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 10))


@pytest.mark.parametrize("bits", WIDTHS)
@few
@given(sizes=sizes, seed=st.integers(0, 99), bias=st.booleans())
@example(sizes=(2, 7, 3, 3), seed=1, bias=True)  # a last short group
def test_weight_only(bits: int, sizes: tuple[int, ...], seed: int, bias: bool) -> None:
    m, k, n, size = sizes
    w = weight(n, k, bits, size, seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    b = torch.randn(n, generator=g) if bias else None
    same(reference.linear_weight_only(x, w, b), oracle_weight_only(x, w, b))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@few
@given(sizes=sizes, seed=st.integers(0, 99), bias=st.booleans())
@example(sizes=(2, 7, 3, 3), seed=1, bias=True)
def test_integer(
    bits: int, dtype: torch.dtype, sizes: tuple[int, ...], seed: int, bias: bool
) -> None:
    m, k, n, size = sizes
    w = weight(n, k, bits, size, seed, torch.bfloat16)
    g = torch.Generator().manual_seed(seed)
    info = torch.iinfo(dtype)
    q = torch.randint(info.min, info.max + 1, (m, k), generator=g).to(dtype)
    b = torch.randn(n, generator=g) if bias else None
    z = torch.randint(info.min, info.max + 1, (m,), generator=g, dtype=torch.int32)
    s = torch.rand(m, generator=g) + 0.01
    same(reference.linear_integer(q, s, z, w, b), oracle_integer(q, s, z, w, b))
    same(reference.linear_integer(q, s[0], z[0], w, b), oracle_integer(q, s[0], z[0], w, b))


@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_and_static(bits: int) -> None:
    w, bias = weight(3, 11, bits, 4, 0), torch.randn(3)
    x = torch.randn(4, 11)
    q, s, z, _ = reference.quantize_rows(x)
    same(reference.linear_dynamic(x, w, bias), oracle_integer(q, s, z, w, bias))
    scale, zero_point = torch.tensor(0.02), torch.tensor(131)
    q, _ = reference.quantize_static(x, scale, zero_point)
    got = reference.linear_static(x, scale, zero_point, w, bias)
    same(got, oracle_integer(q, scale, zero_point, w, bias))


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("size", [5, 9, 1000])
def test_one_group_is_a_channel(mode: str, size: int) -> None:
    """Weight only, the same bits; integer activations add the zero points' part apart: nearly."""
    w = weight(4, 5, 4, size, 0)
    channels = QTensor(w.int_repr(), w.scale[:, 0], w.zero_point[:, 0], 0, bits=4)
    x, bias = torch.randn(6, 5), torch.randn(4)
    function = getattr(reference, f"linear_{mode}")
    got, expected = function(x, w, bias), function(x, channels, bias)
    if mode == "weight_only":
        assert_same_bits(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 5, 7])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_per_channel_below_8_bits_computes_as_8(bits: int, mode: str) -> None:
    q = quantize_to_spec(torch.randn(4, 9), QuantSpec(bits, False, False))
    wide = QTensor(q.int_repr(), q.scale, q.zero_point)
    x = torch.randn(3, 9)
    function = getattr(reference, f"linear_{mode}")
    assert_same_bits(function(x, q, None), function(x, wide, None))


@pytest.mark.parametrize("mode", ["dynamic", "weight_only", "static"])
def test_rows_do_not_see_each_other(mode: str) -> None:
    w, bias = weight(3, 8, 4, 3, 0), torch.randn(3)
    x = torch.randn(5, 8)
    x[1, 2], x[3, 0] = torch.nan, torch.inf

    def compute(rows: Tensor) -> Tensor:
        if mode == "static":
            scale, zero_point = torch.tensor(0.02), torch.tensor(120, dtype=torch.int32)
            return reference.linear_static(rows, scale, zero_point, w, bias)
        return getattr(reference, f"linear_{mode}")(rows, w, bias)

    together = compute(x)
    for m in range(5):
        assert_same_bits(together[m : m + 1], compute(x[m : m + 1]))
    assert together[1].isnan().all()
    assert together[3].isnan().all() == (mode == "dynamic")
    assert together[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (1, 1, 1)])
def test_empty_and_one_column(mode: str, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    w, bias = weight(n, k, 4, 2, 0), torch.randn(n)
    y = getattr(reference, f"linear_{mode}")(torch.randn(m, k), w, bias)
    assert y.shape == (m, n)
    if k == 0:
        assert_same_bits(y, bias.expand(m, n).contiguous())


def test_long_groups_are_summed_exactly() -> None:
    """Sums beyond 2**24 are rounded once, to float32."""
    k = 70_000
    w = QTensor(
        torch.full((1, k), 127, dtype=torch.int8),
        torch.ones(1, 1),
        torch.full((1, 1), -128),
        group_size=k,
    )
    q = torch.full((1, k), 255, dtype=torch.uint8)
    q[0, 0] = 1
    got = reference.linear_integer(q, torch.tensor(1.0), torch.tensor(128), w, None)
    exact_sum = Fraction((k - 1) * 127 * 255 + (1 - 128) * 255)
    assert float(got) == to_float32(exact_sum)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_function_and_reference_agree(mode: str) -> None:
    """Whatever computes: the kernel where there is one."""
    for bits, size in ((4, 32), (4, 7), (3, 16), (8, 32)):
        w, bias = weight(5, 70, bits, size, 0), torch.randn(5)
        x = torch.randn(2, 3, 70)
        expected = getattr(reference, f"linear_{mode}")(x.reshape(6, 70), w, bias)
        for isa in kernels.available_isas():
            with kernels.force_isa(isa):
                got = getattr(functional, f"linear_{mode}")(x, w, bias)
            assert_same_bits(got, expected.reshape(2, 3, 5), f"{isa}, {bits} bits")
