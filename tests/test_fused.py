"""Activation and residual in the epilogue, and packed float weights: the bits of the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bits import assert_same_bits
from kernel_cases import activations, each_isa, weights
from zeropoint import QTensor, functional, kernels, prepack, reference, unpack
from zeropoint.affine import quantize

ACTIVATIONS = ("relu", "gelu", "silu")
INFINITY = float("inf")
EDGES = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-45, 87.0, -87.0, 88.5, -88.5, 1e30, -1e30, INFINITY, -INFINITY]
)


def expected_after(y: Tensor, activation: str | None, residual: Tensor | None, dtype: torch.dtype):
    """The definition, applied by hand to the float32 sums ``y``."""
    y = reference.activate(y, activation)
    return (y if residual is None else y + residual.to(dtype).float()).to(dtype)


@given(data=st.data(), activation=st.sampled_from((None, *ACTIVATIONS)), fused=st.booleans())
def test_float_outputs(data: st.DataObject, activation: str | None, fused: bool) -> None:
    m, k, n = (data.draw(st.integers(0, top)) for top in (40, 70, 140))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x, w = activations(g, m, k, dtype), weights(g, n, k, zero_points=data.draw(st.booleans()))
    bias = torch.randn(n, generator=g) if data.draw(st.booleans()) else None
    residual = (torch.randn(m, n, generator=g) * 3).to(dtype) if fused else None
    more = {"activation": activation, "residual": residual}
    s, z = torch.tensor(0.03), torch.tensor(97)
    expected = {
        "dynamic": reference.linear_dynamic(x, w, bias),
        "static": reference.linear_static(x, s, z, w, bias),
        "weight-only": reference.linear_weight_only(x, w, bias),
    }
    for isa in each_isa():
        got = {
            "dynamic": functional.linear_dynamic(x, w, bias, **more),
            "static": functional.linear_static(x, w, bias, 0.03, 97, **more),
            "weight-only": functional.linear_weight_only(x, w, bias, **more),
        }
        for mode, y in got.items():
            want = expected_after(expected[mode], activation, residual, dtype)
            assert_same_bits(y, want, f"{isa} {mode}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 64, 64), (33, 70, 130)])
def test_integer_outputs(activation: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    g = torch.Generator().manual_seed(m)
    info = torch.iinfo(dtype)
    q = torch.randint(info.min, info.max + 1, (m, k), generator=g, dtype=torch.int32).to(dtype)
    x, w, bias = QTensor(q, 0.02, 10), weights(g, n, k), torch.randn(n, generator=g)
    y = reference.activate(reference.linear_integer(q, x.scale, x.zero_point, w, bias), activation)
    out = torch.tensor(0.05)
    want = quantize(y, out, torch.tensor(30), info.min, info.max).to(dtype)
    assert want.unique().numel() > 1
    for isa in each_isa():
        got = functional.linear(x, w, bias, 0.05, 30, activation=activation)
        assert_same_bits(got.int_repr(), want, isa)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_k_beyond_int32(activation: str) -> None:
    k = 33_100
    x = QTensor(torch.full((2, k), 255, dtype=torch.uint8), 0.001, 0)
    w = QTensor(torch.full((3, k), -128, dtype=torch.int8), 1e-7, 127)
    residual = torch.ones(2, 3)
    y = reference.linear_integer(x.int_repr(), x.scale, x.zero_point, w, None)
    want = expected_after(y, activation, residual, torch.float32)
    for isa in each_isa():
        got = functional.linear_static(x, w, activation=activation, residual=residual)
        assert_same_bits(got, want, isa)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_kind_of_value_through_the_activation(activation: str) -> None:
    """A one-column layer of weight 1 hands its input to the activation."""
    g = torch.Generator().manual_seed(1)
    x = torch.cat(
        (
            EDGES,
            torch.tensor([float("nan")]),
            torch.randn(3000, generator=g) * 30,
            torch.linspace(-20, 20, 3001),
        )
    )
    want = reference.activate(x, activation)
    packed = prepack(torch.ones(1, 1))
    for isa in each_isa():
        got = functional.linear(x[:, None], packed, activation=activation)[:, 0]
        exact = x.abs() >= 1e-44  # 1 · x + 0 keeps every other value, zeros' signs excepted
        assert_same_bits(got[exact], want[exact], isa)


@pytest.mark.parametrize(
    ("activation", "torchs"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)]
)
def test_activations_are_those_of_torch(activation: str, torchs) -> None:
    x = torch.linspace(-30, 30, 60_001)
    exact = torchs(x.double())
    error = (reference.activate(x, activation) - exact).abs()
    assert float((error / (exact.abs() + 1)).max()) < 4e-7
    kept = reference.activate(torch.tensor([INFINITY, float("nan")]), activation)
    assert kept[0] == INFINITY
    assert kept[1].isnan()


@given(
    m=st.integers(0, 40),
    k=st.integers(0, 300),
    n=st.integers(0, 140),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 2**31),
)
def test_packed_float(m: int, k: int, n: int, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w, bias = torch.randn(n, k, generator=g).to(dtype), torch.randn(n, generator=g)
    packed = prepack(w, bias)
    back, same_bias = unpack(packed)
    assert_same_bits(back, w)
    assert same_bias is bias
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        x = activations(g, m, k, kind)
        want = reference.linear_float(x, w, bias).to(kind)
        for isa in each_isa():
            assert_same_bits(functional.linear(x, packed), want, f"{isa} {kind}")


def test_packed_float_is_close_to_torchs() -> None:
    w, x = torch.randn(130, 200), torch.randn(33, 200)
    torch.testing.assert_close(functional.linear(x, prepack(w)), F.linear(x, w))


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_alone_and_threads_give_the_same(threads: int) -> None:
    before = torch.get_num_threads()
    w, x, r = torch.randn(200, 300), torch.randn(70, 300), torch.randn(70, 200)
    packed = prepack(w)
    try:
        torch.set_num_threads(threads)
        whole = functional.linear(x, packed, activation="gelu", residual=r)
        torch.set_num_threads(1)
        for i in (0, 31, 69):
            alone = functional.linear(x[i], packed, activation="gelu", residual=r[i])
            assert_same_bits(alone, whole[i])
    finally:
        torch.set_num_threads(before)


def test_packed_quantized_weight_stands_for_weight_and_bias() -> None:
    g = torch.Generator().manual_seed(0)
    w, bias, x = weights(g, 20, 30), torch.randn(20), torch.randn(4, 30)
    q = QTensor(torch.randint(0, 256, (4, 30), dtype=torch.uint8), 0.02, 100)
    packed = prepack(w, bias)
    back, _ = unpack(packed)
    assert isinstance(back, QTensor)
    assert_same_bits(back.int_repr(), w.int_repr())
    assert_same_bits(functional.linear_dynamic(x, packed), functional.linear_dynamic(x, w, bias))
    assert_same_bits(
        functional.linear(q, packed).int_repr(), functional.linear(q, w, bias).int_repr()
    )
    with kernels.force_isa(kernels.REFERENCE):  # without a kernel it is taken apart
        assert_same_bits(functional.linear(x, packed), functional.linear(x, w, bias))


def test_errors_name_the_argument() -> None:
    x, w = torch.randn(2, 3), QTensor(torch.ones(4, 3, dtype=torch.int8), 0.1)
    with pytest.raises(ValueError, match="activation must be"):
        functional.linear_dynamic(x, w, activation="tanh")
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 4\), got \(2, 3\)"):
        functional.linear_dynamic(x, w, residual=x)
    with pytest.raises(TypeError, match="residual must be a floating-point"):
        functional.linear_dynamic(x, w, residual=torch.ones(2, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"weight must be a QTensor, torch\.float32 or"):
        prepack(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="bias must have shape"):
        prepack(torch.ones(2, 2), torch.ones(3))
    with pytest.raises(ValueError, match="weight must have shape"):
        prepack(torch.ones(2))


def test_gradients_pass_the_activation() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    w = weights(torch.Generator().manual_seed(3), 6, 8)
    functional.linear_weight_only(x, w, activation="silu").sum().backward()
    got, x.grad = x.grad, None
    F.silu(F.linear(x, w.dequantize())).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-5)
