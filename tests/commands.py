"""What the tests of the command line share: a folder with models and data, ways to run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import zeropoint
from zeropoint import cli

RUNNER = CliRunner()
NETS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

def without_linear():
    return nn.Sequential(nn.Conv1d(1, 1, 1))

def broken():
    raise RuntimeError("cannot\\nbe made")

def crashing():
    raise KeyError("gone")
"""


@pytest.fixture(autouse=True, name="folder")
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("zp_nets.py").write_text(NETS)
    monkeypatch.delitem(sys.modules, "zp_nets", raising=False)
    np.save("data.npy", np.random.default_rng(0).normal(size=(40, 8)))
    return tmp_path


def run(*args: Any) -> Any:
    return RUNNER.invoke(cli.app, [str(arg) for arg in args], prog_name="zeropoint")


def ok(*args: Any) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*args: Any, code: int = 1) -> str:
    """The one line on stderr."""
    result = run(*args)
    assert result.exit_code == code, (result.exit_code, result.output)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def shell(*args: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    source = Path(zeropoint.__file__).parent.parent
    path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", **environment},
        timeout=120,
    )
