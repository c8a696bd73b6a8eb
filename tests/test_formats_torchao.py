"""Models that torchao quantized: the same integers, dequantized weights equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import zeropoint
from zeropoint.formats import torchao as zp_torchao
from zeropoint.formats.container import CheckpointError

pytest.importorskip("torchao", reason="needs torchao (the dependency group test)")
quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
granularity = pytest.importorskip("torchao.quantization.granularity", reason="needs torchao")

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
ROW, TENSOR, GROUP = granularity.PerRow(), granularity.PerTensor(), granularity.PerGroup(32)


def intx(bits: int, **more: Any) -> Any:
    dtype = getattr(torch, f"int{bits}")
    return quantization.IntxWeightOnlyConfig(weight_dtype=dtype, **more)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 5, bias=False))
    return model.to(dtype)


ASYMMETRIC = quantization.MappingType.ASYMMETRIC
CASES = {
    "int8 weight-only": (quantization.Int8WeightOnlyConfig(), 8, None),
    "int8 weight-only, per tensor": (
        quantization.Int8WeightOnlyConfig(granularity=TENSOR),
        8,
        None,
    ),
    "int8 dynamic": (quantization.Int8DynamicActivationInt8WeightConfig(), 8, None),
    "int8 static": (
        quantization.Int8StaticActivationInt8WeightConfig(
            act_quant_scale=torch.tensor([[0.03125]]), granularity=TENSOR
        ),
        8,
        None,
    ),
    "int4 weight-only": (intx(4, granularity=GROUP), 4, 32),
    "int4 weight-only, zero points": (
        intx(4, granularity=GROUP, mapping_type=ASYMMETRIC),
        4,
        32,
    ),
    "int2 weight-only, by channel": (intx(2, granularity=granularity.PerAxis(0)), 2, None),
    "int4 dynamic": (
        quantization.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=GROUP
        ),
        4,
        32,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_weights_are_equal(case: str, dtype: torch.dtype) -> None:
    config, bits, _ = CASES[case]
    theirs = net(dtype)
    quantization.quantize_(theirs, config)
    contents = zp_torchao.read(theirs)
    assert set(contents.layers) == {"0", "2"}
    for name, layer in contents.layers.items():
        weight = theirs.get_submodule(name).weight
        assert torch.equal(layer.weight.dequantize().to(dtype), weight.dequantize())
        assert torch.equal(layer.weight.int_repr(), weight.qdata)
        assert layer.weight.bits == bits
        assert layer.mode == case.partition(",")[0].split(" ")[1]
    assert contents.layers["0"].weight.group_size == CASES[case][2]
    assert torch.equal(contents.tensors["1.weight"], theirs[1].weight.detach())
    if case == "int8 static":
        assert contents.layers["0"].input_qparams == (0.03125, 128)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_close(case: str, tmp_path: Path) -> None:
    theirs = net()
    quantization.quantize_(theirs, CASES[case][0])
    contents = zp_torchao.read(theirs)
    ours = contents.load_into(net())
    with torch.no_grad():
        expected, got = theirs(X), ours(X)
    # Activations in 8 bits are rounded about zero there, with a zero point here.
    bound = 1e-5 if "weight-only" in case else 0.06
    assert (got - expected).abs().max() <= bound * expected.abs().max()
    contents.save(tmp_path / "ours.safetensors")
    again = zeropoint.load(tmp_path / "ours.safetensors", net())
    assert torch.equal(again(X), got)
    state = zp_torchao.read(theirs.state_dict())
    assert torch.equal(state.load_into(net())(X), got)


def test_scale_before_the_activations_is_an_input_factor() -> None:
    theirs = net()[:1]
    quantization.quantize_(theirs, quantization.Int8WeightOnlyConfig())
    theirs[0].weight.act_pre_scale = torch.rand(64) + 0.5
    ours = zp_torchao.read(theirs).load_into(net()[:1])
    with torch.no_grad():
        expected = theirs(X)
    assert (ours(X) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no weight that torchao quantized"):
        zp_torchao.read(net())
    with pytest.raises(TypeError, match=r"source must be a torch\.nn\.Module .*, got str"):
        zp_torchao.read("model.pt")  # type: ignore[arg-type]
    theirs = net()
    quantization.quantize_(theirs, intx(4, granularity=GROUP))
    theirs[0].weight.activation_quantization = "int4"
    with pytest.raises(CheckpointError, match="layer '0': activations quantized as 'int4'"):
        zp_torchao.read(theirs)
    theirs[0].weight.activation_quantization = None
    theirs[0].weight.target_dtype = torch.int1
    with pytest.raises(CheckpointError, match=r"layer '0': weights of 2 to 8 bits.*torch\.int1"):
        zp_torchao.read(theirs)
    theirs[0].weight.target_dtype = torch.int2
    with pytest.raises(CheckpointError, match="layer '0': int_repr must be within"):
        zp_torchao.read(theirs)
    other = net()
    quantization.quantize_(other, quantization.Int8WeightOnlyConfig())
    other[0].weight.block_size = [2, 64]
    with pytest.raises(CheckpointError, match=r"layer '0': blocks of \(2, 64\) are neither"):
        zp_torchao.read(other)
    with pytest.raises(CheckpointError, match="'table': a Int8Tensor that is no Linear layer's"):
        zp_torchao.read({"table": other[2].weight})


def test_tensor_of_another_class() -> None:
    theirs = net()[:1]
    quantization.quantize_(theirs, quantization.Float8WeightOnlyConfig())
    with pytest.raises(CheckpointError, match="layer '0': a Float8Tensor; Int8Tensor and Intx"):
        zp_torchao.read(theirs)


WRONG = st.one_of(
    st.none(),
    st.integers(-3, 300),
    st.text(max_size=3),
    st.lists(st.integers(-1, 65), max_size=3),
    st.builds(
        lambda shape, value, dtype: torch.full(shape, value).to(dtype),
        st.sampled_from([(), (1,), (32,), (32, 1), (32, 2), (32, 64), (64,), (5, 64), (2, 32)]),
        st.sampled_from([0.0, 1.0, -1.0, 1e-3, 200.0, float("nan"), float("inf")]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.uint8]),
    ),
)
PARTS = ("qdata", "scale", "zero_point", "block_size", "act_pre_scale", "target_dtype")
ACTIVATIONS = ("act_quant_scale", "act_quant_zero_point", "activation_quantization")


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    case=st.sampled_from(["int8 static", "int4 dynamic", "int4 weight-only, zero points"]),
    part=st.sampled_from([*PARTS, *ACTIVATIONS]),
    value=WRONG,
)
def test_any_parts_of_a_tensor_are_read_or_refused(case: str, part: str, value: Any) -> None:
    """A living model has no bytes to damage; here are what a state dict may have been made of."""
    theirs = net()
    quantization.quantize_(theirs, CASES[case][0])
    weight = theirs[0].weight.data
    setattr(weight, part, value)
    try:
        contents = zp_torchao.read({"0.weight": weight, "0.bias": theirs[0].bias})
    except CheckpointError as error:
        assert error.layer == "0" or error.tensor == "0.weight"  # noqa: PT017
        return
    layer = contents.layers["0"].build()
    assert tuple(layer.weight_qtensor().shape) == (32, 64)
    assert layer(X).shape == (6, 32)
