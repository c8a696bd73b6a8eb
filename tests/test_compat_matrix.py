"""The grid and constants of PyTorch's ``test_qlinear`` and ``test_qlinear_relu``, by every engine.

``test/quantization/core/test_quantized_op.py``: scales near 1, zero points to ±50, integers over
their whole range. There inputs are thinned out, lest torch's kernels saturate; here they are not.
Most outputs lie beyond the range with those constants, so a second scale brings them within.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_models import ENGINES, torchs_engine
from zeropoint import QTensor
from zeropoint.compat import ops

pytestmark = pytest.mark.filterwarnings("ignore")

X_SCALE, X_ZERO_POINT, Y_SCALE, Y_ZERO_POINT = 1.5, 5, 12.34, 5
GRID = [
    dict(zip(("batch", "k", "n", "bias", "dims", "per_channel"), case, strict=True))
    for case in itertools.product((1, 4), (16, 32), (4, 8), *3 * [(True, False)])
]


def problem(
    engine: str, batch: int, k: int, n: int, bias: bool, dims: bool, per_channel: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    rng = np.random.default_rng(hash((batch, k, n, bias, dims, per_channel)) % 2**32)
    scales = torch.from_numpy(rng.random(n) + 1e-3)
    zero_points = torch.from_numpy(np.round(rng.random(n) * 100 - 50).astype(np.int64))
    if engine in ("onednn", "x86"):  # which take symmetric weights only
        zero_points.zero_()
    low = -127 if engine == "qnnpack" else -128
    integers = torch.from_numpy(rng.integers(low, 128, (n, k)).astype(np.int8))
    lead = (3, batch) if dims else (batch,)
    x = torch.from_numpy(rng.integers(0, 256, (*lead, k)).astype(np.uint8))
    if per_channel:
        w = torch._make_per_channel_quantized_tensor(integers, scales, zero_points, 0)
    else:
        w = torch._make_per_tensor_quantized_tensor(integers, float(scales[0]), int(zero_points[0]))
    steps = torch.from_numpy(rng.integers(-10, 11, n)).float()
    b = steps * X_SCALE * (scales.float() if per_channel else float(scales[0])) if bias else None
    return torch._make_per_tensor_quantized_tensor(x, X_SCALE, X_ZERO_POINT), w, b


def by_definition(
    x: Tensor, w: Tensor, bias: Tensor | None, relu: bool, scale: float, zero_point: int
) -> Tensor:
    """What PyTorch's test holds its operators to, in double precision."""
    b = None if bias is None else bias.double()
    y = torch.nn.functional.linear(x.dequantize().double(), w.dequantize().double(), b)
    y = y.relu() if relu else y
    return (y / scale).round().add(zero_point).clamp(0, 255)


@pytest.mark.parametrize(("y_scale", "y_zero_point"), [(12.34, 5), (300.0, 127)])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "linear_relu"])
@pytest.mark.parametrize("engine", ENGINES)
def test_qlinear(engine: str, relu: bool, y_scale: float, y_zero_point: int) -> None:
    name = "linear_relu" if relu else "linear"
    total = off = from_torch = within = 0
    for case in GRID:
        x, w, bias = problem(engine, **case)
        ours = getattr(ops, name)(x, ops.linear_prepack(w, bias), y_scale, y_zero_point)
        assert isinstance(ours, QTensor)
        got = ours.int_repr().int()
        expected = by_definition(x, w, bias, relu, y_scale, y_zero_point).int()
        assert got.shape == expected.shape == (*x.shape[:-1], case["n"])
        assert (got - expected).abs().max() <= 1, case
        assert not relu or got.min() >= y_zero_point
        off += int((got != expected).sum())
        total += got.numel()
        within += int(((expected > 0) & (expected < 255) & (expected != y_zero_point)).sum())
        with torchs_engine(engine):
            packed = torch.ops.quantized.linear_prepack(w, bias)
            theirs = getattr(torch.ops.quantized, name)(x, packed, y_scale, y_zero_point)
        from_torch += int(((got - theirs.int_repr().int()).abs() > 1).sum())
    assert total == 1920
    assert within > total / (4 if y_scale == 300 else 40)
    assert off <= total // 500  # a float32 sum beside a tie
    if torch.backends.cpu.get_cpu_capability() == "AVX512" or engine == "qnnpack":
        assert from_torch == 0  # elsewhere torch's kernels saturate on such integers


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_qlinear_unpack(engine: str, per_channel: bool, multi: bool) -> None:
    """``test_qlinear_unpack``: weight, scales, zero points and bias come back."""
    _, w, bias = problem(engine, 4, 32, 8, multi, False, per_channel)
    got, got_bias = ops.linear_unpack(ops.linear_prepack(w, bias))
    with torchs_engine(engine):
        theirs, their_bias = torch.ops.quantized.linear_unpack(
            torch.ops.quantized.linear_prepack(w, bias)
        )
    assert torch.equal(got.int_repr(), theirs.int_repr())
    if per_channel:
        assert torch.equal(got.q_per_channel_scales(), theirs.q_per_channel_scales().float())
        assert torch.equal(
            got.q_per_channel_zero_points().int(), theirs.q_per_channel_zero_points().int()
        )
    else:
        assert got.q_scale() == torch.tensor(theirs.q_scale()).item()
        assert got.q_zero_point() == theirs.q_zero_point()
    if bias is not None:
        assert torch.equal(got_bias, their_bias)


def signed(engine: str, **case: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    x, w, bias = problem(engine, **case)
    x = (x.int_repr().int() - 128).to(torch.int8)
    return torch._make_per_tensor_quantized_tensor(x, X_SCALE, X_ZERO_POINT), w, bias


def test_signed_activations() -> None:
    """What torch takes where qnnpack goes by XNNPACK; here everywhere."""
    for case in GRID:
        x, w, bias = signed("onednn", **case)
        got = ops.linear(x, ops.linear_prepack(w, bias), Y_SCALE, Y_ZERO_POINT)
        y = torch.nn.functional.linear(x.dequantize(), w.dequantize(), bias)
        expected = torch.quantize_per_tensor(y, Y_SCALE, Y_ZERO_POINT, torch.qint8)
        assert got.dtype == torch.int8
        assert (got.int_repr().int() - expected.int_repr().int()).abs().max() <= 1
