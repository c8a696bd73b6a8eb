"""``zeropoint search`` finds a recipe that ``quantize`` takes, or says that there is none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import zeropoint
from commands import fails, ok
from commands import in_folder as in_folder  # the fixture


@pytest.fixture(autouse=True)
def _data(folder: Path) -> None:
    np.save("data.npy", np.random.default_rng(0).normal(size=(200, 8)))


def test_from_a_budget_to_a_checkpoint() -> None:
    told = ok(
        *("search", "zp_nets:small", "--data", "data.npy", "--max-drop", 1e-3),
        *("--out", "recipe.json", "--json", "front.json", "--choices", "int8-dynamic"),
    )
    assert told.startswith("Sequential keeps a drop of at most 0.001 at")
    assert "Wrote recipe.json, for zeropoint quantize zp_nets:small --to recipe.json." in told
    front = zeropoint.Front.from_dict(json.loads(Path("front.json").read_text()))
    assert front.chosen is not None
    assert json.loads(Path("recipe.json").read_text()) == front.recipe.to_dict()
    told = ok("quantize", "zp_nets:small", "--to", "recipe.json", "--out", "q.safetensors")
    assert "quantized 2 of 2 Linear layers" in told


def test_sizes_and_times_have_units() -> None:
    told = ok(
        *("search", "zp_nets:small", "--data", "data.npy", "--max-bytes", "0.5 kB"),
        *("--choices", "int8-dynamic,int8-weight-only"),
    )
    assert "keeps at most 500 bytes" in told
    for option, value in (("--max-bytes", "5 ms"), ("--max-latency", "1kB"), ("--max-bytes", "x")):
        told = fails("search", "zp_nets:small", "--data", "data.npy", option, value, code=2)
        assert f"{option} takes a number such as" in told


def test_no_point_is_an_error_with_what_comes_nearest() -> None:
    told = fails(
        *("search", "zp_nets:small", "--data", "data.npy", "--max-bytes", 10),
        *("--out", "recipe.json", "--choices", "int8-dynamic"),
    )
    assert "No point keeps at most 10 bytes. The most careful one has" in told
    assert not Path("recipe.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "recipe.json"], "--out needs a budget"),
        (["--out", "recipe.txt", "--max-drop", "0.1"], "--out must end in .json"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    told = fails("search", "zp_nets:small", "--data", "data.npy", *arguments, code=2)
    assert message in told


def test_unknown_choice() -> None:
    told = fails(
        "search", "zp_nets:small", "--data", "data.npy", "--max-drop", 1, "--choices", "int7"
    )
    assert "recipe must be one of" in told
