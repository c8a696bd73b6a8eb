"""``zeropoint convert`` to ONNX on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import zeropoint
from commands import fails, in_folder, ok, run
from onnx_files import run as run_onnx
from onnx_files import tensors

__all__ = ["in_folder"]
pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of its own parts
NETS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

class Unseen(nn.Linear):
    def forward(self, x):
        return super().forward(x) if bool((x > 0).any()) else x

def unseen():
    return nn.Sequential(Unseen(8, 8), nn.Linear(8, 4))
"""
ARGUMENTS = ("q.safetensors", "q.onnx", "--model", "zp_nets:small", "--data", "data.npy")


def checkpoint(model: str = "small") -> torch.nn.Module:
    Path("zp_nets.py").write_text(NETS)
    scope: dict = {}
    exec(NETS, scope)
    quantized = zeropoint.quantize(
        scope[model](), "int8-dynamic", exclude=["0"] * (model != "small")
    )
    zeropoint.save(quantized, "q.safetensors")
    return quantized.eval()


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_checkpoint_with_its_model_and_inputs(suffix: str, folder: Path) -> None:
    model = checkpoint()
    np.savez("data.npz", input=np.load("data.npy")[:1])  # a row alone, by the argument's name
    out = ok("convert", *ARGUMENTS[:-1], f"data.{suffix}")
    assert "Wrote q.onnx: " in out
    x = torch.randn(7, 8)
    assert torch.equal(run_onnx(Path("q.onnx"), x)[0], model(x))
    assert [s for kind, s in tensors(Path("q.onnx")).values() if kind == "INT8"] == [
        (8, 16),
        (16, 4),
    ]


def test_standard_operators_and_what_is_left(folder: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    spec = zeropoint.QuantSpec(3, False, False, zeropoint.PerGroup(4))
    quantized = zeropoint.quantize(model, zeropoint.LayerRecipe("weight-only", spec))
    zeropoint.save(quantized, "q.safetensors")
    result = run("convert", *ARGUMENTS, "--operators", "standard")
    assert result.exit_code == 0, result.output
    assert "warning: left behind: the width of '0.weight': its integers of 3 bits take 4" in (
        result.stderr
    )
    assert "operators must be" in fails("convert", *ARGUMENTS, "--operators", "qdq")


def test_what_is_missing_or_too_much(folder: Path) -> None:
    checkpoint()
    needs = "--model and --data are for FILE.onnx, which needs both"
    for arguments in (ARGUMENTS[:2], ARGUMENTS[:4], (*ARGUMENTS[:1], "q.gguf", *ARGUMENTS[2:])):
        result = run("convert", *arguments)
        assert result.exit_code == 2
        assert needs in " ".join(result.stderr.replace("│", " ").split())
    assert not Path("q.onnx").exists()
    Path("float.safetensors").write_bytes(b"no checkpoint")
    assert "float.safetensors" in fails("convert", "float.safetensors", *ARGUMENTS[1:])


def test_a_model_that_torch_cannot_export(folder: Path) -> None:
    checkpoint("unseen")
    result = run("convert", *ARGUMENTS[:3], "zp_nets:unseen", *ARGUMENTS[4:])
    assert result.exit_code == 1
    assert "error: torch cannot export zp_nets:unseen: " in result.stderr
    assert not Path("q.onnx").exists()
