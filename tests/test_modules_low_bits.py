"""``QuantizedLinear`` of 2 to 8 bits and of groups, in every mode."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import zeropoint
from bits import assert_same_bits
from zeropoint import (
    LayerRecipe,
    Linear,
    PerChannel,
    PerGroup,
    PerTensor,
    QTensor,
    QuantizedLinear,
    QuantSpec,
    functional,
    int4,
    kernels,
    quantize_to_spec,
    reference,
)
from zeropoint.codec import packed_size
from zeropoint.replace import tie_weights

SPECS = [
    *(QuantSpec(bits, False, False, PerGroup(8)) for bits in range(2, 9)),
    *(QuantSpec(bits, granularity=PerChannel(0)) for bits in range(2, 8)),
    int4(),
    int4(5, symmetric=True, scale_dtype=torch.bfloat16),
    int4(1, scale_dtype=torch.float16),
    QuantSpec(4, granularity=PerTensor()),
    QuantSpec(granularity=PerGroup(8)),
]
MODES = ("dynamic", "static", "weight-only")
each_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
modes = pytest.mark.parametrize("mode", MODES)


def layer_of(
    spec: QuantSpec, mode: Any = "dynamic", k: int = 20, n: int = 6, bias: bool = True
) -> QuantizedLinear:
    torch.manual_seed(0)
    qparams = (0.05, 131) if mode == "static" else None
    return QuantizedLinear.from_linear(Linear(k, n, bias), mode, spec, qparams)


def expected(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """By the reference, of the plain integers."""
    w, rows = layer.weight_qtensor(), x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if layer.mode == "static":
        scale, zero_point = layer.input_scale, layer.input_zero_point
        y = reference.linear_static(rows, scale, zero_point, w, layer.bias)  # type: ignore[arg-type]
    else:
        function = getattr(reference, "linear_" + layer.mode.replace("-", "_"))
        y = function(rows, w, layer.bias)
    return y.reshape(*x.shape[:-1], layer.out_features)


@each_spec
@modes
@pytest.mark.parametrize("bias", [True, False])
def test_forward(spec: QuantSpec, mode: str, bias: bool) -> None:
    layer = layer_of(spec, mode, bias=bias)
    for lead in ((), (4,), (2, 3), (0,)):
        x = torch.randn(*lead, 20)
        for isa in kernels.available_isas():
            with kernels.force_isa(isa):
                assert_same_bits(layer(x), expected(layer, x), isa)


@each_spec
def test_weight_is_the_spec_s(spec: QuantSpec) -> None:
    layer, linear = layer_of(spec), layer_of(spec).dequantize()
    torch.manual_seed(0)
    assert_same_bits(linear.weight, quantize_to_spec(Linear(20, 6).weight, spec).dequantize())
    q = layer.weight_qtensor()
    assert (q.bits, q.group_size) == (spec.bits, layer.group_size)
    assert q._int_repr is layer.weight, "not a copy"
    assert q.scale.data_ptr() == layer.scale.data_ptr()
    assert q.zero_point.data_ptr() == layer.zero_point.data_ptr()


@each_spec
def test_buffers(spec: QuantSpec) -> None:
    layer = layer_of(spec)
    groups = isinstance(spec.granularity, PerGroup)
    integer = torch.int8 if spec.bits == 8 else torch.uint8
    per = (6, spec.granularity.count(20)) if isinstance(spec.granularity, PerGroup) else (6,)
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in layer.state_dict().items()}
    assert shapes == {
        "weight": (integer, (6, packed_size(20, spec.bits))),
        "scale": (spec.scale_dtype, per),
        "zero_point": (integer if groups else torch.int32, per),
        "bias": (torch.float32, (6,)),
    }
    assert f"bits={spec.bits}" in repr(layer)
    assert ("group_size" in repr(layer)) == groups


@each_spec
@modes
def test_copies_and_state(spec: QuantSpec, mode: str) -> None:
    layer, x = layer_of(spec, mode), torch.randn(3, 20)
    y = layer(x)
    fresh = QuantizedLinear(
        20,
        6,
        mode=mode,
        bits=spec.bits,
        group_size=layer.group_size,
        scale_dtype=spec.scale_dtype,  # type: ignore[arg-type]
    )
    assert fresh(x).shape == y.shape  # a layer of zeros, before it is filled
    fresh.load_state_dict(layer.state_dict())
    narrow = copy.deepcopy(layer).half().to(torch.float64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh, narrow):
        assert_same_bits(twin(x), y)
        assert twin.scale.dtype == spec.scale_dtype


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_and_unsigned_are_one_layer(bits: int, signed: bool) -> None:
    q = quantize_to_spec(torch.randn(6, 20), QuantSpec(bits, signed, False, PerGroup(7)))
    layer = QuantizedLinear.from_quantized(q)
    assert_same_bits(layer.weight_qtensor().dequantize(), q.dequantize())
    again = QuantizedLinear.from_quantized(layer.weight_qtensor())
    for name, buffer in layer.state_dict().items():
        assert_same_bits(again.state_dict()[name], buffer, name)


@pytest.mark.parametrize("spec", [int4(8), int4(None)], ids=str)
@pytest.mark.parametrize("name", ["weight", "scale", "zero_point"])
def test_a_buffer_changed_in_place_counts(spec: QuantSpec, name: str) -> None:
    layer, x = layer_of(spec), torch.randn(3, 20)
    before = layer(x)
    getattr(layer, name)[0].fill_(1)
    assert_same_bits(layer(x), expected(layer, x))
    assert not torch.equal(layer(x), before)
    layer.weight = torch.zeros_like(layer.weight)
    assert_same_bits(layer(x), expected(layer, x))


@pytest.mark.parametrize("spec", [int4(8), QuantSpec(3)], ids=str)
def test_static_layer_of_integers(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(Linear(20, 6), "static", spec, (0.05, 131), (0.1, 90))
    x = torch.randn(3, 20)
    for dtype, zero_point in ((torch.uint8, 131), (torch.int8, 3)):
        q = zeropoint.quantize_per_tensor(x, 0.05, zero_point, dtype)
        y = layer(q)
        assert isinstance(y, QTensor)
        floats = functional.linear_static(q, layer.weight_qtensor(), layer.bias)
        again = reference.quantize(
            floats, y.scale, y.zero_point, *(-128, 127) if y.dtype == torch.int8 else (0, 255)
        )
        assert_same_bits(y.int_repr(), again.to(dtype))
    packed = QTensor(torch.zeros(3, 20, dtype=torch.uint8), 0.05, 0, bits=4)
    with pytest.raises(ValueError, match="input must be of 8 bits, per tensor, got 4 bits"):
        layer(packed)
    groups = quantize_to_spec(x, QuantSpec(8, False, False, PerGroup(8)))
    with pytest.raises(ValueError, match="got 8 bits in groups of 8"):
        layer(groups)


@modes
@pytest.mark.parametrize(
    "spec", [int4(), int4(None), QuantSpec(3, False, False, PerGroup(2))], ids=str
)
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0), (1, 1), (1, 4)])
def test_empty_and_one_column(mode: str, spec: QuantSpec, sizes: tuple[int, int]) -> None:
    layer = layer_of(spec, mode, *sizes)
    x = torch.randn(2, sizes[0])
    assert_same_bits(layer(x), expected(layer, x))


def test_gradient_of_the_input() -> None:
    layer, x = layer_of(int4(8)), torch.randn(3, 20, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().weight.sum(0).expand(3, 20).detach())


def test_tied_layers_share_one_packing() -> None:
    a, b = layer_of(int4(8)), layer_of(int4(8))
    b.weight.zero_()
    tie_weights(b, a)
    assert a.weight_qtensor() is b.weight_qtensor()
    x = torch.randn(2, 20)
    assert_same_bits(a(x), b(x))
    with pytest.raises(
        ValueError, match=r"4 bits in groups of 8, got one .* 4 bits in groups of 4"
    ):
        tie_weights(layer_of(int4(4)), a)
    with pytest.raises(ValueError, match=r"of shape \(6, 20\), 4 bits in groups of 8, got"):
        tie_weights(layer_of(int4(None)), a)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be from 2 to 8, got 1"):
        QuantizedLinear(4, 4, bits=1)
    with pytest.raises(ValueError, match="size must be at least 1"):
        QuantizedLinear(4, 4, group_size=0)
    with pytest.raises(ValueError, match="scale_dtype must be"):
        QuantizedLinear(4, 4, bits=4, group_size=2, scale_dtype=torch.float64)
    with pytest.raises(ValueError, match="unless per group"):
        QuantizedLinear(4, 4, bits=4, scale_dtype=torch.bfloat16)
    layer = layer_of(int4(8), k=21)
    layer.weight[0, -1] = 0x10
    with pytest.raises(ValueError, match="codes must have zero bits after the last code"):
        layer(torch.randn(1, 21))
    layer = layer_of(int4(8))
    layer.zero_point[0, 0] = 16
    with pytest.raises(ValueError, match=r"zero_point must be within \[0, 15\]"):
        layer(torch.randn(1, 20))
    wrong = QTensor(
        torch.zeros(2, 3, 4, dtype=torch.int8),
        torch.ones(2, 3, 1),
        torch.zeros(2, 3, 1, dtype=torch.int8),
        group_size=4,
    )
    with pytest.raises(ValueError, match="weight must have shape"):
        QuantizedLinear.from_quantized(wrong)


# ---- a model end to end -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on scikit-learn's digits, and its test set."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    model = nn.Sequential(Linear(64, 96), nn.ReLU(), Linear(96, 96), nn.ReLU(), Linear(96, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1200]), y[:1200]).backward()
        optimizer.step()
    return model.eval(), x[1200:], y[1200:]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


@pytest.mark.parametrize(
    ("recipe", "drop"),
    [
        ("int4", 0.02),
        ("int4-weight-only", 0.02),
        (LayerRecipe("dynamic", int4(32, symmetric=True, scale_dtype=torch.bfloat16)), 0.02),
        (LayerRecipe("dynamic", QuantSpec(6, granularity=PerChannel(0))), 0.01),
        (LayerRecipe("static", QuantSpec(5, False, False, PerGroup(48))), 0.02),
        (LayerRecipe("weight-only", QuantSpec(3, False, False, PerGroup(16))), 0.05),
    ],
    ids=str,
)
def test_digits(
    recipe: Any, drop: float, digits: tuple[nn.Module, Tensor, Tensor], tmp_path: Any
) -> None:
    model, x, y = digits
    before = accuracy(model, x, y)
    assert before > 0.9, "the float model has learnt"
    calibration = [x[:64]] if "static" in str(recipe) else None
    quantized = zeropoint.quantize(model, recipe, calibration=calibration)
    assert accuracy(quantized, x, y) >= before - drop
    zeropoint.save(quantized, tmp_path / "m")
    loaded = zeropoint.load(tmp_path / "m", copy.deepcopy(model))
    assert_same_bits(loaded(x[:9]), quantized(x[:9]))


def test_fewer_bits_lose_more(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, _ = digits
    errors = []
    for bits in range(2, 9):
        recipe = LayerRecipe("weight-only", QuantSpec(bits, False, False, PerGroup(16)))
        with torch.no_grad():
            errors.append(float((zeropoint.quantize(model, recipe)(x) - model(x)).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1000 * errors[-1]


@each_spec
def test_prepacked(spec: QuantSpec) -> None:
    """Packed for the hardware where there is a kernel, held as it came where there is none."""
    q, bias, x = quantize_to_spec(torch.randn(6, 20), spec), torch.randn(6), torch.randn(3, 20)
    packed = zeropoint.prepack(q, bias)
    for function in (functional.linear_dynamic, functional.linear):
        assert_same_bits(function(x, packed), function(x, q, bias))  # type: ignore[operator, arg-type]
    plain, _ = zeropoint.unpack(packed)
    assert isinstance(plain, QTensor)
    assert plain.spec == q.spec
    assert_same_bits(plain.int_repr(), q.int_repr())
    assert_same_bits(plain.dequantize(), q.dequantize())
