"""The short way of a call with a ``QTensor``: the same results, parameters and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import zeropoint
from zeropoint import QTensor, QuantizedLinear, kernels
from zeropoint import functional as F

pytestmark = pytest.mark.skipif(kernels.active_isa() == "reference", reason="needs the core")


def operands(signed: bool = False) -> tuple[QTensor, QTensor, torch.Tensor]:
    torch.manual_seed(1)
    dtype = torch.qint8 if signed else torch.quint8
    x = zeropoint.quantize_per_tensor(torch.randn(3, 40), 0.05, 3, dtype)
    w = zeropoint.quantize_to_spec(torch.randn(17, 40), zeropoint.WEIGHT_INT8)
    kernels.packed(w)
    return x, w, torch.randn(17)


def slow(*arguments: Any, **named: Any) -> QTensor:
    with zeropoint.force_isa("reference"):
        y = F.linear(*arguments, **named)
    assert isinstance(y, QTensor)
    return y


def same(a: Any, b: QTensor) -> None:
    assert isinstance(a, QTensor)
    assert a.dtype == b.dtype
    assert a.int_repr().equal(b.int_repr())
    assert a.scale.equal(b.scale)
    assert a.scale.dtype == torch.float32
    assert a.zero_point.equal(b.zero_point)
    assert a.zero_point.dtype == torch.int32


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("output", [(), (0.1, 7), (0.3, 0)])
def test_short_and_long_way_agree(signed: bool, output: tuple[Any, ...]) -> None:
    x, w, b = operands(signed)
    assert kernels.quick_integers("linear_quantized", x, w, b, *output) is not None
    y = F.linear(x, w, b, *output)
    same(y, slow(x, w, b, *output))
    # What it gave, whose scale is a number so far, goes in again.
    v = zeropoint.quantize_to_spec(torch.randn(5, 17), zeropoint.WEIGHT_INT8)
    kernels.packed(v)
    again = F.linear(y, v)
    same(again, slow(y, v))
    with zeropoint.force_isa("reference"):
        expected = F.linear_static(x, w, b)
    assert F.linear_static(x, w, b).equal(expected)


@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (0, 40)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    _, w, b = operands()
    x = zeropoint.quantize_per_tensor(torch.randn(shape), 0.05, 100, torch.quint8)
    y = kernels.quick_integers("linear_quantized", x, w, b, 0.1, 5)
    assert y is not None
    same(y, slow(x, w, b, 0.1, 5))


def test_scale_is_a_float32_wherever_it_is_asked() -> None:
    x, w, b = operands()
    y = F.linear(x, w, b, 0.1, 7)
    assert y.q_scale() == torch.tensor(0.1, dtype=torch.float32).item() != 0.1
    assert y.q_zero_point() == 7
    y = F.linear(x, w, b, 0.1, 7)
    assert "scale=0.100000001, zero_point=7" in repr(y)


def test_numbers_survive_copies() -> None:
    x, w, b = operands()
    for twin in (copy.deepcopy(F.linear(x, w, b, 0.1, 7)), F.linear(x, w, b, 0.1, 7).clone()):
        same(twin, slow(x, w, b, 0.1, 7))


def test_a_scale_changed_in_place_counts() -> None:
    x, w, b = operands()
    y = F.linear(x, w, b, 0.1, 7)
    y.scale.fill_(0.5)
    assert y.q_scale() == 0.5
    v = zeropoint.quantize_to_spec(torch.randn(5, 17), zeropoint.WEIGHT_INT8)
    kernels.packed(v)
    same(F.linear(y, v), slow(y, v))


def test_a_default_dtype_of_float64_changes_nothing() -> None:
    x, w, b = operands()
    torch.set_default_dtype(torch.float64)
    try:
        assert F.linear_static(x, w, b).dtype == torch.float32
        assert F.linear(x, w, b, 0.1, 7).scale.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        (0.0, 0, "scale must be positive"),
        (float("nan"), 0, "scale must be positive"),
        (1e-40, 0, "scale must be positive"),
        (float("inf"), 0, "scale must be positive"),
        (1.0, 256, "zero_point must be within"),
        (1.0, -1, "zero_point must be within"),
        (1, 0.5, "zero_point must hold integers"),
    ],
)
def test_bad_output_parameters_are_refused(scale: Any, zero_point: Any, message: str) -> None:
    x, w, b = operands()
    with pytest.raises((ValueError, TypeError), match=message):
        F.linear(x, w, b, scale, zero_point)


def test_one_parameter_alone_keeps_the_inputs_other() -> None:
    x, w, b = operands()
    y = F.linear(x, w, b, 0.25)
    assert (y.q_scale(), y.q_zero_point()) == (0.25, 3)
    y = F.linear(x, w, b, zero_point=9)
    assert (y.q_scale(), y.q_zero_point()) == (x.q_scale(), 9)


def test_a_float_packing_is_refused() -> None:
    x, _, _ = operands()
    with pytest.raises(TypeError, match="weight must be a QTensor"):
        F.linear_static(x, zeropoint.prepack(torch.randn(17, 40)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["output_scale", "output_zero_point", "input_scale"])
def test_a_layers_parameter_changed_in_place_counts(name: str) -> None:
    x, w, b = operands()
    layer = QuantizedLinear.from_quantized(w, b, "static", (0.05, 3), (0.1, 7))
    floats = torch.randn(2, 40)
    before = layer(x), layer(floats)
    getattr(layer, name).add_(1)
    with zeropoint.force_isa("reference"):
        expected = layer(x), layer(floats)
    after = layer(x), layer(floats)
    same(after[0], expected[0])
    assert after[1].equal(expected[1])
    if name.startswith("output"):
        assert not after[0].dequantize().equal(before[0].dequantize())
    else:
        assert not after[1].equal(before[1])
