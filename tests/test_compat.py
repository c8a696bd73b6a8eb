"""zeropoint.compat beside torch: the matrix of PyTorch's own tests of quantized Linear.

Shapes, zero points, several dimensions, per tensor and per channel, ReLU, bias or none, static and
dynamic, by every engine of the installed torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zeropoint
from torch_models import ENGINES, torchs_engine
from zeropoint import QTensor, compat, kernels
from zeropoint.compat import ops
from zeropoint.compat.quantized import functional

pytestmark = pytest.mark.filterwarnings("ignore")

# Without the dot-product instructions, torch's kernels saturate when both operands use all 8 bits.
TORCH_IS_EXACT = torch.backends.cpu.get_cpu_capability() == "AVX512"


@st.composite
def problems(draw: Any, engine: str, dynamic: bool = False) -> dict[str, Any]:
    """A layer and its input, as torch's own objects."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    lead = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    k, n = draw(st.integers(1, 80)), draw(st.integers(1, 40))
    exact = TORCH_IS_EXACT or engine == "qnnpack"
    per_channel, shifted = draw(st.booleans()), draw(st.booleans())
    low = 1 if engine == "qnnpack" else 0  # it adds 128 to the weight's zero point
    integers = torch.randint(-127 + low, 128, (n, k), generator=g).to(torch.int8)
    limit = 1 if engine in ("onednn", "x86") or not shifted else 30
    zero_points = torch.randint(1 - limit, limit, (n,), generator=g)
    if per_channel:
        scales = torch.rand(n, generator=g, dtype=torch.float64) * 0.02 + 0.001
        w = torch._make_per_channel_quantized_tensor(integers, scales, zero_points, 0)
    else:
        scale = draw(st.floats(1e-3, 0.02))
        w = torch._make_per_tensor_quantized_tensor(integers, scale, int(zero_points[0]))
    bias = torch.randn(n, generator=g) * 3 if draw(st.booleans()) else None
    if dynamic:
        x = torch.randn(*lead, k, generator=g) * draw(st.sampled_from([1e-6, 0.3, 1.0, 40.0]))
        x = {"both": x, "above": x.abs(), "below": -x.abs(), "zero": x * 0}[
            draw(st.sampled_from(["both", "both", "above", "below", "zero"]))
        ]
        return {"x": x, "w": w, "bias": bias}
    x = torch._make_per_tensor_quantized_tensor(
        torch.randint(0, 256 if exact else 128, (*lead, k), generator=g).to(torch.uint8),
        draw(st.floats(0.001, 0.1)),
        draw(st.sampled_from([0, 1, 5, 128, 254, 255])),
    )
    y = torch.nn.functional.linear(x.dequantize(), w.dequantize(), bias)
    scale = max(float(y.max() - y.min()) / draw(st.sampled_from([100, 240, 400])), 1e-3)
    return {"x": x, "w": w, "bias": bias, "scale": scale,
            "zero_point": draw(st.sampled_from([0, 1, 5, 127, 255]))}  # fmt: skip


def supported(engine: str, p: dict[str, Any]) -> Any:
    """torch's packed parameters; skips what the engine refuses."""
    try:
        return torch.ops.quantized.linear_prepack(p["w"], p["bias"])
    except RuntimeError as error:
        pytest.skip(f"{engine}: {error}")


# torch.ops.quantized


@settings(max_examples=60)
@given(data=st.data(), relu=st.booleans())
@pytest.mark.parametrize("engine", ENGINES)
def test_linear_is_within_one_step_of_torchs(engine: str, data: st.DataObject, relu: bool) -> None:
    p = data.draw(problems(engine))
    name = "linear_relu" if relu else "linear"
    with torchs_engine(engine):
        packed = supported(engine, p)
        theirs = getattr(torch.ops.quantized, name)(p["x"], packed, p["scale"], p["zero_point"])
    ours = getattr(ops, name)(
        p["x"], ops.linear_prepack(p["w"], p["bias"]), p["scale"], p["zero_point"]
    )
    assert isinstance(ours, QTensor)
    assert ours.shape == theirs.shape
    assert ours.q_scale() == torch.tensor(theirs.q_scale()).item()
    assert ours.q_zero_point() == theirs.q_zero_point()
    assert ours.dtype == torch.uint8
    steps = (ours.int_repr().int() - theirs.int_repr().int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() <= 0.05, "a step is the exception"


@settings(max_examples=60)
@given(data=st.data(), relu=st.booleans(), reduce_range=st.booleans())
@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "qnnpack"])
def test_linear_dynamic_multiplies_torchs_integers(
    engine: str, data: st.DataObject, relu: bool, reduce_range: bool
) -> None:
    reduce_range |= not TORCH_IS_EXACT
    p = data.draw(problems(engine, dynamic=True))
    name = "linear_relu_dynamic" if relu else "linear_dynamic"
    with torchs_engine(engine):
        packed = supported(engine, p)
        theirs = getattr(torch.ops.quantized, name)(p["x"], packed, reduce_range)
    ours = getattr(ops, name)(p["x"], ops.linear_prepack(p["w"], p["bias"]), reduce_range)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    # A sum that differed by one would show as a whole step of this size.
    step = ops.choose_qparams(p["x"], reduce_range)[0] * QTensor.from_torch(p["w"]).scale
    off = (ours - theirs).abs() / step
    limit = 0.25 + 1e-6 * float(ours.abs().max() / step.min())
    if engine == "fbgemm":
        assert off.max() < limit
    else:  # which round the halfway cases of the input in another way
        assert (off < limit).float().mean() > 0.9
        assert off.max() <= 129 * p["x"].shape[-1]


@pytest.mark.skipif("qnnpack" not in ENGINES, reason="torch has no qnnpack here")
def test_linear_dynamic_of_qnnpack() -> None:
    """It takes 8 bits whatever ``reduce_range`` says."""
    x, w = torch.randn(7, 40), torch.quantize_per_tensor(torch.randn(5, 40), 0.02, 0, torch.qint8)
    with torchs_engine("qnnpack"):
        packed = torch.ops.quantized.linear_prepack(w, torch.randn(5))
        theirs = torch.ops.quantized.linear_dynamic(x, packed)
        bias = torch.ops.quantized.linear_unpack(packed)[1]
    ours = ops.linear_dynamic(x, ops.linear_prepack(w, bias))
    assert torch.allclose(ours, theirs, atol=1e-4)


@settings(max_examples=300)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5),
    st.booleans(),
)
def test_range_of_dynamic_input_is_torchs(values: list[float], reduce_range: bool) -> None:
    x = torch.tensor(values)
    if not (x.max() - x.min()).isfinite():
        with pytest.raises(ValueError, match="X must be finite"):
            ops.choose_qparams(x * 2, reduce_range)
        return
    scale, zero_point = torch._choose_qparams_per_tensor(x, reduce_range)
    assert ops.choose_qparams(x, reduce_range) == (torch.tensor(scale).item(), zero_point)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_unpack_gives_back_what_was_packed(per_channel: bool, bias: bool) -> None:
    w, b = torch.randn(6, 10), torch.randn(6) if bias else None
    if per_channel:
        w = torch.quantize_per_channel(
            w, torch.rand(6, dtype=torch.float64) + 0.1, torch.arange(6), 0, torch.qint8
        )
    else:
        w = torch.quantize_per_tensor(w, 0.03, 4, torch.qint8)
    got, got_bias = ops.linear_unpack(ops.linear_prepack(w, b))
    expected = QTensor.from_torch(w)
    assert got.axis == expected.axis
    assert torch.equal(got.int_repr(), w.int_repr())
    assert torch.equal(got.scale, expected.scale)
    assert torch.equal(got.zero_point, expected.zero_point)
    assert got_bias is None if b is None else torch.equal(got_bias, b)


def test_no_rows() -> None:
    packed = ops.linear_prepack(QTensor(torch.ones(2, 3, dtype=torch.int8), 0.5))
    assert ops.linear_dynamic(torch.empty(0, 3), packed).shape == (0, 2)
    x = QTensor(torch.empty(4, 0, 3, dtype=torch.uint8), 0.5)
    assert ops.linear(x, packed, 0.5, 3).shape == (4, 0, 2)


def test_reference_gives_the_same_bits() -> None:
    packed = ops.linear_prepack(QTensor(torch.randint(-128, 128, (5, 33), dtype=torch.int8), 0.01))
    x = torch.randn(4, 33)
    fast = ops.linear_dynamic(x, packed, True)
    with kernels.force_isa(kernels.REFERENCE):
        assert torch.equal(ops.linear_dynamic(x, packed, True), fast)


def test_arguments_that_do_not_fit() -> None:
    w = QTensor(torch.ones(2, 3, dtype=torch.int8), 0.5)
    packed = ops.linear_prepack(w)
    with pytest.raises(TypeError, match=r"W must be quantized.*torch\.float32"):
        ops.linear_prepack(torch.ones(2, 3))
    with pytest.raises(ValueError, match="bias must have shape"):
        ops.linear_prepack(w, torch.ones(3))
    with pytest.raises(TypeError, match="X must be quantized"):
        ops.linear(torch.ones(1, 3), packed, 1.0, 0)
    with pytest.raises(TypeError, match="what linear_prepack returned, got QTensor"):
        ops.linear_dynamic(torch.ones(1, 3), w)
    with pytest.raises(TypeError, match="what linear_prepack returned"):
        ops.linear_unpack(w)
    with pytest.raises(TypeError, match="X must be a floating-point tensor"):
        ops.linear_dynamic(torch.ones(1, 3, dtype=torch.int32), packed)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="X must be finite"):
            ops.linear_dynamic(torch.tensor([[1.0, bad, 2.0]]), packed)
    with pytest.raises(ValueError, match="input must have shape"):
        ops.linear_dynamic(torch.ones(1, 4), packed)


# torch.ao.nn.quantized.functional, torch.quantize_per_tensor


@settings(max_examples=30)
@given(data=st.data(), given_scale=st.booleans(), given_zero_point=st.booleans())
def test_functional_linear(data: st.DataObject, given_scale: bool, given_zero_point: bool) -> None:
    p = data.draw(problems("fbgemm"))
    more = {"scale": p["scale"]} if given_scale else {}
    more |= {"zero_point": p["zero_point"]} if given_zero_point else {}
    with torchs_engine("fbgemm"):
        theirs = torch.ao.nn.quantized.functional.linear(p["x"], p["w"], p["bias"], **more)
    ours = functional.linear(p["x"], p["w"], p["bias"], **more)
    assert ours.q_zero_point() == theirs.q_zero_point()
    assert ours.q_scale() == torch.tensor(theirs.q_scale()).item()
    assert (ours.int_repr().int() - theirs.int_repr().int()).abs().max() <= 1


def test_functional_linear_needs_quantized_tensors() -> None:
    w = QTensor(torch.ones(2, 3, dtype=torch.int8), 0.5)
    with pytest.raises(TypeError, match="input must be quantized"):
        functional.linear(torch.ones(1, 3), w)
    with pytest.raises(TypeError, match="weight must be quantized"):
        functional.linear(w, torch.ones(2, 3))


def test_quantizing_is_zeropoints_own() -> None:
    assert compat.quantize_per_tensor is zeropoint.quantize_per_tensor
    assert compat.quantize_per_channel is zeropoint.quantize_per_channel


def test_names_stand_where_torchs_do() -> None:
    """``import torch.ao.nn.quantized as nnq`` and all that hangs on it."""
    nnq = compat.quantized
    for path in ("Linear", "LinearReLU", "functional.linear", "dynamic.Linear"):
        there: Any = nnq
        for part in path.split("."):
            there = getattr(there, part)
        assert callable(there), path
