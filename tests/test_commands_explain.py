"""``zeropoint explain``: numbers that look like options, layers of models and of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from commands import fails, in_folder, ok
from zeropoint import CheckpointError
from zeropoint import inspect_checkpoint as inspect
from zeropoint.formats.one_layer import load_layer

__all__ = ["in_folder"]  # a fixture: used by being here


def test_numbers_on_the_command_line() -> None:
    text = ok("explain", -1.0, 0, 2.5, "--bits", 8, "--scale", 0.5, "--zero-point", 10)
    rows = [row.split() for row in text.splitlines()]
    assert ["a", "−1", "8", "8", "−1", "0", "0.25"] in rows
    assert ["c", "2.5", "15", "15", "2.5", "0", "0.25"] in rows
    assert "coarser" in text
    assert "exactly 0" in text


def test_files() -> None:
    ok("explain", "-1e-3", "-.5", "1", "--json", "e.json", "--plot", "e.svg", "--signed")
    data = json.loads(Path("e.json").read_text("utf-8"))
    assert data["spec"]["signed"]
    assert [v["real"] for v in data["values"]] == pytest.approx([-1e-3, -0.5, 1])
    assert Path("e.svg").stat().st_size > 1000


def test_layer_of_a_model_and_of_its_checkpoint() -> None:
    static = ("--to", "int8-static", "--calibrate", "data.npy")
    ok("quantize", "zp_nets:small", *static, "-o", "q.safetensors")
    ok("explain", "--model", "zp_nets:small", "--layer", "2", "--json", "a.json")
    ok("explain", "--model", "q.safetensors", "--layer", "2", "--json", "b.json")
    a, b = (json.loads(Path(f"{n}.json").read_text("utf-8")) for n in "ab")
    assert a["grid"] == b["grid"]
    assert a["shape"] == b["shape"] == [4, 16]
    assert {v["error"] for v in b["values"]} == {None}
    ok("explain", "--model", "zp_nets:small", "--layer", "2", "--per-tensor", "--json", "c.json")
    assert json.loads(Path("c.json").read_text("utf-8"))["grids"] == 1
    groups = ("--bits", 4, "--group-size", 8, "--group", 1)
    ok("explain", "--model", "zp_nets:small", "--layer", "2", *groups, "--json", "d.json")
    d = json.loads(Path("d.json").read_text("utf-8"))
    assert (d["grids"], d["grid"]["qmax"], d["grid"]["label"][-7:]) == (8, 15, "group 1")
    assert "'2'" in fails("explain", "--model", "q.safetensors", "--layer", "1")
    assert "0, 2" in fails("explain", "--model", "zp_nets:small", "--layer", "1")


def test_damaged_layer_is_refused() -> None:
    ok("quantize", "zp_nets:small", "--to", "int8-dynamic", "-o", "q.safetensors")
    data = bytearray(Path("q.safetensors").read_bytes())
    at = 8 + int.from_bytes(data[:8], "little")  # where the data begins, after the header
    data[at + inspect("q.safetensors").tensors["2.weight"].begin] ^= 1
    Path("q.safetensors").write_bytes(data)
    assert load_layer("q.safetensors", "0").in_features == 8
    with pytest.raises(CheckpointError, match=r"2\.weight"):
        load_layer("q.safetensors", "2")
    save_file(load_file("q.safetensors"), "plain.safetensors")
    fails("explain", "--model", "plain.safetensors", "--layer", "0")


@pytest.mark.parametrize(
    "line",
    [
        ["1", "--nonsense"],
        ["1", "two"],
        ["1", "--model", "zp_nets:small", "--layer", "0"],
        ["--model", "zp_nets:small"],
        ["1", "--layer", "0"],
        ["1", "--per-tensor", "--group-size", "2"],
        ["--bits", "8"],
    ],
)
def test_wrong_usage(line: list[str]) -> None:
    fails("explain", *line, code=2)


@pytest.mark.parametrize("line", [["nan"], ["1", "--zero-point", "3"], ["1", "--plot", "no/p.png"]])
def test_wrong_values(line: list[str]) -> None:
    fails("explain", *line)
