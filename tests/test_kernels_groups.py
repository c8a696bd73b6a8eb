"""Kernels for weights in groups return the bits of the reference: every instruction set, thread
count, width, type of scale and of activation; a row alone or in a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zeropoint
from bits import assert_same_bits
from zeropoint import PerGroup, QTensor, QuantSpec, kernels
from zeropoint import functional as F

ISAS = [name for name in kernels.available_isas() if name != "reference"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("dynamic", "static", "weight_only", "integer", "quantized")

pytestmark = pytest.mark.skipif(not ISAS, reason="needs the core")


def weight(n: int, k: int, spec: QuantSpec, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    return zeropoint.quantize_to_spec(torch.randn(n, k, generator=generator), spec)


def spec(
    bits: int = 4, group: int = 32, signed: bool = False, scales: torch.dtype = torch.float32
) -> QuantSpec:
    return QuantSpec(bits, signed, signed, PerGroup(group), scales)


def result(kind: str, x: torch.Tensor, w: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
    if kind == "dynamic":
        return F.linear_dynamic(x, w, bias)
    if kind == "static":
        return F.linear_static(x, w, bias, 0.05, 100)
    if kind == "weight_only":
        return F.linear_weight_only(x, w, bias)
    q = zeropoint.quantize_per_tensor(x, 0.04, 90, torch.quint8)
    if kind == "integer":
        return F.linear_static(q, w, bias)
    y = F.linear(q, w, bias, 0.3, 120)
    assert isinstance(y, QTensor)
    return y.int_repr()


def check(kind: str, x: torch.Tensor, w: QTensor, bias: torch.Tensor | None = None) -> None:
    with zeropoint.force_isa("reference"):
        expected = result(kind, x, w, bias)
    threads = torch.get_num_threads()
    try:
        for isa in ISAS:
            with zeropoint.force_isa(isa):
                assert kernels.usable(x, w)
                for count in (1, 2):
                    torch.set_num_threads(count)
                    assert_same_bits(result(kind, x, w, bias), expected, f"{kind}, {isa}, {count}")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [False, True])  # a zero point for each group; one for all
@pytest.mark.parametrize("rows", [1, 3, 7, 40])
def test_rows(kind: str, signed: bool, rows: int) -> None:
    torch.manual_seed(rows)
    check(kind, torch.randn(rows, 96) + 0.5, weight(70, 96, spec(signed=signed)), torch.randn(70))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [1, 3, 8, 20, 32, 64, 1000])
def test_k_not_a_multiple_of_the_group(kind: str, group: int) -> None:
    for rows in (2, 9):
        check(kind, torch.randn(rows, 77), weight(17, 77, spec(group=group)), torch.randn(17))


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("scales", FLOATS)
def test_widths_and_types_of_scale(kind: str, bits: int, scales: torch.dtype) -> None:
    for signed in (False, True):
        w = weight(33, 64, spec(bits, 16, signed, scales))
        for rows in (5, 20):
            check(kind, torch.randn(rows, 64), w)


@pytest.mark.parametrize("kind", ["dynamic", "static", "weight_only"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_types_of_activation(kind: str, dtype: torch.dtype) -> None:
    check(kind, torch.randn(4, 3, 40).to(dtype), weight(20, 40, spec()), torch.randn(20))


@pytest.mark.parametrize("group", [480, 481, 600])  # up to 480 sums of activations are two int16
def test_zero_points_of_long_groups(group: int) -> None:
    x = torch.full((3, 1200), 9.0)
    x[0, 5] = -1000.0  # nearly all activations are 255 of 255
    check("dynamic", x, weight(9, 1200, spec(group=group)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [2, 20])
def test_accumulators_at_their_extremes(bits: int, rows: int) -> None:
    top = 2**bits - 1
    codes = torch.full((3, 512), top, dtype=torch.uint8)
    codes[1] = 0
    for zeros in ([0, top, 0], [top, 0, top], [0, 0, 0]):
        zero = torch.tensor(zeros, dtype=torch.int32)[:, None]
        w = QTensor(codes, torch.ones(3, 1), zero, bits=bits, group_size=512)
        for value in (-128, 127):
            q = QTensor(torch.full((rows, 512), value, dtype=torch.int8), 1.0, 0)
            with zeropoint.force_isa("reference"):
                expected = F.linear_static(q, w)
            assert expected[0, 0] == value * (top - zeros[0]) * 512
            for isa in ISAS:
                with zeropoint.force_isa(isa):
                    assert_same_bits(F.linear_static(q, w), expected, isa)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_row_with_nan_is_nan_and_touches_no_other(kind: str) -> None:
    x = torch.randn(4, 64)
    x[2, 63] = torch.nan
    w = weight(18, 64, spec())
    check(kind, x, w)
    y = result(kind, x, w, None)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("kind", ["dynamic", "weight_only", "integer"])
def test_a_row_alone_or_in_a_batch(kind: str) -> None:
    x, w = torch.randn(30, 128), weight(65, 128, spec())
    together = result(kind, x, w, None)
    for i in (0, 7, 29):
        assert_same_bits(result(kind, x[i : i + 1], w, None)[0], together[i], f"row {i}")


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_strided_input(kind: str) -> None:
    check(kind, torch.randn(6, 200)[:, 3:67], weight(12, 64, spec()))
    check(kind, torch.randn(64, 6).T, weight(12, 64, spec()))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_fused(activation: str) -> None:
    x, w, bias, residual = (
        torch.randn(5, 64),
        weight(20, 64, spec()),
        torch.randn(20),
        torch.randn(5, 20),
    )
    for function in (F.linear_dynamic, F.linear_weight_only):
        with zeropoint.force_isa("reference"):
            expected = function(x, w, bias, activation=activation, residual=residual)
        for isa in ISAS:
            with zeropoint.force_isa(isa):
                y = function(x, w, bias, activation=activation, residual=residual)
                assert_same_bits(y, expected, isa)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape", [(5, 40), (64, 64), (1, 1), (3, 0), (0, 8)])
def test_packed_and_back(signed: bool, shape: tuple[int, int]) -> None:
    w = weight(*shape, spec(group=24, signed=signed, scales=torch.bfloat16))
    packed = zeropoint.prepack(w)
    again, _ = zeropoint.unpack(packed)
    assert packed.is_packed
    assert isinstance(again, QTensor)
    assert again.int_repr().equal(w.int_repr())
    assert again.scale.equal(w.scale)
    assert (again.bits, again.group_size, again.dtype) == (w.bits, w.group_size, w.dtype)
    x = torch.randn(2, shape[1])
    assert_same_bits(F.linear_dynamic(x, packed), F.linear_dynamic(x, w), "packed")


def test_groups_beyond_what_int32_holds_compute_by_the_reference() -> None:
    for bits, longest in ((4, 1 << 20), (8, 1 << 16)):
        for size in (longest, longest + 1):
            w = QTensor(
                torch.ones(1, 8, dtype=torch.uint8),
                torch.ones(1, 1),
                torch.zeros(1, 1, dtype=torch.int32),
                bits=bits,
                group_size=size,
            )
            assert kernels.has_kernel(w) == (size == longest)
            assert F.linear_dynamic(torch.ones(1, 8), w).shape == (1, 1)


@given(
    rows=st.integers(0, 24),
    n=st.integers(0, 80),
    k=st.integers(0, 70),
    group=st.integers(1, 80),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    rows: int, n: int, k: int, group: int, bits: int, signed: bool, kind: str, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, k) * 10.0 ** (seed % 9 - 4)
    check(kind, x, weight(n, k, spec(bits, group, signed, FLOATS[seed % 3]), seed))
