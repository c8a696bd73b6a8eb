"""Files that torch wrote, read without torch's own reader: the pickle's tree and its tensors.

Three containers: the zip file of ``torch.save`` since 1.6, the stream of pickles before it, and
the zip file of ``torch.jit.save``. Nothing in them is executed (:mod:`.inert_pickle`). Quantized
tensors become integers, scales and zero points, so that torch need not know of them any more.
"""

from __future__ import annotations

import io
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..layout import broadcastable
from ..tensor import QTensor
from .container import DTYPES, CheckpointError, require_little_endian
from .inert_pickle import Call, CallError, Name, Object, PickleError, Reference, read

_STORAGES: dict[str, torch.dtype | str] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "QUInt4x2Storage": "4-bit integers, two a byte",
    "QUInt2x4Storage": "2-bit integers, four a byte",
}
_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}
_UTILS = "torch._utils._rebuild_"
_TENSORS = frozenset(_UTILS + name for name in ("tensor", "tensor_v2", "tensor_v3", "qtensor"))
_PARAMETERS = frozenset((_UTILS + "parameter", _UTILS + "parameter_with_state"))
GRAPH_MODULE = "torch.fx.graph_module.reduce_graph_module"
"""What a model traced by ``torch.fx`` is pickled as; the first argument holds its state."""

ADVICE = (
    "If you trust the file, load it where it was made and save what it holds as a state dict: "
    "torch.save(model.state_dict(), ...)"
)

_CONSTRUCTORS = (
    _TENSORS
    | _PARAMETERS
    | {GRAPH_MODULE, "builtins.set", "torch.Size", "torch.device"}
    | {"torch._tensor._rebuild_from_type_v2", "torch.serialization._get_layout"}
    | {"torch.jit._pickle.restore_type_tag"}
    | {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "tensor", "double", "bool")}
)
_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DIMS = 64


@dataclass(frozen=True)
class Foreign:
    """A quantized tensor that no :class:`QTensor` can hold.

    Attributes:
        reason: what it is.
        values: the reals it stands for, float32, or ``None`` where they are not read.
    """

    reason: str
    values: Tensor | None = None


class Archive:
    """A file of torch's, made by :func:`open_archive`.

    Attributes:
        path: of the file.
        root: the tree of its pickle.
        classes: of the objects in the tree, ``module.name``; none of them was made.
        is_script: whether ``torch.jit.save`` wrote it.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.is_script = False
        self._file = file
        self._zip: zipfile.ZipFile | None = None
        self._prefix = ""
        self._records: dict[str, bytes] = {}
        self._storages: dict[str, Tensor] = {}
        self._made: dict[int, tuple[Call, Any]] = {}
        # A few bytes of pickle can claim the same storage again and again.
        self._budget = 4 * path.stat().st_size + (1 << 16)
        is_zip = file.read(4) == b"PK\3\4"
        file.seek(0)
        if is_zip:
            self.root = self._open_zip()
            _, self.classes = _survey(self.root)
        else:
            whole = file.read()
            stream = io.BytesIO(whole)
            self.root, keys = self._open_stream(stream)
            found, self.classes = _survey(self.root)
            self._split(whole, stream.tell(), keys, found)

    def fail(self, reason: str, tensor: str | None = None) -> CheckpointError:
        """An error about this file, to be raised."""
        return CheckpointError(self.path, reason, tensor=tensor)

    def _pickle(self, file: BinaryIO) -> Any:
        try:
            return read(file, _CONSTRUCTORS.__contains__)
        except CallError as error:
            raise self.fail(f"{error}. {ADVICE}") from None
        except PickleError as error:
            raise self.fail(str(error)) from None

    # Containers.

    def _open_zip(self) -> Any:
        try:
            self._zip = zipfile.ZipFile(self._file)
            names = self._zip.namelist()
        except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
            raise self.fail(f"not a sound zip file: {error}") from None
        pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise self.fail("not a file of torch.save or torch.jit.save: it lacks one data.pkl")
        self._prefix = pickles[0].removesuffix("data.pkl")
        self.is_script = f"{self._prefix}constants.pkl" in names
        if f"{self._prefix}byteorder" in names and self._record("byteorder") != b"little":
            raise self.fail("written on a big-endian machine")
        return self._pickle(io.BytesIO(self._record("data.pkl")))

    def _record(self, name: str) -> bytes:
        assert self._zip is not None
        try:
            info = self._zip.getinfo(self._prefix + name)
        except KeyError:
            raise self.fail(f"it lacks the record {name[:60]!r}") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise self.fail(f"the record {name[:60]!r} is compressed, which torch never does")
        try:
            return self._zip.read(info)
        except (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError) as error:
            raise self.fail(f"the record {name[:60]!r} is damaged: {error}") from None

    def _open_stream(self, file: BinaryIO) -> tuple[Any, list[str]]:
        magic = self._pickle(file)
        if magic != _MAGIC:
            raise self.fail("neither a zip file nor a stream of pickles as torch.save writes them")
        protocol, system = self._pickle(file), self._pickle(file)
        if protocol != 1001 or not isinstance(system, dict):
            raise self.fail("a stream of pickles of another version than 1001")
        if system.get("little_endian") is not True:
            raise self.fail("written on a big-endian machine")
        root, keys = self._pickle(file), self._pickle(file)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise self.fail("it lacks the list of its storages")
        return root, keys

    def _split(self, whole: bytes, at: int, keys: list[str], found: list[Reference]) -> None:
        """Cut a stream's storages apart: each lies behind its count of elements, and of what type
        they are only the tensors say."""
        sizes = {}
        for reference in found:
            key, dtype, _ = self._storage_id(reference)
            sizes[key] = _itemsize(dtype)
        for key in keys:
            if key not in sizes:
                raise self.fail(f"nothing says of what type the storage {key[:40]!r} is")
            count = int.from_bytes(whole[at : at + 8], "little", signed=True)
            end = at + 8 + count * sizes[key]
            if count < 0 or end > len(whole):
                raise self.fail("truncated: a storage ends after the file")
            self._records[key] = whole[at + 8 : end]
            at = end

    # Storages and tensors.

    def _storage_id(self, reference: Any) -> tuple[str, torch.dtype | str, int]:
        id = reference.id if isinstance(reference, Reference) else None
        if not isinstance(id, tuple) or len(id) not in (5, 6) or id[0] != "storage":
            raise self.fail("a tensor without a storage")
        kind, key, numel = id[1], id[2], id[4]
        name = kind.text if isinstance(kind, Name) else ""
        package, _, name = name.rpartition(".")
        if package not in ("torch", "torch.storage", "torch.cuda") or name not in _STORAGES:
            raise self.fail(f"a storage of the unknown type {str(name)[:60]!r}")
        if (
            not isinstance(key, str)
            or type(numel) is not int
            or numel < 0
            or id[5:] not in ((), (None,))
        ):
            raise self.fail("a storage whose entry is malformed")
        return key, _STORAGES[name], numel

    def _storage(self, reference: Any) -> tuple[Tensor, torch.dtype | str]:
        """Bytes of a storage, uint8, and the type that the reference gives them."""
        key, dtype, numel = self._storage_id(reference)
        if key not in self._storages:
            if self._zip is not None:
                data = self._record(f"data/{key}")
            elif key in self._records:
                data = self._records[key]
            else:
                raise self.fail(f"it lacks the storage {key[:40]!r}")
            self._storages[key] = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8)
                if data
                else torch.empty(0, dtype=torch.uint8)
            )
        raw = self._storages[key]
        if raw.numel() != numel * _itemsize(dtype):
            raise self.fail(
                f"the storage {key[:40]!r} has {raw.numel()} bytes, its tensors say "
                f"{numel * _itemsize(dtype)}"
            )
        return raw, dtype

    def tensor(self, call: Any) -> Tensor | QTensor | Foreign:
        """What a call in the tree would have made.

        Raises:
            CheckpointError: it is no tensor, or its size, strides, scales or storage do not fit.
        """
        if not isinstance(call, Call):
            raise self.fail(f"a tensor was expected, not a {type(call).__name__}")
        known = self._made.get(id(call))
        if known is None:
            # The call is kept, so that its id stays its own.
            known = self._made[id(call)] = (call, self._make(call))
        return known[1]

    def _make(self, call: Call) -> Tensor | QTensor | Foreign:
        depth = 0
        while call.name in _PARAMETERS:
            inner = call.args[0] if call.args else None
            depth += 1
            if not isinstance(inner, Call) or depth > 4:
                raise self.fail("a parameter without a tensor")
            call = inner
        if call.name not in _TENSORS:
            return Foreign(f"made by {call.name}")
        kind, args = call.name.removeprefix(_UTILS), call.args
        least = {"tensor": 4, "tensor_v2": 6, "tensor_v3": 7, "qtensor": 7}[kind]
        if not least <= len(args) <= least + (kind in ("tensor_v2", "tensor_v3")):
            raise self.fail(f"{call.name!r} with {len(args)} arguments")
        raw, dtype = self._storage(args[0])
        if kind == "tensor_v3":
            dtype = _DTYPES.get(getattr(args[6], "text", ""), "a type that is not known")
        if len(args) > least and args[least]:
            raise self.fail("a tensor that is conjugated or negated lazily")
        if isinstance(dtype, str):
            return Foreign(dtype)
        flat = self._view(raw, dtype, *args[1:4])
        return flat if kind != "qtensor" else self._quantized(flat, args[4])

    def _view(self, raw: Tensor, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
        size, stride = _integers(size), _integers(stride)
        if size is None or stride is None or len(size) != len(stride) or len(size) > _MAX_DIMS:
            raise self.fail("a tensor whose size or strides are malformed")
        if type(offset) is not int or offset < 0:
            raise self.fail("a tensor whose offset is malformed")
        count = math.prod(size)
        held = raw.numel() // dtype.itemsize
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if raw.numel() % dtype.itemsize or count > held or (count and last >= held):
            raise self.fail(f"a tensor of shape {list(size)[:8]} reaches beyond its storage")
        self._budget -= count * dtype.itemsize
        if self._budget < 0:
            raise self.fail("its tensors claim many times the bytes that the file has")
        if not count:
            return torch.empty(size, dtype=dtype)
        if dtype == torch.bool and bool((raw > 1).any()):
            raise self.fail("a bool that is neither 0 nor 1")
        return torch.as_strided(raw.view(dtype), size, stride, offset)

    def _quantized(self, integers: Tensor, qparams: Any) -> QTensor | Foreign:
        if not isinstance(qparams, tuple) or not qparams or not isinstance(qparams[0], Name):
            raise self.fail("a quantized tensor without a scheme")
        scheme = qparams[0].text.removeprefix("torch.")
        axis: int | None = None
        scale: Any
        zero_point: Any
        if scheme == "per_tensor_affine" and len(qparams) == 3:
            scale, zero_point = qparams[1:]
            if type(scale) not in (float, int) or type(zero_point) is not int:
                raise self.fail("a quantized tensor whose scale or zero point is no number")
        elif scheme in ("per_channel_affine", "per_channel_affine_float_qparams"):
            if len(qparams) != 4 or type(qparams[3]) is not int:
                raise self.fail("a quantized tensor whose axis is malformed")
            axis = qparams[3]
            scale, zero_point = (self._vector(v) for v in qparams[1:3])
            if not 0 <= axis < integers.ndim or not (
                scale.shape == zero_point.shape == integers.shape[axis : axis + 1]
            ):
                raise self.fail("a quantized tensor whose scales do not fit its shape")
        else:
            return Foreign(f"the quantization scheme {scheme[:60]}")
        if integers.dtype not in (torch.int8, torch.uint8):
            return Foreign("32-bit integers")
        if axis is not None and zero_point.is_floating_point():
            s, z = (broadcastable(t.float(), axis, integers.ndim) for t in (scale, zero_point))
            kind = "int8" if integers.dtype == torch.int8 else "uint8"
            return Foreign(f"{kind} with float zero points", (integers.float() - z) * s)
        try:
            return QTensor(integers, scale, zero_point, axis)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise self.fail(f"a quantized tensor: {error}") from None

    def _vector(self, value: Any) -> Tensor:
        if isinstance(value, list):  # files before torch 1.4
            if not all(type(v) in (float, int) for v in value):
                raise self.fail("scales or zero points that are no numbers")
            whole = all(type(v) is int for v in value)
            try:
                return torch.tensor(value, dtype=torch.int64 if whole else torch.float64)
            except (ValueError, RuntimeError, OverflowError):
                raise self.fail("scales or zero points beyond all bounds") from None
        made = self.tensor(value)
        if not isinstance(made, Tensor) or made.is_complex() or made.dtype == torch.bool:
            raise self.fail("scales or zero points that are no numbers")
        return made


def _itemsize(dtype: torch.dtype | str) -> int:
    return 1 if isinstance(dtype, str) else dtype.itemsize


def _integers(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, Call) and value.name == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple | list):
        return None
    if not all(type(v) is int and 0 <= v < 1 << 62 for v in value):
        return None
    return tuple(value)


def _survey(root: Any) -> tuple[list[Reference], set[str]]:
    """All that a tree refers to outside of itself, and the classes of the objects in it."""
    found: list[Reference] = []
    classes: set[str] = set()
    seen: set[int] = set()
    left = [root]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Reference):
            found.append(node)
        elif isinstance(node, Call):
            left.append(node.args)
        elif isinstance(node, Object):
            classes.add(node.name)
            left.append(node.state)
        elif isinstance(node, tuple | list):
            left.extend(node)
        elif isinstance(node, dict):
            left.extend(node.values())
            left.append(getattr(node, "state", None))
    return found, classes


@contextmanager
def open_archive(path: str | os.PathLike[str]) -> Iterator[Archive]:
    """Open a file of ``torch.save`` or ``torch.jit.save`` and read its pickle's tree.

    Raises:
        FileNotFoundError, PermissionError: as ``open``.
        CheckpointError: it is no such file, damaged, or tries to call what is not expected.
    """
    path = Path(path)
    require_little_endian(path)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever, /dev/zero never end
        raise CheckpointError(path, "not a regular file")
    with path.open("rb") as file:
        yield Archive(path, file)
