"""``zeropoint convert`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import zeropoint
from commands import fails, in_folder, ok, run
from test_formats_gptq_awq import IN, OUT, Case

__all__ = ["in_folder"]
SPEC = zeropoint.QuantSpec(4, True, True, zeropoint.PerGroup(32), torch.float16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(IN, OUT)
        self.norm = nn.LayerNorm(3, bias=False, dtype=torch.float16)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_into_a_checkpoint(kind: str, folder: Path) -> None:
    case = Case(4, lowest=1)
    getattr(case, kind)(Path("theirs"))
    out = ok("convert", "theirs", "ours.safetensors")
    assert f"1 quantized layer of {kind}, 1 other tensors." in out
    assert "Wrote ours.safetensors: " in out
    layer = zeropoint.load("ours.safetensors", Net()).fc
    assert torch.equal(layer.weight_qtensor().dequantize(), case.weight)
    assert "ours.safetensors already" not in ok("inspect", "ours.safetensors")


def test_gptq_options(folder: Path) -> None:
    order = torch.arange(IN).flip(0) // 16
    case = Case(4, lowest=1, order=order)
    case.gptq(Path("theirs"))
    assert "its inputs are in an order" in fails("convert", "theirs", "ours.safetensors")
    assert not Path("ours.safetensors").exists()
    result = run("convert", "theirs", "ours.safetensors", "--reordered", "dequantize")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: left behind: the integers of 'fc.weight'")
    assert zeropoint.inspect_checkpoint("ours.safetensors").layers == {}
    line = fails("convert", "theirs", "ours.safetensors", "--zero-points", "v3")
    assert "zero_points must be 'v1', 'v2' or None, got 'v3'" in line


def test_from_a_checkpoint_to_every_format_and_back(folder: Path) -> None:
    model = zeropoint.quantize(Net(), zeropoint.LayerRecipe("weight-only", SPEC))
    zeropoint.save(model, "ours.safetensors")
    Path("base.json").write_text('{"model_type": "net"}')
    ok("convert", "ours.safetensors", "packed", "--config", "base.json")
    config = json.loads(Path("packed/config.json").read_text())
    assert config["model_type"] == "net"
    assert config["quantization_config"]["format"] == "pack-quantized"
    ok("convert", "packed", "back.safetensors")
    ok("convert", "packed/model.safetensors", "packed2")  # takes the config beside it along
    again = json.loads(Path("packed2/config.json").read_text())
    assert again == config
    backs = ["back.safetensors"]
    gguf = pytest.importorskip("gguf", reason="needs zeropoint[gguf]")
    ok("convert", "ours.safetensors", "m.gguf", "--architecture", "net")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader("m.gguf").tensors}
    assert kinds["fc.weight"] == "Q4_0"
    ok("convert", "m.gguf", "from_gguf.safetensors")
    backs.append("from_gguf.safetensors")
    expected = model.state_dict()
    for back in backs:
        state = zeropoint.load(back, Net()).state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items()), back


def test_what_is_lost_is_warned_about(folder: Path) -> None:
    pytest.importorskip("gguf", reason="needs zeropoint[gguf]")
    zeropoint.save(zeropoint.quantize(Net(), "int8-dynamic"), "ours.safetensors")
    assert "no GGUF type holds it" in fails("convert", "ours.safetensors", "m.gguf")
    result = run("convert", "ours.safetensors", "m.gguf", "--unfit", "floats")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["warning"] * 2
    assert "the dynamic activations of 'fc'" in lines[1]


def test_wrong_arguments(folder: Path) -> None:
    zeropoint.save(zeropoint.quantize(Net(), "int8-dynamic"), "ours.safetensors")
    assert "ours.safetensors is a checkpoint of zeropoint already" in fails(
        "convert", "ours.safetensors", "other.safetensors"
    )
    assert "OUT is IN" in fails("convert", "ours.safetensors", "ours.safetensors")
    assert "or be a folder" in fails("convert", "ours.safetensors", "x.bin", code=2)
    line = fails("convert", "ours.safetensors", "x.gguf", "--config", "a.json", code=2)
    assert "--config is for a folder" in line
    assert "there is no folder" in fails("convert", "ours.safetensors", "no/x.gguf")
    Path("full").mkdir()
    Path("full/a").touch()
    assert "no empty folder" in fails("convert", "ours.safetensors", "full")
    floats = {"w": torch.ones(2)}
    from safetensors.torch import save_file

    save_file(floats, "floats.safetensors")
    line = fails("convert", "floats.safetensors", "x.safetensors")
    assert "floats.safetensors has no quantization_config; read are awq" in line
    Path("config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    assert "has quant_method 'fp8'" in fails("convert", "floats.safetensors", "x.safetensors")
    assert "neither model.safetensors" in fails("convert", "full", "x.safetensors")
    assert not list(Path().glob("x.*"))
