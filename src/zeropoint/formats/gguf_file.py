"""The GGUF container, read with distrust: only what it says of its tensors.

The layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic ``GGUF``, version,
numbers of tensors and of key-value pairs, the pairs, an entry a tensor, padding, then the data. The
gguf package's own reader maps the file, so that one that is truncated while it is read kills the
process, and believes the lengths that it finds.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .container import CheckpointError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
MAX_HEADER_BYTES = 1 << 28
MAX_DIMENSIONS = 4
_MAX_KEPT = 1 << 16
"""Longer arrays, those of tokenizers, are skipped."""


@dataclass(frozen=True)
class GgufTensor:
    """An entry: GGML's number of its type, shape with the last axis the contiguous one, and where
    its data begins in the file."""

    name: str
    type: int
    shape: tuple[int, ...]
    begin: int


class GgufFile:
    """An open file whose header has been checked.

    Attributes:
        path: of the file.
        metadata: key → scalar or string, or list of such; long arrays left out.
        tensors: name → :class:`GgufTensor`.
    """

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self.path = path
        self._file = file
        self._bytes = os.fstat(file.fileno()).st_size
        self._header = _Header(path, file.read(min(self._bytes, MAX_HEADER_BYTES)), self._bytes)
        self.metadata, self.tensors = self._header.parse()
        del self._header

    def data(self, tensor: GgufTensor, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a tensor, in memory of their own.

        Raises:
            CheckpointError: the file is not so long.
        """
        if tensor.begin + nbytes > self._bytes:
            reason = (
                f"truncated: its data ends {tensor.begin + nbytes - self._bytes} bytes after it"
            )
            raise CheckpointError(self.path, reason, tensor=tensor.name)
        buffer = np.empty(nbytes, dtype=np.uint8)
        view = buffer.data
        self._file.seek(tensor.begin)
        while len(view):
            got = self._file.readinto(view)
            if not got:
                raise CheckpointError(self.path, "truncated while it was read", tensor=tensor.name)
            view = view[got:]
        return buffer


class _Header:
    def __init__(self, path: Path, data: bytes, file_bytes: int) -> None:
        self._path, self._data, self._file_bytes, self._at = path, data, file_bytes, 0

    def _fail(self, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(self._path, reason, tensor=tensor)

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise self._fail(f"truncated: its header goes beyond byte {len(self._data)}")
        taken, self._at = self._data[self._at : end], end
        return taken

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        raw = self._take(self._number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"a string that is not UTF-8: {raw[:40]!r}") from None

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._fail(f"a value of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            raw = self._take(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", raw)) if count <= _MAX_KEPT else None
        if inner != _STRING:
            raise self._fail(f"an array of the type {inner}")
        if count * 8 > len(self._data) - self._at:  # each has a length of 8 bytes
            raise self._fail(f"an array of {count} strings, which the header has no room for")
        strings = [self._string() for _ in range(count)]
        return strings if count <= _MAX_KEPT else None

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._take(4) != b"GGUF":
            raise self._fail("not a GGUF file: it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            raise self._fail(f"version {version} (versions 2 and 3, little-endian, can be read)")
        tensor_count, pair_count = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):  # each takes bytes, which run out
            key = self._string()
            if key in metadata:
                raise self._fail(f"the key {key[:60]!r} occurs twice")
            metadata[key] = self._value(self._number("I"))
        entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensor_count):
            name, dimensions = self._string(), self._number("I")
            if name in entries:
                raise self._fail("it occurs twice", name)
            if dimensions > MAX_DIMENSIONS:
                raise self._fail(f"{dimensions} dimensions, at most {MAX_DIMENSIONS}", name)
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            if math.prod(shape) >= 1 << 60:
                raise self._fail(f"its shape {shape} is too large", name)
            entries[name] = (self._number("I"), shape, self._number("Q"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._fail(f"general.alignment must be a power of two, got {alignment!r:.40}")
        data = -(-self._at // alignment) * alignment
        tensors = {}
        for name, (kind, shape, offset) in entries.items():
            if offset % alignment or data + offset > self._file_bytes:
                raise self._fail(f"its data cannot begin at {offset}", name)
            tensors[name] = GgufTensor(name, kind, shape, data + offset)
        return metadata, tensors


@contextmanager
def open_gguf(path: str | os.PathLike[str]) -> Iterator[GgufFile]:
    """Open a GGUF file and check its header.

    Raises:
        CheckpointError: it is none, damaged, big-endian or of another version.
        OSError: it cannot be opened or read.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(path, "not a regular file")
    with io.FileIO(path) as file:
        yield GgufFile(path, file)
