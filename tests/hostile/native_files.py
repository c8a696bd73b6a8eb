"""Files that must be refused, each with the reason that the refusal must give.

Each is one good file with one thing wrong. Where the wrong thing lies behind the header's digest,
the digest is made right again, so that the check behind it has to catch it.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from checkpoints import join, sign, split

Head = dict[str, Any]


def header_files(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    """``(name, bytes, pattern of the reason)``; refused by ``inspect`` and ``load`` alike.

    ``good`` is the checkpoint of the tests' zoo of layers.
    """
    yield from _not_safetensors(good)
    yield from _bad_entries(good)
    yield from _bad_metadata(good)
    yield from _bad_layers(good)


def value_files(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Files with a sound header whose values are out of range; ``load`` refuses them."""
    nan, inf = float("nan"), float("inf")
    for name, key, packed, reason in (
        ("scale_zero", "chain.2.scale", struct.pack("<f", 0), "positive and finite, got 0.0"),
        ("scale_nan", "chain.2.scale", struct.pack("<f", nan), "positive and finite, got nan"),
        ("scale_inf", "chain.2.scale", struct.pack("<f", inf), "positive and finite, got inf"),
        ("scale_negative", "chain.2.scale", struct.pack("<f", -1), "positive and finite, got -1"),
        ("zero_point_128", "chain.2.zero_point", struct.pack("<i", 128), "127.*got 128"),
        ("zero_point_huge", "chain.2.zero_point", struct.pack("<i", -(2**31)), "got -2147483648"),
        ("input_scale_nan", "static.input_scale", struct.pack("<f", nan), "positive and finite"),
        ("input_zero_point_256", "static.input_zero_point", struct.pack("<i", 256), "got 256"),
        ("output_zero_point", "chain.0.output_zero_point", struct.pack("<i", -1), "got -1"),
        ("output_scale_zero", "chain.0.output_scale", struct.pack("<f", 0), "positive and finite"),
        ("bool_of_2", "flags", b"\x02", "neither 0 nor 1"),
    ):
        head, data = split(good)
        at = head[key]["data_offsets"][0]
        data = data[:at] + packed + data[at + len(packed) :]
        yield name, join(sign(head, data), data), f"{key.rpartition('.')[0]}.*{key}.*{reason}"


def _not_safetensors(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    head, data = split(good)
    text = json.dumps(head).encode()
    yield "empty", b"", "truncated: 0 bytes"
    yield "seven_bytes", good[:7], "truncated: 7 bytes"
    yield "length_only", good[:8], "truncated: a header"
    yield "header_cut", good[:100], "truncated: a header"
    yield "length_2_to_63", (2**63).to_bytes(8, "little") + good[8:], "not a safetensors file"
    yield "length_just_over", (len(good) - 7).to_bytes(8, "little") + good[8:], "truncated"
    yield "length_zero", bytes(8) + good[8:], "does not begin with"
    yield "zeros", bytes(4096), "does not begin with"
    yield "list", join(b"[1,2]", data), "does not begin with"
    yield "not_json", join(b'{"a":', data), "not valid JSON"
    yield "not_utf8", join(b'{"a\xff":1}', data), "not valid JSON"
    yield "two_objects", join(text + text, data), "not valid JSON"
    yield "tab_padding", join(text + b"\t" * 8, data), "does not end with"
    yield "nested", join(b'{"a":' * 100_000, data), "not valid JSON"
    yield "nested_lists", join(b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", data), "too deeply"
    yield "key_twice", join(b'{"a":1,"a":1}', data), "'a' occurs twice"
    yield "nan", join(b'{"a":NaN}', data), "NaN is not an integer"
    yield "fraction", join(b'{"a":1.0}', data), "1.0 is not an integer"
    yield "huge_integer", join(b'{"a":' + b"9" * 10**6 + b"}", data), "an integer of 1000000 digits"
    yield "pickle", pickle.dumps(head), "not a safetensors file|truncated"
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(100)}, buffer)
    yield "torch_save", buffer.getvalue(), "not a safetensors file"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.safetensors", good)
    yield "zip", buffer.getvalue(), "not a safetensors file"
    yield "data_missing", good[: -len(data)], "truncated: the data ends after 0"
    yield "last_byte_missing", good[:-1], "truncated: the data ends"
    yield "byte_more", good + b"\0", "1 bytes follow the last tensor"


def _bad_entries(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    def entry(**changes: Any) -> bytes:
        head, data = split(good)
        head["strided"] |= changes
        return join(sign(head), data)

    begin, end = split(good)[0]["strided"]["data_offsets"]
    where = "tensor 'strided': "
    yield "dtype_unknown", entry(dtype="F128"), where + "dtype 'F128' is not supported"
    yield "dtype_list", entry(dtype=["F32"]), where + "dtype"
    yield "shape_negative", entry(shape=[-4, -3]), where + "shape must be"
    yield "shape_bool", entry(shape=[True, 12]), where + "shape must be"
    yield "shape_string", entry(shape="43"), where + "shape must be"
    yield "shape_huge", entry(shape=[2**62, 2**62]), where + "its shape holds more"
    yield "shape_huge_and_empty", entry(shape=[2**62, 2**62, 0]), where + "its shape holds more"
    yield "shape_long", entry(shape=[2**62] * 100_000), where + "its shape holds more"
    yield "shape_larger", entry(shape=[4, 4]), where + "64 bytes by its dtype and shape, 48"
    yield "claims_tebibytes", entry(shape=[2**40]), where + "4398046511104 bytes by its"
    yield (
        "claims_tebibytes_consistently",
        entry(shape=[2**40], data_offsets=[begin, begin + 2**42]),
        "must follow each other|truncated",
    )
    yield "offsets_reversed", entry(data_offsets=[end, begin]), where + "data_offsets must"
    yield "offsets_three", entry(data_offsets=[begin, end, end]), where + "data_offsets must"
    yield "overlap", entry(data_offsets=[begin - 8, end - 8]), "without holes or overlaps"
    yield "hole", entry(data_offsets=[begin + 8, end + 8]), "without holes or overlaps"
    yield "key_more", entry(comment=""), where + "its entry must have"
    head, data = split(good)
    yield "entry_list", join({**head, "strided": []}, data), where + "its entry must have"
    del head["strided"]["shape"]
    yield "key_less", join(sign(head), data), where + "its entry must have"
    head, data = split(good)
    head["more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    yield "unlisted_tensor", join(sign(head), data + bytes(4)), "'more'.*SHA-256 is missing"


def _bad_metadata(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    def with_metadata(change: Callable[[Head], Any], signed: bool = True) -> bytes:
        head, data = split(good)
        change(head["__metadata__"])
        return join(sign(head) if signed else head, data)

    def table(key: str, change: Callable[[Any], Any]) -> bytes:
        def edit(metadata: Head) -> None:
            content = json.loads(metadata[key])
            metadata[key] = json.dumps(change(content) or content)

        return with_metadata(edit)

    head, data = split(good)
    del head["__metadata__"]
    yield "metadata_missing", join(head, data), "not a zeropoint checkpoint: its format is None"
    yield "metadata_list", join({**head, "__metadata__": []}, data), "map strings to strings"
    yield "metadata_number", with_metadata(lambda m: m.update(version=1), False), "strings"
    yield "format_pt", with_metadata(lambda m: m.update(format="pt")), "its format is 'pt'"
    yield "version_4", with_metadata(lambda m: m.update(version="4")), "version '4'"
    yield "version_missing", with_metadata(lambda m: m.pop("version")), "version None"
    for key in ("layers", "aliases", "sha256"):
        yield f"{key}_missing", with_metadata(lambda m, k=key: m.pop(k)), f"lacks '{key}'"
        yield (
            f"{key}_not_json",
            with_metadata(lambda m, k=key: m.update({k: "{"})),
            f"'{key}' is not valid JSON",
        )
        yield (
            f"{key}_nested",
            with_metadata(lambda m, k=key: m.update({k: '{"a":' * 10**5})),
            f"'{key}' is not valid JSON",
        )
        yield f"{key}_list", table(key, lambda t: [1]), f"'{key}' must be a JSON object"
    yield "digest_missing", with_metadata(lambda m: m.pop("digest"), False), "lacks 'digest'"
    altered = "altered: the header"
    yield "digest_wrong", with_metadata(lambda m: m.update(digest="0" * 64), False), altered
    yield "metadata_altered", with_metadata(lambda m: m.update(note="x"), False), altered
    head, data = split(good)
    head["strided"]["shape"] = [3, 4]
    yield "shape_altered", join(head, data), altered
    head, data = split(good)
    head["scalar"]["dtype"] = "I64"
    yield "dtype_altered", join(head, data), altered
    yield "alias_number", table("aliases", lambda t: t.update(a=1)), "'a'.*strings to strings"
    yield "alias_of_none", table("aliases", lambda t: t.update(a="b")), "'a'.*an alias of 'b'"
    yield (
        "alias_of_alias",
        table("aliases", lambda t: t.update(a="again.weight")),
        "'a'.*an alias of 'again.weight'",
    )
    yield (
        "alias_with_data",
        table("aliases", lambda t: t.update(strided="strided")),
        "'strided'.*is an alias as well",
    )
    yield "sha_missing", table("sha256", lambda t: t.pop("strided") and None), "'strided'.*missing"
    yield "sha_short", table("sha256", lambda t: t.update(strided="00")), "'strided'.*64 hex"
    yield "sha_upper", table("sha256", lambda t: t.update(strided="A" * 64)), "'strided'.*64 hex"
    yield "sha_newline", table("sha256", lambda t: t.update(strided="a" * 64 + "\n")), "64 hex"
    yield "sha_of_nothing", table("sha256", lambda t: t.update(a="0" * 64)), "'a'.*not there"
    yield "sha_wrong", table("sha256", lambda t: t.update(strided="0" * 64)), "'strided'.*altered"
    data = split(good)[1]
    for at in (0, len(data) // 2, len(data) - 1):
        flipped = bytearray(good)
        flipped[len(good) - len(data) + at] ^= 1
        yield f"data_flipped_{at}", bytes(flipped), "tensor '.*': altered"


def _bad_layers(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    def layer(**changes: Any) -> bytes:
        head, data = split(good)
        layers = json.loads(head["__metadata__"]["layers"])
        layers["chain.2"] |= changes
        head["__metadata__"]["layers"] = json.dumps(layers)
        return join(sign(head), data)

    def renamed(old: str, new: str | None) -> bytes:
        head, data = split(good)
        entry = head.pop(old)
        if new is not None:
            head[new] = entry
        return join(sign(head, data), data)

    where = "layer 'chain.2': "
    yield "layer_key_more", layer(group=32), where + ".*exactly the keys"
    yield "layer_mode", layer(mode="magic"), where + ".*mode must be one of"
    yield "layer_mode_list", layer(mode=["dynamic"]), where + ".*mode must be one of"
    yield "layer_code", layer(mode="__import__('os').system('false')"), where + ".*mode must be"
    yield "layer_size_negative", layer(in_features=-6), where + ".*in_features must be"
    yield "layer_size_bool", layer(in_features=True), where + ".*in_features must be"
    yield "layer_size_text", layer(out_features="5"), where + ".*out_features must be"
    yield "layer_size_wrong", layer(in_features=7), where + "tensor 'chain.2.weight': expected I8"
    yield "layer_bias_number", layer(bias=1), where + ".*bias must be true or false"
    yield "layer_output", layer(quantized_output=True), where + ".*needs mode 'static'"
    yield "layer_static", layer(mode="static"), where + "tensor 'chain.2.input_scale': missing"
    yield "layer_4_bits", layer(weight={"bits": 4}), where + ".*weight must be"
    yield (
        "layer_weight_true_for_1",
        layer(weight={"bits": 8, "signed": 1, "granularity": "per-channel", "axis": 0}),
        where + ".*weight must be",
    )
    yield "scale_renamed", renamed("chain.2.scale", "scales"), where + ".*scale': missing"
    yield "bias_renamed", renamed("chain.2.bias", "bias"), where + ".*bias': missing"
    yield "bias_unlisted", layer(bias=False), where + ".*bias': by the layer table"
    yield "scale_unlisted", renamed("scalar", "chain.2.input_scale"), where + ".*input_scale': by"
    head, data = split(good)
    head["chain.2.zero_point"]["dtype"] = "F32"
    yield "zero_point_float", join(sign(head, data), data), where + ".*expected I32"
    head, data = split(good)
    head["chain.2.scale"]["shape"] = [1, 5]
    yield "scale_matrix", join(sign(head, data), data), where + ".*expected F32 .5."
