"""Files of torch's that lie, are damaged or try to run code: refused, by name, with no effect."""

from __future__ import annotations

import io
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import torch_files
from zeropoint.formats import inert_pickle, torch_ao
from zeropoint.formats.torch_ao import CheckpointError, TorchState

GOLDEN = Path(__file__).parent / "golden" / "torch_ao"
FILES = list(torch_files.files())


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_files_would_strike() -> None:
    """Else the tests below would prove nothing."""
    import pickle

    data = next(data for name, data, _ in FILES if name == "calls_in_a_stream_of_its_own")
    pickle.loads(data)
    assert torch_files.MARK.exists()


@pytest.mark.parametrize(("name", "data", "reason"), FILES, ids=[name for name, *_ in FILES])
def test_hostile_file_is_refused_with_its_reason(name: str, data: bytes, reason: str) -> None:
    path = Path("old.pt")
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as refused:
        torch_ao.read(path)
    assert re.search(reason, str(refused.value)), str(refused.value)
    assert refused.value.path == path
    assert not torch_files.MARK.exists()
    with pytest.raises(CheckpointError):
        torch_ao.rescue(path, "new.safetensors", inputs="dynamic")
    assert not torch_files.MARK.exists()
    assert [p.name for p in Path().iterdir()] == ["old.pt"]


def test_a_model_of_classes_that_run_code_is_read_without_making_them() -> None:
    """Whole models name classes of their own; none is imported, made or given its state."""
    evil = object.__new__(torch_files.Evil)
    evil.__dict__ |= {"_modules": {}, "_parameters": {"a": torch_files.tensor()}, "_buffers": {}}
    path = Path("old.pt")
    path.write_bytes(torch_files.with_storage(evil))
    state = torch_ao.read(path)
    assert state.kind == "model"
    assert list(state.tensors) == ["a"]
    assert not torch_files.MARK.exists()


def test_not_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        torch_ao.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        torch_ao.read(tmp_path / "nothing.pt")


def _refused_or_read(path: Path) -> None:
    with suppress(CheckpointError):
        assert isinstance(torch_ao.read(path), TorchState)


golden = st.sampled_from(sorted(path.name for path in GOLDEN.glob("*.pt")))
edits = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "insert"]), st.binary(max_size=4)),
    max_size=6,
)


def _edited(data: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    for where, what, new in changes:
        at = int(where * len(data))
        data = data[:at] + new + data[at + {"set": len(new), "cut": 9, "insert": 0}[what] :]
    return data


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=golden, changes=edits)
def test_damaged_file_is_refused_or_read(
    name: str, changes: list[tuple[float, str, bytes]]
) -> None:
    path = Path("damaged.pt")
    path.write_bytes(_edited((GOLDEN / name).read_bytes(), changes))
    _refused_or_read(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=golden, changes=edits)
def test_damaged_pickle_in_a_sound_zip(name: str, changes: list[tuple[float, str, bytes]]) -> None:
    """A zip file's checksums would hide most of what lies behind them."""
    with zipfile.ZipFile(io.BytesIO(_a_zip(name))) as old:
        records = {n.partition("/")[2]: old.read(n) for n in old.namelist()}
    path = Path("damaged.pt")
    path.write_bytes(torch_files.archive(_edited(records.pop("data.pkl"), changes), records))
    _refused_or_read(path)


def _a_zip(name: str) -> bytes:
    data = (GOLDEN / name).read_bytes()
    return data if data[:2] == b"PK" else (GOLDEN / "dynamic_state.pt").read_bytes()


@settings(max_examples=200)
@given(data=st.binary(max_size=60))
def test_any_bytes_for_a_pickle(data: bytes) -> None:
    with suppress(inert_pickle.PickleError):
        inert_pickle.read(io.BytesIO(b"\x80\x02" + data), lambda name: True)
