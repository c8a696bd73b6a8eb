"""compressed-tensors: configs and tensors that are refused, and any others too."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from test_formats_compressed_tensors import config_of, quantized
from zeropoint.formats import compressed_tensors as ct


def set_weights(config: dict[str, Any], **changes: Any) -> None:
    config["config_groups"]["group_0"]["weights"].update(changes)


def set_inputs(config: dict[str, Any], **changes: Any) -> None:
    inputs = {"num_bits": 8, "dynamic": True, "strategy": "token"} | changes
    config["config_groups"]["group_0"]["input_activations"] = inputs


HOSTILE_CONFIGS = [
    (
        lambda c: c.update(quant_method="fp8"),
        "must be 'compressed-tensors', got 'fp8'",
    ),
    (lambda c: c.clear(), "quant_method must be"),
    (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "a quantized key-value cache"),
    (lambda c: c.update(transform_config={"a": 1}), "transforms of inputs"),
    (lambda c: c.update(sparsity_config={"format": "sparse-bitmask"}), "sparse weights"),
    (lambda c: c.update(config_groups=[]), "config_groups must map"),
    (lambda c: c.update(config_groups={"W4A16": ["Linear"]}), "config_groups must map"),
    (lambda c: c.update(config_groups={}), "layer '0': no group of the config names it"),
    (lambda c: c.update(ignore=[1]), "ignore must be a list of strings"),
    (lambda c: c.update(ignore=["0"]), "layer '0': .*the config ignores it"),
    (lambda c: set_weights(c, num_bits=16), "layer '0': .*weights of 2 to 8 bits"),
    (lambda c: set_weights(c, num_bits=True), "weights of 2 to 8 bits"),
    (lambda c: set_weights(c, num_bits=8), "tensor '0.weight_packed': must have shape"),
    (lambda c: set_weights(c, type="float"), "of type 'float'; integers can be read"),
    (lambda c: set_weights(c, strategy="block"), "by tensor, channel or group can be read"),
    (lambda c: set_weights(c, group_size=0), "group_size must be an integer from 1"),
    (lambda c: set_weights(c, group_size=8), "tensor '0.weight_scale': must have shape"),
    (lambda c: set_weights(c, actorder="group"), "not runs of neighbouring inputs"),
    (lambda c: set_weights(c, strategy="channel"), "tensor '0.weight_scale': must have shape"),
    (lambda c: set_inputs(c, num_bits=4), "activations of 8 bits can be read, got 4"),
    (lambda c: set_inputs(c, type="float"), "input_activations of type 'float'"),
    (lambda c: set_inputs(c, dynamic="local"), "static by tensor, or dynamic"),
    (lambda c: set_inputs(c, dynamic=False), "static by tensor, or dynamic"),
    (lambda c: set_inputs(c, dynamic=False, strategy="tensor"), "'0.input_scale': missing"),
    (
        lambda c: c["config_groups"]["group_0"].update(output_activations={"num_bits": 8}),
        "quantized outputs",
    ),
    (
        lambda c: c["config_groups"]["group_0"].update(format="marlin-24"),
        "format must be pack-quantized",
    ),
    (lambda c: c["config_groups"]["group_0"].update(weights=None), "weights must be a JSON object"),
]


@pytest.mark.parametrize(("change", "reason"), HOSTILE_CONFIGS)
def test_config_that_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    ct.write(quantized("w4-asymmetric"), tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    change(content["quantization_config"])
    file.write_text(json.dumps(content))
    with pytest.raises(ct.CheckpointError, match=reason):
        ct.read(tmp_path)


def put(**changes: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key, value in changes.items():
            if value is None:
                del tensors[f"0.{key}"]
            else:
                tensors[f"0.{key}"] = value

    return change


HOSTILE_TENSORS = [
    (put(weight_packed=None), "tensor '0.weight_packed': missing"),
    (put(weight_scale=None), "tensor '0.weight_scale': missing"),
    (put(weight_shape=None), "tensor '0.weight_shape': missing"),
    (put(weight_zero_point=None), "tensor '0.weight_zero_point': missing"),
    (put(weight_shape=torch.tensor([35, 63])), "groups of 16 do not divide its 63 inputs"),
    (put(weight_shape=torch.tensor([-35, 64])), "must hold two sizes"),
    (put(weight_shape=torch.tensor([35, 1 << 60])), "must hold two sizes"),
    (put(weight_shape=torch.tensor([35.0, 64.0])), "must be torch.int64 or torch.int32"),
    (put(weight_packed=torch.zeros(35, 8)), "must be torch.int32, is torch.float32"),
    (put(weight_packed=torch.zeros(35, 9, dtype=torch.int32)), "must have shape"),
    (put(weight_scale=torch.zeros(35, 4)), "layer '0': scale must be positive and finite"),
    (put(weight_scale=torch.full((35, 4), float("nan"))), "scale must be positive and finite"),
    (put(weight_scale=-torch.ones(35, 4)), "scale must be positive and finite"),
    (put(weight_scale=torch.ones(4, 35)), "'0.weight_scale': must have shape"),
    (put(weight_scale=torch.ones(35, 4, dtype=torch.int32)), "'0.weight_scale': must be"),
    (put(weight_zero_point=torch.zeros(35, 4, dtype=torch.int32)), "must have shape"),
    (put(bias=torch.zeros(34)), "tensor '0.bias': must have shape"),
    (put(weight_g_idx=torch.zeros(64, dtype=torch.int32)), "weight_g_idx.*meaning"),
]


@pytest.mark.parametrize(("change", "reason"), HOSTILE_TENSORS)
def test_tensors_that_are_refused(change: Any, reason: str, tmp_path: Path) -> None:
    ct.write(quantized("w4-asymmetric"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ct.CheckpointError, match=reason):
        ct.read(tmp_path)


def test_activations_that_are_refused(tmp_path: Path) -> None:
    ct.write(quantized("int8-static"), tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    for key, value in (("scale", 0.0), ("scale", float("inf")), ("zero_point", 300)):
        bad = torch.tensor([value], dtype=torch.float32 if key == "scale" else torch.int32)
        save_file(good | {f"0.input_{key}": bad}, tmp_path / "model.safetensors")
        with pytest.raises(ct.CheckpointError, match=f"layer '0': {key} must be"):
            ct.read(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    ct.write(quantized("w4-asymmetric"), path)
    return path


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_config_is_read_or_refused(data: st.DataObject, folder: Path) -> None:
    content = config_of(folder)
    at: Any = content
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [k for k in at if isinstance(at[k], dict) and at[k]]
        if inner:
            at = at[data.draw(st.sampled_from(inner))]
    at[data.draw(st.sampled_from(sorted(at)))] = data.draw(values)
    there = folder / "other"
    there.mkdir(exist_ok=True)
    shutil.copy(folder / "model.safetensors", there)
    (there / "config.json").write_text(json.dumps({"quantization_config": content}))
    with contextlib.suppress(ct.CheckpointError):
        ct.read(there)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 1 << 20), byte=st.integers(0, 255), cut=st.booleans())
def test_any_file_is_read_or_refused(at: int, byte: int, cut: bool, folder: Path) -> None:
    there = folder / "bytes"
    there.mkdir(exist_ok=True)
    good = (folder / "model.safetensors").read_bytes()
    at %= len(good)
    bad = good[:at] if cut else good[:at] + bytes([byte]) + good[at + 1 :]
    (there / "model.safetensors").write_bytes(bad)
    shutil.copy(folder / "config.json", there)
    with contextlib.suppress(ct.CheckpointError):
        ct.read(there)
