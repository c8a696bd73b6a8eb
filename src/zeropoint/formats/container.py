"""The safetensors container, read with distrust a piece at a time.

The layout (https://huggingface.co/docs/safetensors) is 8 bytes of header length, little-endian, a
JSON header, then the tensors' bytes. The safetensors package's own writer wants every tensor in
memory at once, and its reader maps the file, so that a file truncated while it is read kills the
process (SIGBUS); hence this reader and the writer in :mod:`.writer`. Each reads the other's files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

MAX_HEADER_BYTES = 100_000_000
"""The longest header, as in the safetensors package."""

CHUNK_BYTES = 4 << 20
"""Bytes read, hashed and written at a time."""

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class CheckpointError(ValueError):
    """A checkpoint that is refused, or a model that cannot be saved as one.

    Attributes:
        path: the file.
        reason: what is wrong with it.
        layer, tensor: where in it, or ``None``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        reason: str,
        layer: str | None = None,
        tensor: str | None = None,
    ) -> None:
        super().__init__(path, reason, layer, tensor)
        self.path, self.reason, self.layer, self.tensor = Path(path), reason, layer, tensor

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer!r}: "
        where += "" if self.tensor is None else f"tensor {self.tensor!r}: "
        return f"{self.path}: {where}{self.reason}"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in the header: safetensors dtype name, shape, bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def dtype_name(dtype: torch.dtype) -> str | None:
    """The safetensors name of a torch dtype, or ``None`` if it has none."""
    return _NAMES.get(dtype)


def progress_bar(what: str, total_bytes: int, show: bool) -> tqdm:
    """A bar of bytes that appears after two seconds, on a terminal."""
    return tqdm(
        desc=what,
        total=total_bytes,
        unit="B",
        unit_scale=True,
        delay=2.0,
        disable=None if show else True,
    )


def parse_json(text: str) -> Any:
    """JSON without what JSON parsers disagree on: duplicate keys, NaN, fractions, huge integers.

    Raises:
        ValueError: for these, for anything malformed, and for nesting too deep to read.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} occurs twice")
        return result

    def integer(digits: str) -> int:
        if len(digits) > 19:
            raise ValueError(f"an integer of {len(digits)} digits")
        return int(digits)

    def refuse(literal: str) -> Any:
        raise ValueError(f"{literal[:40]} is not an integer")

    try:
        return json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=refuse,
            parse_constant=refuse,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


class Reader:
    """An open safetensors file whose header has been checked.

    Attributes:
        path, file_bytes: where it is and how long.
        tensors: name → :class:`TensorInfo`, in the order of the data.
        metadata: the strings of ``__metadata__``.
    """

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self.path = path
        self._file = file
        self.file_bytes = os.fstat(file.fileno()).st_size
        header = self._header()
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        self.tensors = self._infos(header)

    def _fail(self, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(self.path, reason, tensor=tensor)

    def _header(self) -> dict[str, Any]:
        if self.file_bytes < 8:
            raise self._fail(f"truncated: {self.file_bytes} bytes, no room for the header's length")
        length = int.from_bytes(self._read(0, 8), "little")
        if length > MAX_HEADER_BYTES:
            raise self._fail(
                f"not a safetensors file: its first 8 bytes claim a header of {length} bytes, the "
                f"limit is {MAX_HEADER_BYTES}"
            )
        if 8 + length > self.file_bytes:
            raise self._fail(
                f"truncated: a header of {length} bytes in a file of {self.file_bytes} bytes"
            )
        self._data = 8 + length
        raw = self._read(8, length)
        if not raw.startswith(b"{"):
            raise self._fail("not a safetensors file: the header does not begin with '{'")
        try:
            text = raw.decode("utf-8").rstrip(" ")
            if not text.endswith("}"):
                raise ValueError("it does not end with '}' and spaces")
            header = parse_json(text)
        except ValueError as error:
            raise self._fail(f"the header is not valid JSON: {error}") from None
        assert isinstance(header, dict)  # it begins with '{'
        return header

    def _metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fail("__metadata__ must map strings to strings")
        return metadata

    def _infos(self, header: dict[str, Any]) -> dict[str, TensorInfo]:
        infos = [self._info(name, entry) for name, entry in header.items()]
        infos.sort(key=lambda i: (i.begin, i.end))
        at = 0
        for info in infos:
            if info.begin != at:
                raise self._fail(
                    f"its data begins at byte {info.begin}, expected {at}: tensors must follow "
                    "each other without holes or overlaps",
                    info.name,
                )
            at = info.end
        data_bytes = self.file_bytes - self._data
        if at > data_bytes:
            raise self._fail(
                f"truncated: the data ends after {data_bytes} of {at} bytes",
                next(i.name for i in infos if i.end > data_bytes),
            )
        if at < data_bytes:
            raise self._fail(f"{data_bytes - at} bytes follow the last tensor")
        return {info.name: info for info in infos}

    def _info(self, name: str, entry: Any) -> TensorInfo:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._fail("its entry must have dtype, shape and data_offsets, no more", name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._fail(f"dtype {str(dtype)[:40]!r} is not supported", name)
        if not _is_sizes(shape):
            raise self._fail("shape must be a list of integers, none negative", name)
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._fail("data_offsets must be [begin, end]", name)
        nbytes = DTYPES[dtype].itemsize
        for size in shape:
            # Stop at the first product out of range: the list may be as long as the header.
            nbytes *= size
            if nbytes >= 1 << 63:
                raise self._fail("its shape holds more than 2**63 bytes", name)
        if offsets[1] - offsets[0] != nbytes:
            raise self._fail(
                f"{nbytes} bytes by its dtype and shape, {offsets[1] - offsets[0]} by its "
                "data_offsets",
                name,
            )
        return TensorInfo(name, dtype, tuple(shape), *offsets)

    def _read(self, at: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._read_into(at, memoryview(buffer), None)
        return bytes(buffer)

    def _read_into(self, at: int, view: memoryview, tensor: str | None) -> None:
        self._file.seek(at)
        while len(view):
            got = self._file.readinto(view)
            if not got:
                raise self._fail("truncated while it was read", tensor)
            view = view[got:]

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The bytes of a tensor in pieces of ``chunk_bytes``, the last one shorter."""
        info = self.tensors[name]
        for at in range(info.begin, info.end, chunk_bytes):
            yield self._read(self._data + at, min(chunk_bytes, info.end - at))

    def tensor(self, name: str, sha256: str | None = None) -> Tensor:
        """A tensor on the CPU, in memory of its own.

        Raises:
            CheckpointError: its bytes are not those whose SHA-256 is given.
        """
        info = self.tensors[name]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        whole = raw.numpy().data
        digest = hashlib.sha256()
        for at in range(0, info.nbytes, CHUNK_BYTES):
            view = whole[at : at + CHUNK_BYTES]
            self._read_into(self._data + info.begin + at, view, name)
            digest.update(view)
        if sha256 is not None:  # other formats have none
            self._compare(name, digest.hexdigest(), sha256)
        if info.torch_dtype == torch.bool and bool((raw > 1).any()):
            raise self._fail("a bool that is neither 0 nor 1", name)
        return raw.view(info.torch_dtype).reshape(info.shape)

    def verify(self, name: str, sha256: str) -> None:
        """As :meth:`tensor`, without keeping the bytes."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
        self._compare(name, digest.hexdigest(), sha256)

    def _compare(self, name: str, got: str, expected: str) -> None:
        if got != expected:
            raise self._fail(
                f"altered: SHA-256 of its data is {got[:16]}…, the header says {expected[:16]}…",
                name,
            )


def _is_sizes(x: Any) -> bool:
    # bool is an int to isinstance, and JSON has true and false.
    return isinstance(x, list) and all(type(i) is int and i >= 0 for i in x)


@contextmanager
def open_reader(path: str | os.PathLike[str]) -> Iterator[Reader]:
    """Open a safetensors file and check its header.

    Raises:
        FileNotFoundError, PermissionError: as ``open``.
        CheckpointError: it is not a sound safetensors file.
    """
    path = Path(path)
    require_little_endian(path)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever, /dev/zero never end
        raise CheckpointError(path, "not a regular file")
    with io.FileIO(path) as file:
        yield Reader(path, file)


def require_little_endian(path: Path) -> None:
    if sys.byteorder != "little":
        raise CheckpointError(path, "safetensors data is little-endian, this machine is not")
