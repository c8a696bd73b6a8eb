"""Rescue of models that torch.ao.quantization made, from files kept here and from living ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zeropoint
from golden.make_torch_ao import FloatNet, Net, Others, Traced, fill, pattern
from zeropoint import QTensor, QuantizedLinear
from zeropoint.formats import torch_ao, torch_parity
from zeropoint.formats.torch_ao import CheckpointError, observe_inputs, read, rescue
from zeropoint.formats.torch_state import Packed

pytestmark = pytest.mark.filterwarnings("ignore")

GOLDEN = Path(__file__).parent / "golden" / "torch_ao"
EXPECTED: dict[str, Any] = json.loads(GOLDEN.with_suffix(".json").read_text())
STATIC = [name for name, entry in EXPECTED.items() if entry.get("inputs")]
DYNAMIC = [name for name in EXPECTED if "dynamic" in name]
ENGINES = [e for e in ("x86", "fbgemm", "onednn", "qnnpack")
           if e in torch.backends.quantized.supported_engines]  # fmt: skip


def golden(name: str) -> Path:
    return GOLDEN / f"{name}.pt"


def architecture(name: str) -> nn.Module:
    model = Traced() if name.startswith("fx") else Others() if name.startswith("others") else None
    return FloatNet() if model is None else model


def load(path: Path, name: str) -> nn.Module:
    return zeropoint.load(path, architecture(name)).eval()


@contextmanager
def torchs_engine(name: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


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
    from golden.make_torch_ao import static

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
