from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zeropoint
from bits import assert_same_bits
from zeropoint import QTensor, functional, kernels, reference
from zeropoint.affine import quantize

ENGINES = [e for e in ("fbgemm", "onednn") if e in torch.backends.quantized.supported_engines]
# Without the dot-product instructions, torch's kernels saturate when both operands use all 8 bits.
TORCH_IS_EXACT = torch.backends.cpu.get_cpu_capability() == "AVX512"

both_paths = pytest.mark.parametrize(
    "isa", sorted({kernels.active_isa(), kernels.REFERENCE}, reverse=True)
)


def int8_weight(n: int, k: int, zero_points: bool = False) -> QTensor:
    z = torch.randint(-20, 20, (n,)) if zero_points else torch.zeros(n, dtype=torch.int32)
    integers = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return QTensor(integers, torch.rand(n) * 0.01 + 0.001, z, 0)


def uint8_input(*shape: int) -> QTensor:
    return QTensor(torch.randint(0, 256, shape, dtype=torch.uint8), 0.03, 131)


# ---- float --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (6,), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float_inputs_are_torchs_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, b = torch.randn(shape, dtype=dtype), torch.randn(5, 6).to(dtype), torch.randn(5).to(dtype)
    assert_same_bits(functional.linear(x, w, b), F.linear(x, w, b))
    assert_same_bits(functional.linear(x, w), F.linear(x, w))


# ---- QTensor x QTensor --------------------------------------------------------------------------


@contextmanager
def torch_engine(name: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def torchs_linear(
    engine: str, x: Tensor, w: Tensor, bias: Tensor | None, scale: float, zero_point: int
) -> Tensor:
    with torch_engine(engine):
        packed = torch.ops.quantized.linear_prepack(w, bias)
        return torch.ops.quantized.linear(x, packed, scale, zero_point)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=80)
@given(data=st.data())
@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_are_within_a_step_of_torchs(engine: str, data: st.DataObject) -> None:
    draw = data.draw
    m, k, n = draw(st.integers(1, 40)), draw(st.integers(1, 200)), draw(st.integers(1, 90))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch._make_per_tensor_quantized_tensor(
        torch.randint(0, 256 if TORCH_IS_EXACT else 128, (m, k), generator=g).to(torch.uint8),
        draw(st.floats(0.001, 0.1)),
        draw(st.integers(0, 255)),
    )
    integers = torch.randint(-127, 128, (n, k), generator=g).to(torch.int8)
    if draw(st.booleans()):
        zero_points = torch.zeros(n, dtype=torch.int64)
        if engine == "fbgemm":  # onednn takes none
            zero_points = torch.randint(-20, 21, (n,), generator=g)
        scales = torch.rand(n, generator=g, dtype=torch.float64) * 0.02 + 0.001
        w = torch._make_per_channel_quantized_tensor(integers, scales, zero_points, 0)
    else:
        zero_point = draw(st.integers(-20, 20)) if engine == "fbgemm" else 0
        w = torch._make_per_tensor_quantized_tensor(
            integers, draw(st.floats(1e-3, 0.02)), zero_point
        )
    bias = torch.randn(n, generator=g) * 5 if draw(st.booleans()) else None
    y = F.linear(x.dequantize(), w.dequantize(), bias)
    scale = max(float(y.max() - y.min()) / 200, 1e-3)
    zero_point = min(max(round(-float(y.min()) / scale), 0), 255)

    theirs = torchs_linear(engine, x, w, bias, scale, zero_point)
    ours = functional.linear(QTensor.from_torch(x), QTensor.from_torch(w), bias, scale, zero_point)
    assert ours.q_zero_point() == zero_point
    assert ours.q_scale() == pytest.approx(scale, rel=1e-7)
    difference = (ours.int_repr().int() - theirs.int_repr().int()).abs()
    assert int(difference.max()) <= 1
    # They differ only where the real is halfway between two integers, as far as float32 can tell.
    exact = F.linear(
        x.dequantize().double(), w.dequantize().double(), None if bias is None else bias.double()
    )
    from_half = ((exact / scale) % 1 - 0.5).abs()
    magnitude = exact.abs().max() / scale + 256
    assert bool((from_half[difference > 0] < 1e-6 * magnitude + 1e-5).all())


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_rarely_differ_from_torchs(engine: str) -> None:
    """The statistic of docs/agreement_with_torch.md: fewer than one output in 100,000."""
    outputs = differ = 0
    for _ in range(3):
        x, w, b = torch.randn(64, 256), torch.randn(512, 256) / 16, torch.randn(512)
        y = F.linear(x, w, b)
        scale = float(y.max() - y.min()) / 255
        zero_point = round(-float(y.min()) / scale)
        xq = torch.quantize_per_tensor(x, float(x.abs().max()) / 63, 64, torch.quint8)
        zeros = torch.zeros(512, dtype=torch.int64)
        wq = torch.quantize_per_channel(w, w.abs().amax(1) / 127, zeros, 0, torch.qint8)
        theirs = torchs_linear(engine, xq, wq, b, scale, zero_point).int_repr()
        ours = functional.linear(xq, wq, b, scale, zero_point)
        assert len(theirs.unique()) > 100
        differ += int((ours.int_repr() != theirs).sum())
        outputs += theirs.numel()
    assert differ <= outputs // 10_000


@both_paths
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_quantized_is_the_requantized_reference(isa: str, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    q = torch.randint(info.min, info.max + 1, (7, 33)).to(dtype)
    x, w, b = QTensor(q, 0.02, 5), int8_weight(20, 33, True), torch.randn(20)
    y = reference.linear_integer(q, x.scale, x.zero_point, w, b)
    expected = quantize(y, torch.tensor(0.25), torch.tensor(11), info.min, info.max).to(dtype)
    with kernels.force_isa(isa):
        got = functional.linear(x, w, b, 0.25, 11)
        assert_same_bits(got.int_repr(), expected)
        assert (got.q_scale(), got.q_zero_point(), got.dtype) == (0.25, 11, dtype)
        assert_same_bits(functional.linear_static(x, w, b), y)


@both_paths
def test_output_scale_and_zero_point_default_to_the_inputs(isa: str) -> None:
    x, w = uint8_input(3, 8), int8_weight(4, 8)
    with kernels.force_isa(isa):
        for given, expected in (
            ({}, (x.q_scale(), 131)),
            ({"scale": 0.5}, (0.5, 131)),
            ({"zero_point": 7}, (x.q_scale(), 7)),
            ({"scale": torch.tensor(0.5), "zero_point": torch.tensor(7)}, (0.5, 7)),
        ):
            y = functional.linear(x, w, **given)
            assert (y.q_scale(), y.q_zero_point()) == expected
            again = functional.linear(x, w, None, *expected)
            assert_same_bits(y.int_repr(), again.int_repr())


@pytest.mark.filterwarnings("ignore")
def test_torchs_quantized_tensors_are_taken_everywhere() -> None:
    x = torch.quantize_per_tensor(torch.randn(3, 8), 0.03, 120, torch.quint8)
    zeros = torch.zeros(5, dtype=torch.int64)
    w = torch.quantize_per_channel(torch.randn(5, 8), torch.rand(5) + 0.01, zeros, 0, torch.qint8)
    ox, ow, b, real = (
        QTensor.from_torch(x),
        QTensor.from_torch(w),
        torch.randn(5),
        torch.randn(3, 8),
    )
    for some_w in (w, nn.Parameter(w, requires_grad=False)):
        got, expected = functional.linear(x, some_w, b), functional.linear(ox, ow, b)
        assert_same_bits(got.int_repr(), expected.int_repr())
        assert_same_bits(
            functional.linear_static(x, some_w, b), functional.linear_static(ox, ow, b)
        )
        for function in (
            functional.linear,
            functional.linear_dynamic,
            functional.linear_weight_only,
        ):
            assert_same_bits(function(real, some_w, b), function(real, ow, b))


# ---- shapes -------------------------------------------------------------------------------------

LEADS = [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 0, 3)]


@both_paths
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("k", "n"), [(9, 4), (0, 4), (9, 0), (0, 0), (1, 1)])
def test_any_leading_shape_and_size_zero(isa: str, lead: tuple[int, ...], k: int, n: int) -> None:
    w, b = int8_weight(n, k, True), torch.randn(n)
    x, q = torch.randn(*lead, k), uint8_input(*lead, k)
    rows = x.reshape(math.prod(lead), k)
    with kernels.force_isa(isa):
        for function, definition in (
            (functional.linear_dynamic, reference.linear_dynamic),
            (functional.linear_weight_only, reference.linear_weight_only),
        ):
            assert_same_bits(function(x, w, b), definition(rows, w, b).reshape(*lead, n))
        y = functional.linear_static(q, w, b)
        integers = q.int_repr().reshape(math.prod(lead), k)
        expected = reference.linear_integer(integers, q.scale, q.zero_point, w, b)
        assert_same_bits(y, expected.reshape(*lead, n))
        assert functional.linear(q, w, b).shape == (*lead, n)
        assert functional.linear_static(x, w, b, 0.1, 3).shape == (*lead, n)


# ---- errors -------------------------------------------------------------------------------------

X, Q, W, B = torch.ones(2, 3), QTensor(torch.ones(2, 3, dtype=torch.uint8), 1.0), None, None
W = QTensor(torch.ones(4, 3, dtype=torch.int8), torch.ones(4), torch.zeros(4, dtype=torch.int32), 0)
B = torch.ones(4)
COLUMNS = QTensor(W.int_repr(), torch.ones(3), torch.zeros(3, dtype=torch.int32), 1)
ROWS = QTensor(Q.int_repr(), torch.ones(2), torch.zeros(2, dtype=torch.int32), 0)


@both_paths
@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        ("linear", (Q, torch.ones(4, 3)), TypeError, "weight must be a QTensor when input is one"),
        ("linear", (X, torch.ones(4, 3), None, 1.0), TypeError, "scale and zero_point are for a"),
        ("linear", (X, W, None, None, 3), TypeError, "scale and zero_point are for a QTensor"),
        ("linear", (Q, W, B, -1.0), ValueError, "scale must be positive"),
        ("linear", (Q, W, B, 1.0, 256), ValueError, r"zero_point must be within \[0, 255\]"),
        ("linear", (Q, W, torch.ones(3)), ValueError, r"bias must be .* shape \(4,\), got \(3,\)"),
        ("linear", (Q, W, [1.0] * 4), ValueError, "bias must be a floating-point tensor"),
        ("linear", (Q, W, torch.ones(4).int()), ValueError, "bias must be .* got .*int32"),
        ("linear", (Q, COLUMNS), ValueError, r"per channel along axis 0; got .* axis 1"),
        ("linear", (ROWS, W), ValueError, "input must be quantized per tensor, got per channel"),
        ("linear", (Q[0, :2], W), ValueError, r"input must have shape \(\*, 3\) .* got \(2,\)"),
        ("linear", (Q[0, 0], W), ValueError, r"input must have shape \(\*, 3\) .* got \(\)"),
        ("linear", (Q, Q[0]), ValueError, "weight must have shape"),
        ("linear_static", (X, W), TypeError, "input_scale and input_zero_point are needed"),
        ("linear_static", (X, W, B, 1.0), TypeError, "input_zero_point are needed"),
        ("linear_static", (Q, W, B, 1.0, 0), TypeError, "input_zero_point are for a float input"),
        ("linear_static", (X, W, B, 0.0, 0), ValueError, "input_scale must be positive"),
        ("linear_static", (X, W, B, 1e-50, 0), ValueError, "input_scale must be positive"),
        ("linear_static", (X, W, B, 2.0**-128, 0), ValueError, "input_scale must be positive"),
        ("linear_static", (X, W, B, 1e39, 0), ValueError, "input_scale must be positive"),
        ("linear_static", (X, W, B, math.nan, 0), ValueError, "input_scale must be positive"),
        ("linear_static", (X, W, B, 1.0, 256), ValueError, r"input_zero_point .* \[0, 255\]"),
        ("linear_static", (X, W, B, 1.0, -1), ValueError, r"input_zero_point .* \[0, 255\]"),
        ("linear_static", (X.int(), W, B, 1.0, 0), TypeError, "input must be a QTensor or a float"),
        ("linear_dynamic", (Q, W), TypeError, "input must be a floating-point tensor, got a QT"),
        ("linear_dynamic", (X.int(), W), TypeError, "input must be a floating-point .*int32"),
        (
            "linear_dynamic",
            ([1.0], W),
            TypeError,
            "input must be a floating-point tensor, got list",
        ),
        ("linear_dynamic", (X, torch.ones(4, 3)), TypeError, "weight must be a QTensor, got"),
        (
            "linear_weight_only",
            (Q, W),
            TypeError,
            "input must be a floating-point tensor, got a QT",
        ),
        ("linear_weight_only", (X[:, :2], W), ValueError, r"input must have shape \(\*, 3\)"),
    ],
)
def test_clear_errors(isa: str, function: str, arguments: tuple, error: type, message: str) -> None:
    with kernels.force_isa(isa), pytest.raises(error, match=message):
        getattr(functional, function)(*arguments)


def test_smallest_and_largest_input_scale_are_taken() -> None:
    for scale in (2.0**-128 + 2.0**-149, torch.finfo(torch.float32).max):
        y = functional.linear_static(torch.zeros(2, 3), W, B, scale, 7)
        assert y.tolist() == [[1.0] * 4] * 2


# ---- gradients ----------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["dynamic", "static", "weight_only"])
def test_gradients_pass_straight_through(isa: str, name: str, dtype: torch.dtype) -> None:
    function = getattr(functional, f"linear_{name}")
    rest = (0.05, 128) if name == "static" else ()
    w = int8_weight(5, 6, True)
    with kernels.force_isa(isa):
        for lead in ((), (3,), (2, 3)):
            x = torch.randn(*lead, 6, dtype=dtype, requires_grad=True)
            b = torch.randn(5, requires_grad=True)
            y = function(x, w, b, *rest)
            assert y.dtype == dtype
            assert y.requires_grad
            with torch.no_grad():
                quiet = function(x, w, b, *rest)
            assert not quiet.requires_grad
            assert_same_bits(y.detach(), quiet)
            grad = torch.randn_like(y)
            y.backward(grad)
            assert_same_bits(x.grad, grad @ w.dequantize().to(dtype))
            assert b.grad is not None
            assert b.grad.dtype == torch.float32
            torch.testing.assert_close(
                b.grad, grad.reshape(-1, 5).sum(0).float(), check_dtype=False
            )


@pytest.mark.parametrize("needs", ["input", "bias"])
def test_gradient_of_one_alone(needs: str) -> None:
    x = torch.randn(4, 6, requires_grad=needs == "input")
    b = torch.randn(5, requires_grad=needs == "bias")
    functional.linear_dynamic(x, int8_weight(5, 6), b).sum().backward()
    assert (x.grad is not None) == (needs == "input")
    assert (b.grad is not None) == (needs == "bias")
    assert b.grad is None or b.grad.tolist() == [4.0] * 5


def test_functional_linear_takes_gradients_with_a_quantized_weight() -> None:
    x, w = torch.randn(4, 6, requires_grad=True), int8_weight(5, 6)
    zeropoint.functional.linear(x, w).sum().backward()
    torch.testing.assert_close(x.grad, w.dequantize().sum(0).expand(4, 6))
