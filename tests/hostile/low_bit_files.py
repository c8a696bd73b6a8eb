"""Files of low-bit and grouped layers that must be refused, each with its reason.

As in ``native_files``: one good file with one thing wrong, the digest made right again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from checkpoints import join, sign, split

PER_GROUP = {
    "bits": 4,
    "signed": False,
    "granularity": "per-group",
    "group_size": 2,
    "scale_dtype": "float32",
}
"""What the good file says of ``four``, a layer of 5 inputs and 3 outputs; ``three`` is per channel,
3 bits, 5 inputs and 2 outputs."""


def header_files(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    """``(name, bytes, pattern of the reason)``; refused by ``inspect`` and ``load`` alike."""

    def layer(name: str = "four", version: str = "2", **changes: Any) -> bytes:
        head, data = split(good)
        metadata = head["__metadata__"]
        layers = json.loads(metadata["layers"])
        layers[name]["weight"] = {**layers[name]["weight"], **changes}
        layers[name]["weight"] = {k: v for k, v in layers[name]["weight"].items() if v != "gone"}
        metadata["layers"], metadata["version"] = json.dumps(layers), version
        return join(sign(head), data)

    def whole(weight: Any) -> bytes:
        head, data = split(good)
        layers = json.loads(head["__metadata__"]["layers"])
        layers["four"]["weight"] = weight
        head["__metadata__"]["layers"] = json.dumps(layers)
        return join(sign(head), data)

    def with_input(changed: Any) -> bytes:
        head, data = split(good)
        layers = json.loads(head["__metadata__"]["layers"])
        layers["four"]["input"] = changed
        head["__metadata__"]["layers"] = json.dumps(layers)
        return join(sign(head), data)

    where = "layer 'four': "
    yield "weight_text", whole("int4"), where + ".*weight must be a JSON object"
    yield "weight_null", whole(None), where + ".*weight must be a JSON object"
    yield "weight_empty", whole({}), where + ".*bits must be an integer from 2 to 8, got 'None'"
    yield "version_1", layer(version="1"), "layer '(four|three)': .*in version 1"
    for bits in (0, 1, 9, -4, True, "4", None, [4], 2**40):
        yield f"bits_{str(bits)[:5]}", layer(bits=bits), where + ".*bits must be an integer from"
    yield "signed", layer(signed=True), where + '.*weight must be .*"signed": false.*got'
    yield "signed_0", layer(signed=0), where + '.*weight must be .*"signed": false.*got'
    yield "signed_gone", layer(signed="gone"), where + ".*weight must be"
    yield "granularity", layer(granularity="per-row"), where + ".*granularity must be"
    yield "granularity_list", layer(granularity=["per-group"]), where + ".*granularity must be"
    yield "groups_and_channels", layer(granularity="per-channel"), where + ".*weight must be"
    yield "axis_1", layer("three", axis=1), "layer 'three': .*weight must be"
    yield "axis_and_groups", layer(axis=0), where + ".*weight must be"
    yield "key_more", layer(act_order=True), where + ".*weight must be"
    for size in (0, -2, True, "2", None, 2**62):
        yield f"group_{str(size)[:5]}", layer(group_size=size), where + ".*group_size must be an"
    yield "group_gone", layer(group_size="gone"), where + ".*group_size must be an integer"
    for dtype in ("float64", "F32", None, ["float32"], {}):
        yield f"scales_{str(dtype)[:7]}", layer(scale_dtype=dtype), where + ".*scale_dtype must be"
    for name, changed in (
        ("text", "factor"),
        ("null", None),
        ("empty", {}),
        ("false", {"factor": False, "rotation": 1}),
        ("more", {"factor": True, "rotation": 1, "seed": 0}),
        ("rotation_true", {"factor": True, "rotation": True}),
        ("rotation_0", {"factor": True, "rotation": 0}),
        ("rotation_2", {"factor": True, "rotation": 2}),
        ("rotation_text", {"factor": True, "rotation": "1"}),
        ("rotation_gone", {"factor": True}),
    ):
        yield f"input_{name}", with_input(changed), where + ".*(input must be|rotation must be)"
    missing = "tensor 'four.input_factor': missing"
    yield "input_without_factor", with_input({"factor": True, "rotation": 1}), where + missing
    # What the table says and what the file holds.
    scale = where + r"tensor 'four.scale': expected "
    yield "group_3", layer(group_size=3), scale + r"F32 \[3, 2\].*holds F32 \[3, 3\]"
    yield "group_huge", layer(group_size=2**61), scale + r"F32 \[3, 1\]"
    yield "scales_bf16", layer(scale_dtype="bfloat16"), scale + r"BF16 \[3, 3\]"
    yield "scales_f16", layer(scale_dtype="float16"), scale + r"F16 \[3, 3\]"
    weight = where + r"tensor 'four.weight': expected "
    yield "bits_5", layer(bits=5), weight + r"U8 \[3, 4\].*holds U8 \[3, 3\]"
    yield "bits_8", layer(bits=8, signed=True), weight + r"I8 \[3, 5\]"
    for name, key, change, reason in (
        ("scale_flat", "four.scale", {"shape": [9]}, scale),
        ("scale_turned", "three.scale", {"shape": [1, 2]}, "'three.scale': expected F32 .2."),
        ("weight_wide", "four.weight", {"shape": [9, 1]}, weight),
        ("weight_signed", "four.weight", {"dtype": "I8"}, weight),
        ("zero_point_signed", "four.zero_point", {"dtype": "I8"}, "zero_point': expected U8"),
    ):
        head, data = split(good)
        head[key] |= change
        yield name, join(sign(head, data), data), reason
    head, data = split(good)
    head["four.zero_points"] = head.pop("four.zero_point")
    yield "zero_point_gone", join(sign(head, data), data), where + ".*such|zero_point': missing"


def value_files(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Files with a sound header whose values are out of range; ``load`` refuses them."""
    for name, key, packed, reason in (
        ("scale_zero", "four.scale", struct.pack("<f", 0), "positive and finite, got 0.0"),
        ("scale_nan", "four.scale", struct.pack("<f", float("nan")), "positive and finite"),
        ("scale_negative", "three.scale", struct.pack("<f", -1), "positive and finite, got -1"),
        ("zero_point_16", "four.zero_point", b"\x10", r"within \[0, 15\], got 16"),
        ("zero_point_255", "four.zero_point", b"\xff", r"within \[0, 15\], got 255"),
        ("zero_point_8", "three.zero_point", struct.pack("<i", 8), r"within \[0, 7\], got 8"),
        ("zero_point_-1", "three.zero_point", struct.pack("<i", -1), r"within \[0, 7\], got -1"),
        ("padding_of_4_bits", "four.weight", b"\x00\x00\x10", "after a row's last code must be"),
        ("padding_of_3_bits", "three.weight", b"\x00\x80", "after a row's last code must be zero"),
    ):
        head, data = split(good)
        at = head[key]["data_offsets"][0]
        data = data[:at] + packed + data[at + len(packed) :]
        yield name, join(sign(head, data), data), f"{key.rpartition('.')[0]}.*{key}.*{reason}"
