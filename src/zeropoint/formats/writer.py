"""The safetensors container, written a piece at a time, atomically, with bounded memory."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .container import (
    CHUNK_BYTES,
    DTYPES,
    MAX_HEADER_BYTES,
    CheckpointError,
    TensorInfo,
    require_little_endian,
)

_PLACEHOLDER = "0" * 64


class Writer:
    """Takes each tensor's bytes in order, tensors in any order; made by :func:`open_writer`."""

    def __init__(self, file: io.FileIO, infos: dict[str, TensorInfo], data: int) -> None:
        self._file = file
        self._infos = infos
        self._data = data
        self._at = dict.fromkeys(infos, 0)
        self._sha256 = {name: hashlib.sha256() for name in infos}

    def write(self, name: str, data: bytes) -> None:
        """Append ``data`` to the tensor's bytes."""
        info, at = self._infos[name], self._at[name]
        if at + len(data) > info.nbytes:
            raise ValueError(f"{name}: more than the {info.nbytes} bytes announced")
        self._file.seek(self._data + info.begin + at)
        _write_all(self._file, data)
        self._sha256[name].update(data)
        self._at[name] = at + len(data)

    def write_tensor(self, name: str, tensor: Tensor) -> None:
        """Append a tensor's bytes. Another thread may be changing the tensor: each piece is copied
        once, so that the checksum is that of what was written."""
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        view = flat.view(torch.uint8).numpy().data
        for at in range(0, len(view), CHUNK_BYTES):
            self.write(name, bytes(view[at : at + CHUNK_BYTES]))

    def _finish(self) -> dict[str, str]:
        for name, info in self._infos.items():
            if self._at[name] != info.nbytes:
                raise ValueError(f"{name}: {self._at[name]} of {info.nbytes} bytes were written")
        return {name: digest.hexdigest() for name, digest in self._sha256.items()}


@contextmanager
def open_writer(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, str, Sequence[int]]],
    metadata: Callable[[dict[str, TensorInfo], dict[str, str]], dict[str, str]],
) -> Iterator[Writer]:
    """Write a safetensors file atomically, its data piece by piece.

    Args:
        path: of the file, which appears complete or not at all.
        tensors: ``(name, safetensors dtype, shape)`` of each; laid out by falling size of their
            elements, then by name, so that all are aligned.
        metadata: given the entries and each tensor's SHA-256, returns ``__metadata__``. Called
            twice, first with SHA-256s of zeros to learn the length of the header.

    Raises:
        CheckpointError: the header cannot be written.
        OSError: the file system's.
    """
    path = Path(path)
    require_little_endian(path)
    ordered = sorted(tensors, key=lambda t: (-DTYPES[t[1]].itemsize, t[0]))
    infos: dict[str, TensorInfo] = {}
    at = 0
    for name, dtype, shape in ordered:
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        infos[name] = TensorInfo(name, dtype, tuple(shape), at, end)
        at = end
    zeros = dict.fromkeys(infos, _PLACEHOLDER)
    reserved = _encode(path, infos, metadata(infos, zeros))
    with _atomic(path) as file:
        writer = Writer(file, infos, len(reserved))
        yield writer
        header = _encode(path, infos, metadata(infos, writer._finish()))
        assert len(header) == len(reserved)
        file.seek(0)
        _write_all(file, header)


def _encode(path: Path, infos: dict[str, TensorInfo], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    for info in infos.values():
        if info.name == "__metadata__":
            raise CheckpointError(path, "safetensors keeps this name for itself", tensor=info.name)
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.begin, info.end],
        }
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(path, f"a name is not valid Unicode: {error}") from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            path, f"a header of {len(text)} bytes, the limit is {MAX_HEADER_BYTES}"
        )
    return len(text).to_bytes(8, "little") + text


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


@contextmanager
def _atomic(path: Path) -> Iterator[io.FileIO]:
    """A file that takes its name when the block ends well, and vanishes when it does not."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.parent / f".zeropoint-{secrets.token_hex(8)}.tmp"
    # The kernel applies the umask, as to any new file; tempfile would leave it private.
    file = os.open(
        temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666
    )
    try:
        with io.FileIO(file, "r+") as raw:
            if target.exists() and hasattr(os, "fchmod"):
                os.fchmod(file, stat.S_IMODE(target.stat().st_mode))
            yield raw
            os.fsync(file)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    """Make the new name durable, where directories can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
