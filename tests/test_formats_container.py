"""Files from outside: each is refused with a reason, whatever is in it, and the model is as it was;
and files of our own appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zeropoint
from bits import assert_same_bits
from checkpoints import QUANTIZED, fingerprint, float_zoo, join, quantized_zoo, save_bytes, sign
from checkpoints import split as split_file
from hostile.native_files import header_files, value_files
from zeropoint import CheckpointError, QuantizedLinear
from zeropoint.formats import container, native, writer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save_bytes(quantized_zoo(), tmp_path_factory.mktemp("good"))


def _good() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return save_bytes(quantized_zoo(), Path(folder))


HEADER_FILES = {name: (data, reason) for name, data, reason in header_files(_good())}
VALUE_FILES = {name: (data, reason) for name, data, reason in value_files(_good())}


@contextlib.contextmanager
def bounded_allocations(limit: int) -> Iterator[None]:
    """Fail where the reader asks for more memory than the file has bytes."""
    empty = torch.empty

    def checked(*sizes: int, **options: object) -> torch.Tensor:
        shape = sizes[0] if sizes and isinstance(sizes[0], tuple | list) else sizes
        assert math.prod(shape) <= limit, f"allocates {sizes} for a file of {limit} bytes"
        return empty(*sizes, **options)

    with mock.patch.object(container.torch, "empty", checked):
        yield


def refuse(path: Path, data: bytes, model: nn.Module) -> CheckpointError:
    """Load ``data`` into the model; returns the refusal, having checked that nothing changed."""
    path.write_bytes(data)
    before = fingerprint(model)
    with pytest.raises(CheckpointError) as caught:
        zeropoint.load(path, model)
    assert fingerprint(model) == before, "the model was changed by a file that was refused"
    assert str(path) in str(caught.value)
    assert caught.value.path == path
    return caught.value


def test_the_good_file_is_good(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(good)
    assert set(zeropoint.inspect_checkpoint(path).layers) == set(QUANTIZED)
    zeropoint.load(path, float_zoo())
    head, data = split_file(good)
    path.write_bytes(join(sign(head, data), data))  # what the hostile files are made with
    zeropoint.load(path, float_zoo())


@pytest.mark.parametrize("name", HEADER_FILES)
def test_hostile_header(name: str, tmp_path: Path) -> None:
    data, reason = HEADER_FILES[name]
    error = refuse(tmp_path / name, data, float_zoo())
    assert len(str(error)) < 1000
    with pytest.raises(CheckpointError, match=reason):
        zeropoint.inspect_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match=reason):
        raise error


@pytest.mark.parametrize("name", VALUE_FILES)
def test_hostile_values(name: str, tmp_path: Path) -> None:
    data, reason = VALUE_FILES[name]
    error = refuse(tmp_path / name, data, float_zoo())
    with pytest.raises(CheckpointError, match=reason):
        raise error
    assert name == "bool_of_2" or error.layer in QUANTIZED


@given(st.data())
def test_altered_bytes(good: bytes, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """Any flip, cut, insertion, removal or copy anywhere is refused."""
    # Most bytes are header; half of the draws go to where the structure is densest.
    length = 8 + int.from_bytes(good[:8], "little")
    at = data.draw(st.one_of(st.integers(0, length), st.integers(0, len(good) - 1)))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "copy", "number"]))
    if kind == "flip":
        bad = bytearray(good)
        bad[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        bad = good[:at]
    elif kind == "insert":
        bad = good[:at] + data.draw(st.binary(min_size=1, max_size=16)) + good[at:]
    elif kind == "remove":
        bad = good[:at] + good[at + data.draw(st.integers(1, 64)) :]
    elif kind == "copy":
        bad = good[:at] + good[at : at + data.draw(st.integers(1, 256))] + good[at:]
    else:
        bad = good[: at - 1] + data.draw(st.sampled_from([b"9", b"-", b"e", b'"'])) + good[at:]
    bad = bytes(bad)
    if bad == good:
        return
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    with bounded_allocations(len(bad)):
        refuse(path, bad, FUZZED)
        with pytest.raises(CheckpointError):
            zeropoint.inspect_checkpoint(path)
    path.unlink()


FUZZED = float_zoo()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.data())
def test_altered_structure(good: bytes, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """Any value of the header removed or replaced by any other, under a digest made right again, is
    refused, or loads as if nothing had happened (a tie is left out that the model has anyway)."""
    head, body = split_file(good)
    for key in ("layers", "aliases", "sha256"):
        head["__metadata__"][key] = json.loads(head["__metadata__"][key])
    places = list(_places(head))
    parent, key = data.draw(st.sampled_from(places))
    if data.draw(st.booleans()):
        parent[key] = data.draw(JSON)
    else:
        del parent[key]
    metadata = head.get("__metadata__")
    if isinstance(metadata, dict):
        for key in ("layers", "aliases", "sha256"):
            if key in metadata and not isinstance(metadata[key], str):
                metadata[key] = json.dumps(metadata[key])
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            head = sign(head)
    path = tmp_path_factory.mktemp("fuzz") / "x"
    path.write_bytes(join(head, body))
    model = float_zoo(1)
    before = fingerprint(model)
    with bounded_allocations(path.stat().st_size):
        try:
            zeropoint.load(path, model)
        except CheckpointError:
            assert fingerprint(model) == before
            return
    for name, value in quantized_zoo().state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)


def _places(value):
    """Every ``(container, key)`` within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if key == "digest":
            continue  # made right again
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


@given(st.binary(max_size=200))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x"
    for content in (data, len(data).to_bytes(8, "little") + data, join(b"{" + data + b"}", b"")):
        refuse(path, content, FUZZED)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_wait_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        zeropoint.load(tmp_path / "pipe", float_zoo())


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device_does_not_read_for_ever() -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        zeropoint.inspect_checkpoint("/dev/zero")


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        zeropoint.load(tmp_path, float_zoo())
    with pytest.raises(FileNotFoundError):
        zeropoint.load(tmp_path / "none", float_zoo())


def test_truncated_while_it_is_read(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(good)
    with container.open_reader(path) as reader:
        os.truncate(path, len(good) - 1)
        last = list(reader.tensors)[-1]
        with pytest.raises(CheckpointError, match="truncated while it was read"):
            list(reader.chunks(last))


def test_error_survives_pickling_and_is_a_value_error() -> None:
    error = CheckpointError("a/b", "why", "layer", "tensor")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == f"{Path('a/b')}: layer 'layer': tensor 'tensor': why"
    assert isinstance(copy, ValueError)


# Writing


def layer() -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(4, 3))


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_the_old_file_and_no_other(
    failing: str, existing: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    if existing:
        path.write_bytes(b"old")
    calls = {
        "write": (writer.Writer, "write"),
        "fsync": (writer.os, "fsync"),
        "rename": (Path, "replace"),
    }
    owner, name = calls[failing]
    with (
        mock.patch.object(owner, name, side_effect=OSError(28, "No space left on device")) as call,
        pytest.raises(OSError, match="No space left"),
    ):
        zeropoint.save(layer(), path)
    assert call.called
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or path.read_bytes() == b"old"


def test_synced_before_it_takes_its_name(tmp_path: Path) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    path = tmp_path / "x"

    def spy_fsync(descriptor: int) -> None:
        events.append("fsync")
        fsync(descriptor)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        assert self.parent == target.parent, "a rename across file systems is no rename"
        zeropoint.load(self, nn.Linear(4, 3))  # complete already
        return replace(self, target)

    with (
        mock.patch.object(writer.os, "fsync", spy_fsync),
        mock.patch.object(Path, "replace", spy_replace),
    ):
        zeropoint.save(layer(), path)
    assert events[:2] == ["fsync", "rename"]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_of_a_normal_file(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        zeropoint.save(layer(), tmp_path / "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_overwriting_keeps_permissions_and_links(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    zeropoint.save(layer(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    zeropoint.load(tmp_path / "real", nn.Linear(4, 3))


def test_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    zeropoint.save(layer(), tmp_path / ("x" * 255))


def test_writing_too_little_or_too_much(tmp_path: Path) -> None:
    entries = [("a", "U8", (3,))]
    for data in (b"12", b"1234"):
        with (
            pytest.raises(ValueError, match="a: "),
            writer.open_writer(tmp_path / "x", entries, lambda infos, sha256: {}) as w,
        ):
            w.write("a", data)
    assert not list(tmp_path.iterdir())


def test_same_model_same_bytes(tmp_path: Path, good: bytes) -> None:
    assert save_bytes(quantized_zoo(), tmp_path) == good


def test_tensors_are_aligned(good: bytes) -> None:
    head, _ = split_file(good)
    assert (len(good) - len(split_file(good)[1])) % 8 == 0
    for name, entry in head.items():
        if name != "__metadata__":
            width = container.DTYPES[entry["dtype"]].itemsize
            assert entry["data_offsets"][0] % width == 0, name


def test_names_in_every_script(tmp_path: Path) -> None:
    model = nn.Module()
    model.add_module('层 "\\\n\u2028😀', nn.Linear(2, 2))
    quantized = zeropoint.quantize(model)
    zeropoint.save(quantized, tmp_path / "x", metadata={"ключ": "ä\0"})
    assert native.inspect(tmp_path / "x").metadata == {"ключ": "ä\0"}
    zeropoint.load(tmp_path / "x", model)
    model.add_module("\ud800", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="not valid Unicode"):
        zeropoint.save(model, tmp_path / "y")
