"""Rescue of models that torch makes here and now, and of what is no such model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zeropoint
from golden.make_torch_ao import FloatNet, Net, fill, pattern, static
from torch_models import ENGINES, golden, load, torchs_engine
from zeropoint.formats.torch_ao import CheckpointError, observe_inputs, read, rescue

pytestmark = pytest.mark.filterwarnings("ignore")


# What is not for rescue.


def test_model_that_was_never_converted(tmp_path: Path) -> None:
    model = fill(Net())
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    prepared = torch.ao.quantization.prepare(model)
    torch.save(prepared.state_dict(), tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"convert was not called"):
        rescue(tmp_path / "old.pt", tmp_path / "new.safetensors")


def test_float_model(tmp_path: Path) -> None:
    torch.save(FloatNet().state_dict(), tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="no quantized Linear layer"):
        rescue(tmp_path / "old.pt", tmp_path / "new.safetensors")
    assert list(read(tmp_path / "old.pt").tensors) == ["fc1.weight", "fc1.bias", "fc2.weight"]


def test_training_checkpoint_with_a_state_dict_in_it(tmp_path: Path) -> None:
    state = torch.load(golden("dynamic_state"))
    other = FloatNet().state_dict()
    old, new = tmp_path / "old.pt", tmp_path / "new.safetensors"
    torch.save({"epoch": 3, "model": state, "best": 0.5}, old)
    report = rescue(old, new)
    assert [(layer.name, layer.integers_equal) for layer in report.layers] == [
        ("fc1", True),
        ("fc2", True),
    ]
    torch.save({"model": state, "ema": other}, old)
    with pytest.raises(CheckpointError, match="say which to read"):
        rescue(old, new)
    report = rescue(old, new, key="model")
    assert [layer.integers_equal for layer in report.layers] == [True, True]
    with pytest.raises(CheckpointError, match="nothing under the key 'step'"):
        rescue(old, new, key="step")


def test_model_whose_attributes_call_something_is_refused_with_advice(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2)))
    torch.save(model, tmp_path / "old.pt")
    assert list(read(tmp_path / "old.pt").layers) == ["0"]
    model.note = functools.partial(max, 3)
    torch.save(model, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"functools\.partial.*not run.*state_dict"):
        read(tmp_path / "old.pt")


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    state = dict(torch.load(golden("dynamic_state")))
    state["a"] = torch.randn(3, 4)
    state["b"] = state["a"]
    torch.save(state, tmp_path / "old.pt")
    rescue(tmp_path / "old.pt", tmp_path / "new.safetensors")
    assert zeropoint.inspect_checkpoint(tmp_path / "new.safetensors").aliases == {"b": "a"}


def test_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    state = dict(torch.load(golden("dynamic_state"))) | {
        "c": torch.zeros(2, dtype=torch.complex128)
    }
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=r"'c': torch\.complex128"):
        rescue(tmp_path / "old.pt", tmp_path / "new.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["old.pt"]


def test_strided_empty_and_other_tensors_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    base = torch.randn(6, 5)
    state = {
        "t": base.T, "cut": base[1:3, ::2], "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5),
        "bool": torch.tensor([True, False]), "half": base.half(), "bfloat16": base.bfloat16(),
        "long": torch.arange(4), "double": base.double(), "parameter": nn.Parameter(base),
    }  # fmt: skip
    for legacy in (False, True):
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=not legacy)
        got = read(tmp_path / "old.pt").tensors
        assert got.keys() == state.keys()
        for name, value in state.items():
            assert got[name].dtype == value.dtype, name
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(protocol: int, tmp_path: Path) -> None:
    state = torch.load(golden("static_x86_state"))
    torch.save(state, tmp_path / "old.pt", pickle_protocol=protocol)
    assert list(read(tmp_path / "old.pt").layers) == ["fc1", "fc2"]


# Living models.


def test_living_model_and_its_observed_inputs(tmp_path: Path) -> None:
    model = static("x86")
    inputs = observe_inputs(model, pattern(3, 8))
    assert inputs.keys() == {"fc1", "fc2"}
    path = tmp_path / "new.safetensors"
    report = rescue(model, path, inputs=inputs)
    assert report.kind == "model"
    assert [layer.torch_kind for layer in report.layers] == ["static, ReLU fused", "static"]
    assert report.ok
    steps = (load(path, "static")(pattern(5, 8)) - model(pattern(5, 8))).abs() / model.fc2.scale
    assert steps.max() <= 1.5
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="key is for files"):
        read(model, key="a")


def quantized_layer(
    kind: str, k: int, n: int, bias: bool, relu: bool, x: Tensor, engine: str
) -> nn.Module:
    """A layer that torch quantized, alone in a model after a stub."""
    import torch.ao.quantization as tq

    layers = [nn.Linear(k, n, bias)] + [nn.ReLU()] * relu
    if kind == "dynamic":
        per_channel = (
            tq.per_channel_dynamic_qconfig if engine != "qnnpack" else tq.default_dynamic_qconfig
        )
        return tq.quantize_dynamic(nn.Sequential(*layers), {nn.Linear: per_channel})
    model = tq.QuantWrapper(nn.Sequential(*layers))
    if relu:
        fuse = tq.fuse_modules_qat if kind == "trained" else tq.fuse_modules
        model = fuse(model.train(kind == "trained"), [["module.0", "module.1"]])
    if kind == "trained":
        model.qconfig = tq.get_default_qat_qconfig(engine)
        prepared = tq.prepare_qat(model.train())
    else:
        model.qconfig = tq.get_default_qconfig(engine)
        prepared = tq.prepare(model.eval())
    prepared(x)
    return tq.convert(prepared.eval())


@settings(max_examples=12)
@given(
    kind=st.sampled_from(["dynamic", "static", "trained"]),
    k=st.integers(1, 70),
    n=st.integers(1, 40),
    bias=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("engine", ENGINES)
def test_layer_of_any_engine_is_rescued(
    engine: str, kind: str, k: int, n: int, bias: bool, relu: bool, seed: int, tmp_path_factory: Any
) -> None:
    torch.manual_seed(seed)
    folder = tmp_path_factory.mktemp("rescue")
    with torchs_engine(engine):
        model = quantized_layer(kind, k, n, bias, relu, torch.randn(64, k), engine)
        torch.save(model.state_dict(), folder / "old.pt")
        inputs = None if kind == "dynamic" else observe_inputs(model, torch.randn(2, k))
    report = rescue(folder / "old.pt", folder / "new.safetensors", inputs=inputs)
    (layer,) = report.layers
    assert layer.integers_equal
    assert layer.outputs is not None
    assert layer.outputs.ok, layer.outputs
    assert layer.mode == ("dynamic" if kind == "dynamic" else "static")
    (theirs,) = (m for m in model.modules() if hasattr(m, "in_features"))
    info = zeropoint.inspect_checkpoint(folder / "new.safetensors").layers[layer.name]
    assert info.bias == (theirs.bias() is not None)
    ours = zeropoint.load(
        folder / "new.safetensors", architecture_like(layer.name, k, n, info.bias)
    )
    q = ours.get_submodule(layer.name).weight_qtensor()
    assert torch.equal(q.dequantize(), theirs.weight().dequantize())


def architecture_like(name: str, k: int, n: int, bias: bool) -> nn.Module:
    inner = nn.Sequential(nn.Linear(k, n, bias), nn.ReLU())
    return inner if name == "0" else nn.ModuleDict({"module": inner})
