"""ONNX: every kind of weight and activation, run by ONNX Runtime, within the bounds of the docs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zeropoint
from onnx_files import (
    ANY,
    DEFAULT,
    FLOATS,
    PRECISE,
    Calls,
    Several,
    bound,
    nodes,
    onnx,
    run,
    tensors,
    through,
)
from zeropoint import PerChannel, PerGroup, QTensor, QuantizedLinear, QuantSpec
from zeropoint.formats import onnx as zp_onnx
from zeropoint.spec import WEIGHT_INT8

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of its own parts
K, N = 100, 40
MODES = ("dynamic", "static", "weight-only")
CHANNEL = PerChannel(0)
SPECS = {
    "int8": WEIGHT_INT8,
    "int8_zero_points": QuantSpec(8, False, False, CHANNEL),
    "int7": QuantSpec(7, True, False, CHANNEL),
    "int5": QuantSpec(5, False, False, CHANNEL),
    "int4": QuantSpec(4, False, False, CHANNEL),
    "int4_symmetric": QuantSpec(4, True, True, CHANNEL),
    "int2": QuantSpec(2, True, False, CHANNEL),
    "int4_groups": zeropoint.int4(32),
    "int4_groups_of_24": zeropoint.int4(24),  # no power of two from 16 on divides it
    "int4_groups_of_48": zeropoint.int4(48, symmetric=True, scale_dtype=torch.float16),
    "int3_groups": QuantSpec(3, False, False, PerGroup(16)),
    "int6_groups": QuantSpec(6, True, False, PerGroup(64)),
    "int8_groups": QuantSpec(8, False, False, PerGroup(32)),
    "int8_groups_of_7": QuantSpec(8, True, True, PerGroup(7)),
    "int8_one_group": QuantSpec(8, False, False, PerGroup(1000)),
    "int4_one_group": QuantSpec(4, False, False, PerGroup(1000)),
}


def quantized(
    mode: str = "dynamic", spec: QuantSpec = WEIGHT_INT8, bias: bool = True, inputs: int = K
) -> QuantizedLinear:
    qparams = (0.03, 121) if mode == "static" else None
    return QuantizedLinear.from_linear(nn.Linear(inputs, N, bias), mode, spec, qparams)


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.5), want.nan_to_num(0.5))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


Written = tuple[Path, dict[str, QuantizedLinear], tuple[str, ...]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Written]:
    """Layers of every spec in one file, for any number of rows."""
    made: dict[tuple[str, str], Written] = {}

    def write(mode: str, operators: str) -> Written:
        if (mode, operators) not in made:
            layers = {name: quantized(mode, spec, "8" in name) for name, spec in SPECS.items()}
            file = tmp_path_factory.mktemp("onnx") / "model.onnx"
            shapes, x = ({0: ANY, 1: ANY},), torch.randn(2, 3, K)
            how = {"dynamic_shapes": shapes, "operators": operators}
            left = zp_onnx.write(Several(layers), file, (x,), **how)
            made[mode, operators] = file, layers, left
        return made[mode, operators]

    return write


@pytest.mark.parametrize("operators", ["onnxruntime", "standard"])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_within_the_bound(
    mode: str, operators: str, written: Callable[[str, str], Written]
) -> None:
    file, layers, _ = written(mode, operators)
    x = torch.randn(4, 5, K)
    x[1] *= 1e-3
    x[2, 0] = 0
    got = run(file, x, entries=FLOATS if operators == "standard" else DEFAULT)
    for (name, layer), y in zip(layers.items(), got, strict=True):
        want = layer(x)
        if mode == "dynamic" and layer.group_size is None:
            assert_same(y, want)  # by ONNX's operators, each rounding where ours does
        assert ((y - want).abs() <= bound(layer, x)).all(), name
        assert want.abs().max() > 0.1
    kinds = nodes(file)
    assert ("MatMulNBits" in kinds) == (operators == "onnxruntime")
    assert kinds.count("MatMulInteger") == (mode == "dynamic") * sum(
        spec.granularity in (CHANNEL, PerGroup(1000)) for spec in SPECS.values()
    )


@pytest.mark.parametrize("mode", MODES)
def test_told_to_be_exact(mode: str, written: Callable[[str, str], Written]) -> None:
    """ONNX Runtime then exchanges int8 weights for uint8 ones, in its own way."""
    file, layers, _ = written(mode, "onnxruntime")
    x = torch.randn(1, 4, K)
    for layer, y in zip(layers.values(), run(file, x, entries=PRECISE), strict=True):
        assert ((y - layer(x)).abs() <= bound(layer, x)).all(), layer


@pytest.mark.parametrize("operators", ["onnxruntime", "standard"])
@pytest.mark.parametrize("mode", MODES)
def test_the_file_holds_integers(
    mode: str, operators: str, written: Callable[[str, str], Written]
) -> None:
    file, layers, left = written(mode, operators)
    held = tensors(file)
    weights = {
        name.rpartition(".weight")[0]: entry
        for name, entry in held.items()
        if name.endswith((".transposed", ".blocks"))
    }
    assert weights.keys() == {f"parts.{name}" for name in layers}
    floats = {n: shape for n, (kind, shape) in held.items() if "FLOAT" in kind and len(shape) > 1}
    assert all(name.endswith((".scales", ".scales_transposed")) for name in floats), floats
    for name, layer in layers.items():
        kind, shape = weights[f"parts.{name}"]
        packed = kind == "UINT8" and layer.bits <= 4
        codes = math.prod(shape) * (2 if packed else 1)
        assert K * N <= codes <= 128 * N, name  # blocks are whole
        assert kind in (("INT4", "UINT8") if layer.bits <= 4 else ("INT8", "UINT8")), name
    graph = onnx.load(file).graph
    for tensor in graph.initializer:
        if tensor.name.endswith(".transposed"):
            bits = layers[tensor.name.split(".")[1]].bits
            values = onnx.numpy_helper.to_array(tensor).astype(int)
            # So that two products with bytes fit 16 bits, but for 8 bits.
            assert -(2 ** (bits - 1)) <= values.min() < 0 < values.max() < 2 ** (bits - 1)
    scales = "scales_transposed" if operators == "standard" else "scales"
    assert held[f"parts.int4_groups.weight.{scales}"][0] == "BFLOAT16"
    widened = {name for name, layer in layers.items() if layer.bits not in (4, 8)}
    assert {text.split("'")[1] for text in left} == {f"parts.{n}.weight" for n in widened}


def test_rows_that_hold_no_number_or_huge_or_tiny_ones(file: Path) -> None:
    layer = quantized()
    x = torch.randn(8, K)
    x[0, 3], x[1, 5], x[2, 7] = torch.nan, torch.inf, -torch.inf
    x[3], x[4] = 0, 1e-42
    x[5] = torch.linspace(-3.4e38, 3.4e38, K)
    x[6] = x[6].abs()
    x[7] = torch.linspace(-127.5, 127.5, K)  # zero point and largest step both round up: 256
    y = layer(x)
    assert y[:3].isnan().all()
    assert y[3:5].isfinite().all()
    assert_same(through(layer, file, x)[0], y)


def test_zero_point_at_both_ends_of_the_range(file: Path) -> None:
    layer = quantized(spec=SPECS["int8_zero_points"])
    layer.zero_point[:] = torch.tensor([-128, 127]).repeat(N // 2)
    x = torch.randn(4, K)
    x[0], x[1] = x[0].abs(), -x[1].abs()
    assert_same(through(layer, file, x)[0], layer(x))


def test_full_range_products_do_not_saturate(file: Path) -> None:
    layer = quantized()
    layer.weight[: N // 2], layer.weight[N // 2 :] = 127, -128
    x = torch.full((2, K), 255.0)
    assert_same(through(layer, file, x)[0], layer(x))


@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 1, 3, K)])
def test_input_of_any_rank_and_without_rows(shape: tuple[int, ...], file: Path) -> None:
    layer = quantized(bias=False)
    x = torch.randn(shape)
    assert_same(through(layer, file, x)[0], layer(x))


def test_few_inputs(file: Path) -> None:
    layers = [
        quantized(mode, SPECS[name], inputs=inputs)
        for mode in MODES
        for name in ("int8", "int4", "int4_groups")
        for inputs in (1, 5, 17)
    ]
    model = Calls(lambda x: tuple(layer(x[:, : layer.in_features]) for layer in layers))
    x = torch.randn(3, 17)
    for layer, y in zip(layers, through(model, file, x), strict=True):
        part = x[:, : layer.in_features]
        assert ((y - layer(part)).abs() <= bound(layer, part)).all(), layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats(dtype: torch.dtype, file: Path) -> None:
    layers = {"a": quantized(), "b": quantized("weight-only"), "c": quantized("static")}
    layers["c"].input_scale.fill_(0.0301)  # of 0.03, numbers of float16 are often half a step
    x = torch.randn(3, K, dtype=dtype)
    for layer, y in zip(layers.values(), through(Several(layers), file, x), strict=True):
        want = layer(x)
        assert y.dtype == want.dtype == dtype
        ulp = 2.0**-10 * want.abs() if dtype == torch.float16 else 0
        assert ((y - want).abs() <= bound(layer, x) + ulp).all()


def test_static_activations_differ_only_next_to_a_tie(file: Path) -> None:
    """ONNX adds the zero point after rounding, ours before: half a step goes another way."""
    layer = quantized("static")
    layer.input_scale.fill_(0.03125)
    x = torch.randn(5, K)
    x[1] = torch.arange(K) % 2 * 0.03125 + 0.015625  # all of them ties
    x[2, 0], x[2, 1] = torch.inf, -torch.inf
    y, want = through(layer, file, x)[0], layer(x)
    error, limit = (y - want).abs(), bound(layer, x)
    assert (error[[0, 2, 3, 4]] <= limit[[0, 2, 3, 4]]).all()
    assert (error[1] > limit[1]).any()
    step = 0.03125 * layer.weight_qtensor().dequantize().abs().sum(1)
    assert (error[1] <= limit[1] + step).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_integer_inputs_and_outputs(dtype: torch.dtype, file: Path) -> None:
    layers = [quantized("static", SPECS[s]) for s in ("int8", "int4_groups", "int8_groups_of_7")]
    zero_point = 121 if dtype == torch.uint8 else -7
    output = (torch.tensor(0.02), torch.tensor(zero_point + 5, dtype=torch.int32))
    ops = torch.ops.zeropoint

    def both(layer: QuantizedLinear, q: Tensor) -> tuple[Tensor, Tensor]:
        weight = (layer.weight, layer.scale, layer.zero_point, layer.bias)
        qparams = (layer.input_scale, layer.input_zero_point)
        layout = {"group_size": layer.group_size, "bits": layer.bits, "in_features": K}
        y = ops.linear_integer(q, *weight, *qparams, **layout)
        return y, ops.linear_quantized(q, *weight, *qparams, *output, "relu", **layout)

    for layer in layers:
        layer.input_zero_point.fill_(zero_point)
    model = Calls(lambda q: [both(layer, q) for layer in layers])
    info = torch.iinfo(dtype)
    q = torch.randint(info.min, info.max + 1, (6, K), dtype=dtype)
    got = through(model, file, q)
    for layer, y, integers in zip(layers, got[::2], got[1::2], strict=True):
        want, want_integers = both(layer, q)
        real = QTensor(q, layer.input_scale, layer.input_zero_point).dequantize()
        layer.mode = "weight-only"  # for the bound: these are the activations
        assert y.dtype == torch.float32
        assert ((y - want).abs() <= bound(layer, real)).all()
        assert integers.dtype == want_integers.dtype == dtype
        difference = (integers.int() - want_integers.int()).abs()
        assert difference.max() <= 1
        assert (difference == 0).float().mean() > 0.99
        assert want_integers.unique().numel() > 20


@pytest.mark.parametrize("kind", ["linear_dynamic", "linear_weight_only", "linear_static"])
def test_activations_and_residual(kind: str, file: Path) -> None:
    layer = quantized()
    arguments = [layer.weight, layer.scale, layer.zero_point, layer.bias]
    if kind == "linear_static":
        arguments += [torch.tensor(0.03), torch.tensor(121, dtype=torch.int32)]
    op = getattr(torch.ops.zeropoint, kind)
    names = (None, "relu", "gelu", "silu")
    model = Calls(lambda x, r: tuple(op(x, *arguments, name, r) for name in names))
    x, residual = torch.randn(6, K), torch.randn(6, N)
    got, want = through(model, file, x, residual), model(x, residual)
    for y, w in zip(got, want, strict=True):
        torch.testing.assert_close(y, w, rtol=0, atol=2e-6)
    assert (want[1] - want[0]).abs().max() > 0.1


def test_float_weights(file: Path) -> None:
    weight, layer = torch.randn(N, K, dtype=torch.bfloat16), quantized()
    model = Calls(
        lambda x: torch.ops.zeropoint.linear_float(x, weight, layer.bias, "relu") + layer(x)
    )
    x = torch.randn(3, K)
    torch.testing.assert_close(through(model, file, x)[0], model(x), rtol=1e-5, atol=1e-4)


def test_input_factor_and_rotation(file: Path) -> None:
    scale, zero_point = torch.full((N,), 0.02), torch.zeros(N, dtype=torch.int32)
    q = zeropoint.quantize_per_channel(torch.randn(N, 64), scale, zero_point, 0, torch.int8)
    factor = torch.rand(64) + 0.5
    layers = {
        f"by_{rotation}": QuantizedLinear.from_quantized(q, input_factor=factor, rotation=rotation)
        for rotation in (1, 4, 64)
    }
    shapes = ({0: ANY, 1: ANY},)
    zp_onnx.write(Several(layers), file, (torch.randn(2, 3, 64),), dynamic_shapes=shapes)
    x = torch.randn(4, 5, 64)
    for layer, y in zip(layers.values(), run(file, x), strict=True):
        assert_same(y, layer(x))


def test_a_layer_that_is_called_twice_is_written_once(file: Path) -> None:
    first, second = quantized(inputs=N), quantized(inputs=N)
    for layer in (first, second):
        layer.weight //= 2  # no products saturate, even without VNNI
    model = Calls(lambda x: first(second(first(x))) + second(x))
    x = torch.randn(3, N)
    assert_same(through(model, file, x, entries={})[0], model(x))
    held = [shape for kind, shape in tensors(file).values() if kind == "INT8"]
    assert held == [(N, N)] * 2


def test_layers_with_one_input_quantize_it_once(file: Path) -> None:
    x = torch.randn(3, K)
    layers = {name: quantized() for name in "qkv"}
    through(Several(layers), file, x)
    assert nodes(file).count("ReduceMin") == 1
    through(Several({name: quantized("static") for name in "qkv"}), file, x)
    assert nodes(file).count("QuantizeLinear") == 1


def test_a_weight_with_two_sets_of_scales(file: Path) -> None:
    first, second = quantized("weight-only"), quantized("weight-only")
    second.weight, second.scale = first.weight, first.scale * 2
    model, x = Several({"first": first, "second": second}), torch.randn(3, K)
    for layer, y in zip((first, second), through(model, file, x), strict=True):
        assert ((y - layer(x)).abs() <= bound(layer, x)).all()
