"""Malformed files of every format: refused with a reason, nothing written, nothing run."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import zeropoint
from bits import assert_same_bits
from checkpoints import fingerprint, join, save_bytes, sign, split
from commands import fails, in_folder, ok  # noqa: F401  (a fixture)
from hostile import folder_files
from test_formats_gguf import HOSTILE as GGUF
from test_formats_gptq_awq import Case
from zeropoint import LayerRecipe, Recipe, int4
from zeropoint.formats import awq, compressed_tensors, gptq
from zeropoint.formats.container import CheckpointError


def compressed(folder: Path) -> Path:
    torch.manual_seed(0)
    model = zeropoint.quantize(nn.Sequential(nn.Linear(64, 32)), "int8-dynamic")
    compressed_tensors.write(model, folder)
    return folder


MAKERS: dict[str, tuple[Any, Callable[[Path], Path]]] = {
    "compressed-tensors": (compressed_tensors, compressed),
    "gptq": (gptq, lambda folder: Case(4, lowest=1).gptq(folder)),
    "awq": (awq, lambda folder: Case(4, lowest=1).awq(folder)),
}


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }


def test_the_pickle_would_strike(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    pickle.loads(pickle.dumps(folder_files.Strike()))
    assert folder_files.MARK.exists()


@pytest.mark.parametrize("kind", MAKERS)
def test_the_good_folder_is_converted(kind: str, tmp_path: Path) -> None:
    ok("convert", MAKERS[kind][1](tmp_path / "in"), "out.safetensors")
    zeropoint.inspect_checkpoint("out.safetensors")


@pytest.mark.parametrize("case", folder_files.FOLDERS)
@pytest.mark.parametrize("kind", MAKERS)
def test_hostile_folder_is_refused_and_leaves_no_trace(
    kind: str, case: str, tmp_path: Path
) -> None:
    module, make = MAKERS[kind]
    damage, reason = folder_files.FOLDERS[case]
    folder = make(tmp_path / "in")
    damage(folder)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        module.read(folder)
    assert re.search(reason, str(refused.value)), str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "error: " in fails("convert", folder, "out.safetensors")
    assert contents(tmp_path) == before
    assert not folder_files.MARK.exists()


@pytest.mark.parametrize("case", GGUF)
def test_hostile_gguf_file_leaves_no_trace(case: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "bad.gguf"
    path.write_bytes(GGUF[case][0])
    before = contents(tmp_path)
    for out in ("out.safetensors", "out_folder"):
        assert str(path) in fails("convert", path, out)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", [*MAKERS, "native"])
def test_a_file_that_was_there_stays_when_the_source_is_refused(kind: str, tmp_path: Path) -> None:
    if kind == "native":
        source = tmp_path / "in.safetensors"
        source.write_bytes(b"\xff" * 100)
        out = "out.gguf"
    else:
        source, out = MAKERS[kind][1](tmp_path / "in"), "out.safetensors"
        folder_files.FOLDERS["truncated"][0](source)
    Path(out).write_bytes(b"precious")
    before = contents(tmp_path)
    fails("convert", source, out)
    assert contents(tmp_path) == before


# Checkpoints of zeropoint's with tables and packed weights: entries that hypothesis makes up

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**66), 2**66) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)
NEAR = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, True, "float32", "bfloat16", "embedding", None])


def with_tables() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"table": nn.Embedding(5, 6), "linear": nn.Linear(6, 5, bias=False)})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    recipe = Recipe(LayerRecipe("weight-only", int4(4)), embeddings=int4(4))
    return save_bytes(zeropoint.quantize(with_tables(), recipe), tmp_path_factory.mktemp("good"))


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_entry_is_refused_or_loads_the_same(data: st.DataObject, checkpoint: bytes) -> None:
    head, body = split(checkpoint)
    layers = json.loads(head["__metadata__"]["layers"])
    entry = layers[data.draw(st.sampled_from(sorted(layers)))]
    at = entry["weight"] if data.draw(st.booleans()) else entry
    key = data.draw(st.sampled_from([*sorted(at), "kind", "more"]))
    if data.draw(st.booleans()):
        at[key] = data.draw(NEAR | VALUES)
    else:
        at.pop(key, None)
    head["__metadata__"]["layers"] = json.dumps(layers)
    path = Path("made_up.safetensors")
    path.write_bytes(join(sign(head), body))
    model = with_tables()
    before = fingerprint(model)
    try:
        zeropoint.load(path, model)
    except CheckpointError:
        assert fingerprint(model) == before
        return
    good = Path("good.safetensors")
    good.write_bytes(checkpoint)
    expected = zeropoint.load(good, with_tables()).state_dict()
    for name, value in model.state_dict().items():
        assert_same_bits(value, expected[name], name)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(at=st.integers(0, 1 << 20), flip=st.integers(0, 255), cut=st.booleans())
def test_any_damage_to_a_checkpoint_is_refused(
    at: int, flip: int, cut: bool, checkpoint: bytes
) -> None:
    at %= len(checkpoint)
    bad = bytearray(checkpoint[:at] if cut else checkpoint)
    if not cut:
        bad[at] ^= flip
    path = Path("damaged.safetensors")
    path.write_bytes(bytes(bad))
    model = with_tables()
    before = fingerprint(model)
    if bytes(bad) == checkpoint:
        return
    with pytest.raises(CheckpointError):
        zeropoint.load(path, model)
    assert fingerprint(model) == before
