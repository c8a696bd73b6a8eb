"""``zeropoint rescue`` on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import zeropoint
from commands import fails, in_folder, ok, run, shell
from golden.make_torch_ao import FloatNet
from hostile import torch_files
from zeropoint.formats import torch_parity

__all__ = ["in_folder"]
pytestmark = pytest.mark.filterwarnings("ignore")
GOLDEN = Path(__file__).parent / "golden" / "torch_ao"


@pytest.fixture
def old(folder: Path) -> Path:
    for name in ("dynamic_state", "static_x86_state", "static_qnnpack_state"):
        shutil.copy(GOLDEN / f"{name}.pt", folder)
    return Path("dynamic_state.pt")


def test_dynamic(old: Path) -> None:
    out = ok("rescue", old, "new.safetensors", "--json", "report.json")
    assert "2 Linear layers from a state dict" in out
    assert "equal" in out
    assert "Wrote new.safetensors" in out
    report = json.loads(Path("report.json").read_text())
    assert report["version"] == 1
    assert report["ok"] is True
    assert [layer["name"] for layer in report["layers"]] == ["fc1", "fc2"]
    zeropoint.load("new.safetensors", FloatNet())


def test_static_needs_to_know_its_inputs(old: Path) -> None:
    line = fails("rescue", "static_x86_state.pt", "new.safetensors")
    assert "does not say what scale" in line
    assert not Path("new.safetensors").exists()
    Path("how.json").write_text('{"fc1": "quant", "*": "order"}')
    out = ok("rescue", "static_x86_state.pt", "new.safetensors", "--inputs", "how.json")
    assert "of quant, as given" in out
    assert "taken from the order of the file" in out
    assert zeropoint.inspect_checkpoint("new.safetensors").layers["fc2"].mode == "static"
    out = ok("rescue", "static_x86_state.pt", "new.safetensors", "--inputs", "dynamic")
    assert "on the fly" in out
    Path("how.json").write_text("[1]")
    assert "a JSON object" in fails("rescue", old, "new.safetensors", "--inputs", "how.json")
    line = fails("rescue", old, "new.safetensors", "--inputs", "sideways", code=2)
    assert "order, dynamic or a .json file" in line


def test_no_bias_and_key(old: Path) -> None:
    torch.save({"net": torch.load("static_qnnpack_state.pt"), "epoch": 1}, "old.pt")
    args = ("rescue", "old.pt", "new.safetensors", "--key", "net", "--inputs", "dynamic")
    assert "qnnpack" in ok(*args)
    assert "qnnpack" not in ok(*args, "--no-bias", "fc2")
    zeropoint.load("new.safetensors", FloatNet())


def test_not_what_torch_computes(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = torch_parity.ops.dynamic
    monkeypatch.setattr(torch_parity.ops, "dynamic", lambda *a: dynamic(*a) + 1)
    result = run("rescue", old, "new.safetensors")
    assert result.exit_code == 1
    assert "NOT THE SAME" in result.stdout
    assert result.stderr.startswith("warning: new.safetensors does not compute")
    assert "NOT THE SAME" not in ok("rescue", old, "new.safetensors", "--no-compare")


def test_file_that_would_run_code(old: Path) -> None:
    evil = torch_files.pickled(torch_files.Calls(torch_files.strike))
    Path("evil.pt").write_bytes(torch_files.archive(evil))
    line = fails("rescue", "evil.pt", "new.safetensors")
    assert "it was not run" in line
    assert not torch_files.MARK.exists()


def test_files_that_cannot_be_written(old: Path) -> None:
    assert "no folder" in fails("rescue", old, "nowhere/new.safetensors")
    assert "no folder" in fails("rescue", old, "new.safetensors", "--json", "nowhere/report.json")
    assert "No such file" in fails("rescue", "gone.pt", "new.safetensors")


def test_in_a_shell_nothing_but_the_table_is_printed(old: Path) -> None:
    """torch's warnings about what it deprecates are not ours to show."""
    done = shell("-m", "zeropoint", "rescue", old, "new.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
