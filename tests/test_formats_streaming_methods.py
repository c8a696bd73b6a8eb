"""Methods that look at no data, on a file without its model."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import zeropoint
from bits import assert_same_bits
from zeropoint import CheckpointError, LayerRecipe, PerTensor, QuantSpec
from zeropoint.formats import streaming

METHODS = [("clip",), ("hqq",), ("hadamard",), ("hadamard", "hqq")]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 50), nn.ReLU(), nn.Linear(50, 5), nn.Linear(5, 3))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "float.safetensors"
    safetensors.torch.save_file(model().state_dict(), path)
    return path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [zeropoint.WEIGHT_INT4, zeropoint.WEIGHT_INT8], ids=str)
def test_same_integers_as_with_the_model(
    source: Path, method: tuple[str, ...], spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1000)  # several blocks of rows
    recipe = LayerRecipe("weight-only", spec, method=method)
    out = source.with_name("out.safetensors")
    summary = zeropoint.quantize_file(source, out, recipe)
    assert list(summary.quantized) == ["0", "2", "3"]
    found = zeropoint.load(out, model())
    floats = model()
    safetensors.torch.load_model(floats, source)
    expected = zeropoint.quantize(floats, recipe)
    assert ("hadamard" in method) == (found[0].input_factor is not None)
    assert found[3].input_factor is None  # 5 inputs, which cannot be rotated
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert_same_bits(state[name], tensor)


@pytest.mark.parametrize("method", ["gptq", "awq", "smooth", "bias-correction"])
def test_methods_that_look_at_data_are_refused(source: Path, method: str) -> None:
    recipe = LayerRecipe("dynamic", method=method)
    with pytest.raises(ValueError, match=f"recipe must not use '{method}' here, which looks at da"):
        zeropoint.quantize_file(source, source, recipe)


def test_methods_per_tensor_are_refused(source: Path) -> None:
    recipe = LayerRecipe("dynamic", QuantSpec(granularity=PerTensor()), method="clip")
    with pytest.raises(ValueError, match="per channel or per group here for method 'clip'"):
        zeropoint.quantize_file(source, source, recipe)


def test_nan_is_named(source: Path) -> None:
    state = safetensors.torch.load_file(source)
    state["2.weight"][3, 1] = torch.nan
    safetensors.torch.save_file(state, source)
    recipe = LayerRecipe("dynamic", method="hqq")
    with pytest.raises(CheckpointError, match=r"2\.weight.*NaN or Inf"):
        zeropoint.quantize_file(source, source.with_name("out"), recipe)


def test_file_with_a_factor_of_its_own(source: Path) -> None:
    state = safetensors.torch.load_file(source)
    state["0.input_factor"] = torch.ones(48)
    safetensors.torch.save_file(state, source)
    out = source.with_name("out.safetensors")
    recipe = LayerRecipe("dynamic", method="hadamard")
    summary = zeropoint.quantize_file(source, out, recipe)
    assert summary.left["0"] == "the file has a tensor '0.input_factor' of its own"
