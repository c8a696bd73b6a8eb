"""Rescue of models that torch.ao.quantization made, from files kept here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from golden.make_torch_ao import Others, fill, pattern
from torch_models import (
    DYNAMIC,
    ENGINES,
    EXPECTED,
    STATIC,
    architecture,
    golden,
    load,
    torchs_engine,
)
from zeropoint import QTensor, QuantizedLinear
from zeropoint.formats import torch_ao, torch_parity
from zeropoint.formats.torch_ao import CheckpointError, read, rescue
from zeropoint.formats.torch_state import Packed

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def without_torchs_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch as it will be: it reads no such file and has no such operators."""

    def gone(*_: Any, **__: Any) -> Any:
        raise AttributeError("torch has this no more")

    for owner, names in (
        (torch, ("load", "_empty_affine_quantized", "_empty_per_channel_affine_quantized")),
        (torch, ("_make_per_tensor_quantized_tensor", "_make_per_channel_quantized_tensor")),
        (torch, ("quantize_per_tensor", "quantize_per_channel", "dequantize")),
        (torch.jit, ("load",)),
        (torch._utils, ("_rebuild_qtensor", "_rebuild_tensor_v2", "_rebuild_parameter")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, gone)
    monkeypatch.setattr(torch.ops, "quantized", object(), raising=False)


# Golden files.


@pytest.mark.parametrize("name", EXPECTED)
def test_integers_are_those_that_torch_told(name: str, without_torchs_quantization: None) -> None:
    state = read(golden(name))
    expected = EXPECTED[name]["layers"]
    assert state.layers.keys() == expected.keys()
    for layer, entry in expected.items():
        got = state.layers[layer]
        assert got.weight.int_repr().tolist() == entry["integers"], layer
        assert got.weight.scale.tolist() == entry["scale"], layer
        assert got.weight.zero_point.tolist() == entry["zero_point"], layer
        assert (None if got.bias is None else got.bias.tolist()) == entry["bias"], layer
        got_output = None if got.output is None else list(got.output)
        if entry["output"] is None:
            assert got_output is None
        else:  # a state dict keeps the scale in float32
            assert got_output == pytest.approx(entry["output"], rel=1e-7)


@pytest.mark.parametrize("name", STATIC)
def test_static_model_computes_what_torch_computed(
    name: str, tmp_path: Path, without_torchs_quantization: None
) -> None:
    entry = EXPECTED[name]
    path = tmp_path / "new.safetensors"
    no_bias = "fc2" if "qnnpack" in name or name.startswith("fx") else ()
    no_bias = [n for n in ["fc2"] if no_bias and entry["layers"][n]["bias"] is not None]
    rescue(golden(name), path, inputs=entry["inputs"], no_bias=no_bias)
    model = load(path, name)
    quantized = {n for n, m in model.named_modules() if type(m) is QuantizedLinear}
    assert quantized == entry["layers"].keys()
    last = entry["layers"]["body.2" if name.startswith("fx") else "fc2"]["output"]
    steps = (model(pattern(5, 8)) - torch.tensor(entry["outputs"])).abs() / last[0]
    # torch rounds the last output as well, to half a step; a step before may be another one.
    assert steps.max() <= 1.5, steps.max()
    assert steps.mean() < 0.5
    scale = torch.tensor(entry["outputs"]).abs().max() / last[0]
    assert scale > 20, "else nothing would have been compared"


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_model_is_nearer_to_its_integers_than_torch(name: str, tmp_path: Path) -> None:
    entry = EXPECTED[name]
    path = tmp_path / "new.safetensors"
    report = rescue(golden(name), path)
    assert {layer.mode for layer in report.layers} == {"dynamic"}
    model = load(path, name)
    exact = architecture(name)
    for layer in report.layers:
        parent, _, key = layer.name.rpartition(".")
        setattr(exact.get_submodule(parent), key, model.get_submodule(layer.name).dequantize())
    if name.startswith("fx"):
        exact.norm = model.norm
    x = pattern(5, 8)
    y, theirs = exact(x), torch.tensor(entry["outputs"])
    ours_off, theirs_off = (model(x) - y).square().mean(), (theirs - y).square().mean()
    assert 0 < ours_off < theirs_off
    assert theirs_off < 1e-3 * y.square().mean()


def test_other_layers_become_floats_and_the_rest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    report = rescue(golden("others_state"), path, inputs="order")
    assert report.dequantized == {
        "conv.weight": "int8 per channel",
        "embed.weight": "uint8 with float zero points",
        "low.weight": "weights in float16",
    }
    assert report.left.keys() == {"conv", "quant"}
    assert all("of an activation" in reason for reason in report.left.values())
    model = load(path, "others")
    assert type(model.fc) is QuantizedLinear
    assert type(model.conv) is nn.Conv1d
    for name, expected in EXPECTED["others_state"]["dequantized"].items():
        assert model.get_parameter(name).tolist() == expected, name
    float_model = fill(Others())
    assert torch.equal(model.norm.running_mean, float_model.norm.running_mean)
    assert torch.equal(model.low.weight, float_model.low.weight)


def test_all_ways_of_saving_one_model_give_one_checkpoint(tmp_path: Path) -> None:
    names = ["state", "model", "script"]
    inputs = EXPECTED["static_x86_state"]["inputs"]
    files = []
    for name in [*(f"static_x86_{n}" for n in names), "static_version_1", "static_version_2"]:
        path = tmp_path / f"{name}.safetensors"
        rescue(golden(name), path, inputs=inputs)
        files.append(path)
    states = [load(path, "static").state_dict() for path in files]
    for state in states[1:]:
        assert all(torch.equal(state[k], v) for k, v in states[0].items())


# Reports.


def test_report_proves_it(tmp_path: Path) -> None:
    report = rescue(
        golden("static_x86_state"),
        tmp_path / "new.safetensors",
        inputs={"fc1": "quant", "*": "order"},
    )
    assert report.ok
    assert [layer.integers_equal for layer in report.layers] == [True, True]
    assert all(layer.outputs is not None and layer.outputs.ok for layer in report.layers)
    assert [layer.outputs.compared for layer in report.layers] == [96, 64]
    assert [layer.input for layer in report.layers] == ["of quant, as given", "of fc1, by order"]
    content = json.loads(json.dumps(report.to_dict()))
    assert content["version"] == 1
    assert content["ok"] is True
    assert content["layers"][0]["outputs"]["largest"] <= 1
    assert any("order of the file" in note for note in content["notes"])


@pytest.mark.parametrize("what", ["integers", "outputs"])
def test_report_tells_what_is_not_the_same(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "integers":
        theirs = read(golden("dynamic_state"))
        theirs.layers["fc2"].weight.int_repr()[0, 0] += 1
        monkeypatch.setattr(torch_ao, "torchs_reading", lambda *_: theirs)
    else:
        dynamic = torch_parity.ops.dynamic
        monkeypatch.setattr(torch_parity.ops, "dynamic", lambda *a: dynamic(*a) + 0.1)
    report = rescue(golden("dynamic_state"), tmp_path / "new.safetensors")
    assert not report.ok
    assert any("NOT THE SAME" in note and "fc2" in note for note in report.notes())
    assert report.to_dict()["ok"] is False


def test_report_says_what_was_not_compared(
    tmp_path: Path, without_torchs_quantization: None
) -> None:
    report = rescue(golden("dynamic_state"), tmp_path / "new.safetensors")
    assert report.ok
    assert {layer.integers_equal for layer in report.layers} == {None}
    assert {layer.outputs for layer in report.layers} == {None}
    notes = " ".join(report.notes())
    assert "Integers were not compared" in notes
    assert "torch has no operator" in notes
    quiet = rescue(golden("dynamic_state"), tmp_path / "new.safetensors", compare=False)
    assert not list(quiet.notes())


@pytest.mark.skipif("qnnpack" not in ENGINES, reason="torch has no other engine here")
def test_the_engine_is_left_as_it_was(tmp_path: Path) -> None:
    with torchs_engine("qnnpack"):
        rescue(golden("dynamic_state"), tmp_path / "new.safetensors")
        assert torch.backends.quantized.engine == "qnnpack"


# Where the scale of an input comes from.


def test_input_scale_unknown_is_refused_and_says_the_ways(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    with pytest.raises(CheckpointError, match=r"\(fc1, fc2\).*'order'.*'dynamic'.*mapping"):
        rescue(golden("static_x86_state"), path)
    with pytest.raises(CheckpointError, match=r"stands before fc1 .*'fc1': 'quant'"):
        rescue(golden("static_x86_state"), path, inputs="order")
    assert not path.exists()


def test_inputs_dynamic(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    report = rescue(golden("static_x86_state"), path, inputs={"fc1": (0.05, 64), "*": "dynamic"})
    assert [layer.mode for layer in report.layers] == ["static", "dynamic"]
    model = load(path, "static")
    assert model.fc1.input_scale.item() == torch.tensor(0.05).item()
    assert model.fc1.output_scale is not None
    assert model.fc2.input_scale is None


def test_input_scale_that_fx_names(tmp_path: Path) -> None:
    for name in ("fx_static_state", "fx_static_model"):
        state = read(golden(name))
        assert list(state.inputs) == ["fc1"]
        expected = EXPECTED[name]["inputs"]["fc1"]
        assert list(state.inputs["fc1"]) == pytest.approx(expected, rel=1e-7)


def test_only_one_candidate_for_the_input(tmp_path: Path) -> None:
    weight = QTensor(torch.ones(2, 3, dtype=torch.int8), 0.5)
    layer = {"fc._packed_params._packed_params": Packed(weight, None), "fc.scale": 0.25,
             "fc.zero_point": 3}  # fmt: skip
    path = tmp_path / "new.safetensors"
    report = rescue(layer | {"quant.scale": 0.125, "quant.zero_point": 7}, path)
    assert report.layers[0].input == "of quant, the only one"
    with pytest.raises(CheckpointError, match="does not say"):
        rescue(layer, path)
    other = {k.replace("fc", "other"): v for k, v in layer.items()}
    with pytest.raises(CheckpointError, match="does not say"):  # each other's, by no means
        rescue(layer | other, path)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ("sideways", "'order', 'dynamic' or a mapping, got 'sideways'"),
        ({"*": "fc1"}, "got 'fc1'"),
        ({"fc9": "quant"}, "'fc9' is no static layer; those are fc1, fc2"),
        ({"fc1": "quant9"}, "no output scale of 'quant9'.*quant"),
        ({"fc1": 3}, r"module or \(scale, zero_point\)"),
        ({"fc1": (0.5, 0.5)}, "a float and an int"),
        ({"fc1": (-0.5, 3), "fc2": "fc1"}, "scale must be positive"),
        ({"fc1": (0.5, 256), "fc2": "fc1"}, "zero_point must be within"),
    ],
)
def test_inputs_that_fit_nothing(inputs: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        rescue(golden("static_x86_state"), tmp_path / "new.safetensors", inputs=inputs)
    assert not list(tmp_path.iterdir())


def test_zero_bias_of_qnnpack_is_told_and_dropped_when_named(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    inputs = EXPECTED["static_qnnpack_state"]["inputs"]
    report = rescue(golden("static_qnnpack_state"), path, inputs=inputs)
    assert report.zero_biases == ("fc2",)
    assert any("fc2" in note and "qnnpack" in note for note in report.notes())
    with pytest.raises(CheckpointError, match="bias is False in the model"):
        load(path, "static")
    report = rescue(golden("static_qnnpack_state"), path, inputs=inputs, no_bias="*2")
    assert load(path, "static").fc2.bias is None
    with pytest.raises(ValueError, match="the bias of 'fc1' is not zero"):
        rescue(golden("static_qnnpack_state"), path, inputs=inputs, no_bias="fc1")
    with pytest.raises(ValueError, match="'nothing' matches no"):
        rescue(golden("static_qnnpack_state"), path, inputs=inputs, no_bias=["nothing"])
