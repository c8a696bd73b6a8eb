"""Files in the shape of torch's that must be refused, each with the reason that must be given.

Those that try to run code call :func:`strike`, or a function of Python's, so that a reader which
obeys leaves a mark. None of them may.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MARK = Path("struck")
"""In the working folder; a file that is obeyed makes it."""


def strike(*_: Any) -> dict[str, Any]:
    MARK.touch()
    return {}


class Calls:
    """Pickled as a call of ``function`` with ``args``."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts


class Evil:
    """Runs code when it is made, and when it is given its state."""

    def __new__(cls) -> Evil:
        strike()
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        strike()


class Storage:
    """Pickled as torch pickles a storage."""

    def __init__(self, kind: Any, key: Any, numel: Any, *more: Any) -> None:
        self.id = ("storage", kind, key, "cpu", numel, *more)


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, Storage) else None


def pickled(obj: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(obj)
    return buffer.getvalue()


def archive(data: bytes, records: dict[str, bytes] | None = None, **kwargs: Any) -> bytes:
    """A zip file as ``torch.save`` writes it around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **kwargs) as file:
        file.writestr("old/data.pkl", data)
        for name, record in (records or {}).items():
            file.writestr(f"old/{name}", record)
    return buffer.getvalue()


def stream(data: bytes, keys: Any = (), storages: bytes = b"", little: Any = True) -> bytes:
    """A stream of pickles as torch wrote it before 1.6."""
    system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {}}
    heads = [pickled(x) for x in (0x1950A86A20F9469CFC6C, 1001, system)]
    return b"".join((*heads, data, pickled(list(keys)), storages))


def tensor(
    storage: Any = None, offset: Any = 0, size: Any = (2, 3), stride: Any = (3, 1), *more: Any
) -> Calls:
    storage = Storage(torch.FloatStorage, "0", 6) if storage is None else storage
    hooks = OrderedDict()
    return Calls(
        torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks, *more
    )


def quantized(qparams: Any, storage: Any = None, size: Any = (2, 3)) -> Calls:
    storage = Storage(torch.QInt8Storage, "0", 6) if storage is None else storage
    hooks = OrderedDict()
    return Calls(torch._utils._rebuild_qtensor, storage, 0, size, (3, 1), qparams, False, hooks)


def linear(weight: Any) -> dict[str, Any]:
    return OrderedDict({"fc._packed_params._packed_params": (weight, None)})


def with_storage(obj: Any, nbytes: int = 24) -> bytes:
    return archive(pickled(obj), {"data/0": bytes(nbytes)})


def files() -> Iterator[tuple[str, bytes, str]]:
    """``(name, bytes, pattern of the reason)``."""
    yield from _running_code()
    yield from _no_such_files()
    yield from _bad_tensors()
    yield from _bad_models()


def _running_code() -> Iterator[tuple[str, bytes, str]]:
    import os
    import subprocess

    shell = f"touch {MARK}"
    own = r"torch_files\.strike"
    for name, call, reason in (
        ("calls_function", Calls(strike), own),
        ("calls_system", Calls(os.system, shell), r"calls '(posix|nt)\.system'"),
        (
            "calls_popen",
            Calls(subprocess.Popen, shell, -1),
            r"calls '(subprocess|commands)\.Popen'",
        ),
        ("calls_eval", Calls(eval, f"open({str(MARK)!r}, 'w')"), r"calls 'builtins\.eval'"),
        ("calls_getattr", Calls(getattr, "text", "upper"), r"calls 'builtins\.getattr'"),
        ("calls_torch_load", Calls(torch.load, "old.pt"), r"calls 'torch\.serialization\.load'"),
        ("calls_with_state", Calls(strike, state={"a": 1}), own),
    ):
        yield name, archive(pickled({"a": call})), f"it {reason}|{own}"
        yield f"{name}_as_root", archive(pickled(call)), f"it {reason}|{own}"
        yield f"{name}_in_stream", stream(pickled({"a": call})), f"it {reason}|{own}"
        yield f"{name}_in_protocol_4", archive(pickled([call], 4)), f"it {reason}|{own}"
    yield "calls_as_a_storage", archive(pickled(linear(tensor(Calls(strike))))), own
    yield "calls_as_a_size", with_storage(linear(tensor(size=Calls(strike)))), own
    yield "calls_in_a_stream_of_its_own", pickled(Calls(strike)), own
    yield (
        "calls_in_system_info",
        pickled(0x1950A86A20F9469CFC6C) + pickled(1001) + pickled(Calls(strike)),
        own,
    )
    yield "calls_in_storage_keys", stream(pickled({}), [Calls(strike)]), own
    evil = object.__new__(Evil)
    evil.__dict__["a"] = 1
    yield "object_beside_tensors", with_storage({"a": tensor(), "b": evil}), r"torch_files\.Evil"
    yield "old_instance_opcode", archive(b"(itorch_files\nstrike\n."), "opcode INST"
    yield "old_object_opcode", archive(b"(ctorch_files\nstrike\no."), "opcode OBJ"
    yield "extension_opcode", archive(b"\x80\x02\x82\x01."), "opcode EXT1"
    yield "object_with_arguments", archive(b"\x80\x02ctorch_files\nEvil\nK\x01\x85\x81."), "argume"
    yield "persistent_text_opcode", archive(b"P0\n."), "opcode PERSID"
    yield "call_of_a_number", archive(b"\x80\x02K\x01)R."), "no name"
    yield "state_for_a_list", archive(b"\x80\x02]}b."), "a state for a list"


def _no_such_files() -> Iterator[tuple[str, bytes, str]]:
    good = with_storage(linear(quantized((torch.per_tensor_affine, 0.5, 0))), 6)
    yield "empty", b"", "not a sound pickle"
    yield "zeros", bytes(1000), "not a sound pickle"
    yield "text", b"hello", "not a sound pickle"
    yield "zip_cut", good[:-30], "not a sound zip"
    yield "zip_head_only", good[:4], "not a sound zip"
    yield "zip_without_pickle", archive(b"")[:0] + _zip({"a/b": b""}), "lacks one data.pkl"
    yield "zip_of_two", _zip({"a/data.pkl": b"", "b/data.pkl": b""}), "lacks one data.pkl"
    yield (
        "zip_compressed",
        archive(pickled({}), compression=zipfile.ZIP_DEFLATED),
        "compressed, which torch never does",
    )
    damaged = bytearray(good)
    damaged[good.index(b"_rebuild")] ^= 1
    yield "zip_damaged", bytes(damaged), "is damaged"
    yield "big_endian", archive(pickled({}), {"byteorder": b"big"}), "big-endian"
    yield "big_endian_stream", stream(pickled({}), little=False), "big-endian"
    yield "stream_without_magic", pickled(1) + pickled(2), "neither a zip file nor"
    yield "stream_cut", stream(pickled({}))[:-5], "not a sound pickle"
    yield "pickle_cut", archive(pickled(linear(tensor()))[:-9]), "not a sound pickle"
    yield "pickle_of_nothing", archive(b"\x80\x02."), "not a sound pickle"
    yield "pickle_of_two", archive(b"\x80\x02NN."), "not a sound pickle"
    yield "memo_missing", archive(b"\x80\x02h\x09."), "not a sound pickle"
    yield "mark_missing", archive(b"\x80\x02Nt."), "not a sound pickle"
    yield "deep_key", archive(b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"Ns."), "a key of the type"
    yield "long_text_claimed", archive(b"\x80\x02X\xff\xff\xff\xffa."), "not a sound pickle"
    yield "long_bytes_claimed", archive(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fa."), "not a sound"
    yield "memo_at_4_billion", archive(b"\x80\x02Nr\xff\xff\xff\xff."), "neither a state dict"
    yield "number", archive(pickled(5)), "neither a state dict nor a model"
    yield "empty_dictionary", archive(pickled({})), "no state dict; it holds nothing"
    yield "other_dictionary", archive(pickled({"epoch": 3})), "no state dict; it holds epoch"
    two = {"a": {"x": tensor()}, "b": {"y": tensor()}}
    yield "two_state_dicts", with_storage(two), "it holds a, b; say which to read"


def _zip(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, record in records.items():
            file.writestr(name, record)
    return buffer.getvalue()


def _bad_tensors() -> Iterator[tuple[str, bytes, str]]:
    affine, channels = torch.per_tensor_affine, torch.per_channel_affine
    floats = torch.FloatStorage

    def one(value: Any, nbytes: int = 24) -> bytes:
        return with_storage(linear(value), nbytes)

    beyond = "reaches beyond its storage"
    yield "size_beyond", one(tensor(size=(3, 3))), beyond
    yield "offset_beyond", one(tensor(offset=1)), beyond
    yield "stride_beyond", one(tensor(stride=(30, 1))), beyond
    yield "size_huge", one(tensor(size=(2**61, 2**61))), beyond
    yield "expanded", one(tensor(size=(2**40, 3), stride=(0, 1))), beyond
    yield "size_negative", one(tensor(size=(-2, 3))), "size or strides are malformed"
    yield "stride_negative", one(tensor(stride=(-3, 1))), "size or strides are malformed"
    yield "offset_negative", one(tensor(offset=-1)), "offset is malformed"
    yield "size_of_text", one(tensor(size=("2", 3))), "size or strides are malformed"
    yield "dimensions_without_end", one(tensor(size=(1,) * 999, stride=(1,) * 999)), "size or str"
    yield "storage_missing", archive(pickled(linear(tensor()))), "lacks the record 'data/0'"
    yield "storage_short", one(tensor(), 20), "has 20 bytes, its tensors say 24"
    yield "storage_long", one(tensor(), 32), "has 32 bytes, its tensors say 24"
    yield (
        "storage_elsewhere",
        archive(pickled(linear(tensor(Storage(floats, "../../etc/passwd", 6))))),
        "lacks the record",
    )
    yield "storage_key_number", one(tensor(Storage(floats, 0, 6))), "entry is malformed"
    yield "storage_count_text", one(tensor(Storage(floats, "0", "6"))), "entry is malformed"
    yield "storage_of_a_view", one(tensor(Storage(floats, "0", 6, (1, 2)))), "entry is malformed"
    yield "storage_of_a_class", one(tensor(Storage(OrderedDict, "0", 6))), "unknown type"
    yield "storage_none", one(tensor("no storage")), "without a storage"
    yield "conjugated", one(tensor(None, 0, (2, 3), (3, 1), {"conj": True})), "conjugated"
    yield "arguments_few", one(Calls(torch._utils._rebuild_tensor_v2, 1)), "with 1 arguments"
    whole = [tensor(Storage(floats, "0", 9999), 0, (9999,), (1,)) for _ in range(99)]
    many = {str(i): value for i, value in enumerate(whole)}
    yield "claims_again_and_again", with_storage(many, 39996), "many times the bytes"
    stored = pickled({"a": tensor()})
    count = struct.pack("<q", 6)
    yield "stream_storage_cut", stream(stored, ["0"], count + bytes(23)), "truncated: a storage"
    yield "stream_count_negative", stream(stored, ["0"], struct.pack("<q", -6)), "truncated"
    yield "stream_count_huge", stream(stored, ["0"], struct.pack("<q", 2**62)), "truncated"
    yield "stream_key_unknown", stream(stored, ["1"], count), "of what type the storage '1'"
    yield "stream_key_missing", stream(stored), "lacks the storage '0'"
    for name, qparams, reason in (
        ("scale_zero", (affine, 0.0, 0), "scale must be positive and finite"),
        ("scale_nan", (affine, float("nan"), 0), "scale must be positive and finite"),
        ("scale_negative", (affine, -1.0, 0), "scale must be positive and finite"),
        ("scale_text", (affine, "1", 0), "no number"),
        ("zero_point_128", (affine, 1.0, 128), r"zero_point must be within \[-128, 127\]"),
        ("zero_point_huge", (affine, 1.0, 2**80), "a quantized tensor: "),
        ("scheme_missing", (), "without a scheme"),
        ("axis_beyond", (channels, [1.0] * 3, [0] * 3, 2), "scales do not fit its shape"),
        ("axis_negative", (channels, [1.0] * 3, [0] * 3, -1), "scales do not fit its shape"),
        ("axis_text", (channels, [1.0] * 2, [0] * 2, "0"), "axis is malformed"),
        ("scales_few", (channels, [1.0], [0], 0), "scales do not fit its shape"),
        ("scales_text", (channels, ["1", "1"], [0, 0], 0), "no numbers"),
        ("zero_points_huge", (channels, [1.0, 1.0], [2**80, 0], 0), "beyond all bounds"),
        ("scales_bad", (channels, [1.0, -1.0], [0, 0], 0), "scale must be positive and finite"),
        ("channels_of_inputs", (channels, [1.0] * 3, [0] * 3, 1), "not those of a Linear"),
    ):
        yield f"quantized_{name}", one(quantized(qparams), 6), reason
    cube = Storage(torch.QInt8Storage, "0", 6)
    weight = Calls(
        torch._utils._rebuild_qtensor, cube, 0, (1, 2, 3), (6, 3, 1), (affine, 1.0, 0), False, {}
    )
    yield "weight_of_three_dimensions", one(weight, 6), "not those of a Linear"
    bias = {"fc._packed_params._packed_params": (quantized((affine, 1.0, 0)), tensor(size=(3,)))}
    yield (
        "bias_too_long",
        archive(
            pickled(bias).replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x000"),
            {"data/0": bytes(6)},
        ),
        "has 6 bytes, its tensors say 24",
    )


def _bad_models() -> Iterator[tuple[str, bytes, str]]:
    head = b"\x80\x02ctorch_files\nNet\nq\x00)\x81q\x01"  # an object, remembered as 1
    yield (
        "model_in_itself",
        archive(head + b"}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x01ssb."),
        "hold each other without end",
    )
    doubling = head
    for i in range(2, 60):  # each module holds the one before twice: 2**58 names
        before = b"h" + bytes([i - 1])
        doubling += b"0h\x00)\x81q" + bytes([i]) + b"}X\x08\x00\x00\x00_modules}("
        doubling += b"X\x01\x00\x00\x00a" + before + b"X\x01\x00\x00\x00b" + before + b"usb"
    empty = b"}X\x08\x00\x00\x00_modules}sb"
    yield (
        "modules_doubled_and_doubled",
        archive(doubling.replace(head, head + empty) + b"."),
        "hold each other without end",
    )
