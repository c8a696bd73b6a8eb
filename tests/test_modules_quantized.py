"""``QuantizedLinear``."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zeropoint
from bits import assert_same_bits
from zeropoint import (
    Linear,
    PerTensor,
    QTensor,
    QuantizedLinear,
    QuantSpec,
    functional,
    kernels,
    quantize_to_spec,
)

MODES = ("dynamic", "static", "weight-only")
modes = pytest.mark.parametrize("mode", MODES)


def float_layer(in_features: int = 12, out_features: int = 5, bias: bool = True) -> Linear:
    return Linear(in_features, out_features, bias)


def quantized_layer(mode: str, bias: bool = True, output: bool = False) -> QuantizedLinear:
    return QuantizedLinear.from_linear(
        float_layer(bias=bias),
        mode,  # type: ignore[arg-type]
        input_qparams=(0.03, 120) if mode == "static" else None,
        output_qparams=(0.05, 100) if output else None,
    )


# ---- forward ------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)])
def test_forward_is_the_function_of_its_mode(mode: str, bias: bool, lead: tuple[int, ...]) -> None:
    layer = quantized_layer(mode, bias)
    w, x = layer.weight_qtensor(), torch.randn(*lead, 12)
    expected = {
        "dynamic": lambda: functional.linear_dynamic(x, w, layer.bias),
        "static": lambda: functional.linear_static(x, w, layer.bias, 0.03, 120),
        "weight-only": lambda: functional.linear_weight_only(x, w, layer.bias),
    }[mode]()
    for isa in {kernels.active_isa(), kernels.REFERENCE}:
        with kernels.force_isa(isa):
            assert_same_bits(layer(x), expected)
    assert layer.mode == mode
    assert not layer.training


@modes
def test_outputs_are_near_the_float_layers(mode: str) -> None:
    linear, x = Linear(64, 32), torch.randn(50, 64)
    qparams = (float(x.abs().max()) / 127, 128) if mode == "static" else None
    layer = QuantizedLinear.from_linear(linear, mode, input_qparams=qparams)  # type: ignore[arg-type]
    y, expected = layer(x), linear(x).detach()
    noise = (y - expected).pow(2).mean() / expected.pow(2).mean()
    assert 0 < float(noise) < 1e-3


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_has_the_inputs_dtype(mode: str, dtype: torch.dtype) -> None:
    layer, x = quantized_layer(mode), torch.randn(3, 12)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert_same_bits(y, layer(x.to(dtype).float()).to(dtype))


def test_static_takes_and_gives_qtensors() -> None:
    x = zeropoint.quantize_per_tensor(torch.randn(3, 12), 0.03, 120, torch.uint8)
    layer = quantized_layer("static")
    y = layer(x)
    assert y.dtype == torch.float32
    assert_same_bits(y, functional.linear_static(x, layer.weight_qtensor(), layer.bias))

    layer = quantized_layer("static", output=True)
    q = layer(x)
    assert isinstance(q, QTensor)
    assert (q.q_zero_point(), q.dtype) == (100, torch.uint8)
    assert q.q_scale() == pytest.approx(0.05)
    expected = functional.linear(x, layer.weight_qtensor(), layer.bias, 0.05, 100)
    assert_same_bits(q.int_repr(), expected.int_repr())
    assert isinstance(layer(torch.randn(3, 12)), Tensor)


@pytest.mark.filterwarnings("ignore")
def test_static_takes_torchs_quantized_tensors() -> None:
    theirs = torch.quantize_per_tensor(torch.randn(3, 12), 0.03, 120, torch.quint8)
    for output in (False, True):
        layer = quantized_layer("static", output=output)
        got, expected = layer(theirs), layer(QTensor.from_torch(theirs))
        if output:
            got, expected = got.int_repr(), expected.int_repr()
        assert_same_bits(got, expected)


@pytest.mark.parametrize("mode", ["dynamic", "weight-only"])
def test_only_static_takes_qtensors(mode: str) -> None:
    with pytest.raises(TypeError, match="input must be a floating-point tensor, got a QTensor"):
        quantized_layer(mode)(QTensor(torch.ones(1, 12, dtype=torch.uint8), 1.0))


# ---- state --------------------------------------------------------------------------------------


@modes
def test_buffers(mode: str) -> None:
    layer = quantized_layer(mode, output=mode == "static")
    expected = {
        "weight": (torch.int8, (5, 12)),
        "scale": (torch.float32, (5,)),
        "zero_point": (torch.int32, (5,)),
        "bias": (torch.float32, (5,)),
    }
    if mode == "static":
        for side in ("input", "output"):
            expected[f"{side}_scale"] = (torch.float32, ())
            expected[f"{side}_zero_point"] = (torch.int32, ())
    state = layer.state_dict()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in state.items()} == expected
    assert not list(layer.parameters())
    assert "bias" not in quantized_layer(mode, bias=False).state_dict()
    assert layer.extra_repr() == f"in_features=12, out_features=5, bias=True, mode='{mode}', bits=8"


@modes
@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()]
)
def test_casts_keep_scales_and_bias_float32(mode: str, cast: object) -> None:
    layer, x = quantized_layer(mode, output=mode == "static"), torch.randn(3, 12)
    before, state = layer(x), {n: t.clone() for n, t in layer.state_dict().items()}
    model = nn.Sequential(nn.Linear(12, 12), layer)
    cast(model)  # type: ignore[operator]
    assert model[0].weight.dtype != torch.float32
    for name, t in layer.state_dict().items():
        assert_same_bits(t, state[name], name)
    assert_same_bits(layer(x), before)


def test_moving_to_another_device_moves_everything() -> None:
    layer = quantized_layer("static").to("meta", torch.float16)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.scale.dtype == torch.float32
    empty = QuantizedLinear(12, 5, device="meta").to_empty(device="cpu")
    empty.load_state_dict(quantized_layer("dynamic").state_dict())
    assert bool(empty(torch.randn(2, 12)).isfinite().all())


@modes
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_loaded_state_replaces_what_was_packed(mode: str, assign: bool, inference: bool) -> None:
    x = torch.randn(3, 12)
    with torch.inference_mode(inference):
        source = quantized_layer(mode)
        if mode == "static":
            source.input_scale.mul_(2)
            source.input_zero_point.sub_(5)
        layer = quantized_layer(mode)
        tied = nn.ModuleList([layer, copy.copy(layer)])  # two layers that share their buffers
        before, held = layer(x).clone(), layer.weight_qtensor()  # someone else holds the packing
        assert_same_bits(tied[1](x), before)
        expected = source(x)
        assert not torch.equal(before, expected)
        state = nn.ModuleList([source, source]).state_dict()
        tied.load_state_dict(state, assign=assign)
        for one in tied:
            assert_same_bits(one(x), expected)
        assert held.shape == (5, 12)


def test_a_fresh_layer_takes_a_saved_state() -> None:
    source = quantized_layer("static", output=True)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    layer = QuantizedLinear(12, 5, mode="static", quantized_output=True)
    x = torch.randn(2, 12)
    layer(x)
    layer.load_state_dict(torch.load(file, weights_only=True))  # no code in the file
    assert_same_bits(layer(x), source(x))


EDITS = [
    ("weight", lambda t: t.bitwise_not_()),
    ("weight", lambda t: t[1].zero_()),
    ("scale", lambda t: t.mul_(1.5)),
    ("zero_point", lambda t: t.add_(2)),
    ("bias", lambda t: t.add_(1)),
    ("input_scale", lambda t: t.mul_(2)),
    ("input_zero_point", lambda t: t.add_(100)),
]


@pytest.mark.parametrize(
    ("mode", "name", "edit"),
    [
        (mode, *edit)
        for mode in MODES
        for edit in EDITS
        if mode == "static" or not edit[0].startswith("input")
    ],
)
def test_edits_in_place_and_replaced_buffers_are_noticed(
    mode: str, name: str, edit: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(3, 12)
    for replace in (False, True):
        layer = quantized_layer(mode)
        before = layer(x)
        if replace:
            changed = getattr(layer, name).clone()
            edit(changed)
            setattr(layer, name, changed)
        else:
            edit(getattr(layer, name))
        fresh = QuantizedLinear(12, 5, mode=mode)  # type: ignore[arg-type]
        fresh.load_state_dict(layer.state_dict())
        got = layer(x)
        assert not torch.equal(got, before)
        assert_same_bits(got, fresh(x))


@modes
def test_copies_share_nothing(mode: str) -> None:
    layer, x = quantized_layer(mode), torch.randn(3, 12)
    before = layer(x)  # packed: the copy must not carry that along
    other = copy.deepcopy(layer)
    assert_same_bits(other(x), before)
    other.weight.zero_()
    assert_same_bits(layer(x), before)
    assert not torch.equal(other(x), before)


# ---- making and unmaking ------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (0, 0)])
def test_size_zero_and_one(mode: str, shape: tuple[int, int]) -> None:
    qparams = (0.1, 3) if mode == "static" else None
    linear = Linear(*shape)
    layer = QuantizedLinear.from_linear(linear, mode, input_qparams=qparams)  # type: ignore[arg-type]
    y = layer(torch.randn(2, shape[0]))
    assert y.shape == (2, shape[1])
    if shape[0] == 0:
        assert_same_bits(y, linear.bias.detach().expand(2, -1))


@modes
def test_dequantize_gives_the_float_layer(mode: str) -> None:
    layer = quantized_layer(mode)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    linear = layer.dequantize()
    assert_same_bits(torch.rand(1), expected)  # no random numbers were drawn
    assert type(linear) is Linear
    assert_same_bits(linear.weight.detach(), layer.weight_qtensor().dequantize())
    assert_same_bits(linear.bias.detach(), layer.bias)
    assert linear.weight.requires_grad
    again = QuantizedLinear.from_linear(linear, "dynamic")
    assert_same_bits(again.weight, layer.weight)
    assert quantized_layer(mode, bias=False).dequantize().bias is None


def test_from_linear_leaves_the_layer_alone_and_takes_any_float_type() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        linear = nn.Linear(6, 4, dtype=dtype)
        before = copy.deepcopy(linear.state_dict())
        layer = QuantizedLinear.from_linear(linear)
        w = quantize_to_spec(linear.weight, zeropoint.WEIGHT_INT8)
        assert_same_bits(layer.weight, w.int_repr())
        assert_same_bits(layer.scale, w.scale)
        assert_same_bits(layer.bias, linear.bias.detach().float())
        for name, t in linear.state_dict().items():
            assert_same_bits(t, before[name])


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_every_weight_spec_keeps_its_reals(signed: bool, symmetric: bool, per_tensor: bool) -> None:
    granularity = PerTensor() if per_tensor else zeropoint.PerChannel(0)
    spec = QuantSpec(signed=signed, symmetric=symmetric, granularity=granularity)
    linear = float_layer()
    layer = QuantizedLinear.from_linear(linear, "dynamic", spec)
    expected = quantize_to_spec(linear.weight, spec).dequantize()
    assert_same_bits(layer.weight_qtensor().dequantize(), expected)


def test_clear_errors() -> None:
    linear, w = float_layer(), QTensor(torch.ones(4, 3, dtype=torch.int8), 1.0)
    columns = QTensor(w.int_repr(), torch.ones(3), torch.zeros(3, dtype=torch.int32), 1)
    from_linear, from_quantized = QuantizedLinear.from_linear, QuantizedLinear.from_quantized
    with pytest.raises(ValueError, match=r"mode must be one of .* got 'int8'"):
        from_linear(linear, "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantized_output needs mode 'static'"):
        from_linear(linear, output_qparams=(1.0, 0))
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Conv1d"):
        from_linear(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input_qparams must be given in static mode"):
        from_linear(linear, "static")
    with pytest.raises(ValueError, match="input_qparams must be given in static mode and only"):
        from_linear(linear, "dynamic", input_qparams=(1.0, 0))
    for bad in ((0.0, 0), (math.nan, 0), (1.0, -1), (1.0, 256)):
        with pytest.raises(ValueError, match=r"scale must be positive|zero_point must be within"):
            from_linear(linear, "static", input_qparams=bad)
    with pytest.raises(ValueError, match="axis 1"):
        from_quantized(columns)
    with pytest.raises(ValueError, match="weight must have shape"):
        from_quantized(w[0])
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(1,\)"):
        from_quantized(w, torch.ones(1))
    linear.weight.data[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"must be finite, got nan \(first at index \(1, 2\)\)"):
        from_linear(linear)


@modes
def test_gradients_reach_the_input(mode: str) -> None:
    layer = quantized_layer(mode)
    x = torch.randn(3, 12, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.ones(3, 5) @ layer.weight_qtensor().dequantize()
    torch.testing.assert_close(x.grad, expected)


@modes
def test_bad_rows_are_nan_and_touch_no_other(mode: str) -> None:
    layer, x = quantized_layer(mode), torch.randn(3, 12)
    clean = layer(x)
    x[1, 0] = math.nan
    y = layer(x)
    assert bool(y[1].isnan().all())
    assert_same_bits(y[[0, 2]], clean[[0, 2]])
