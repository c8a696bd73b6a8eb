"""Files of embedding tables that must be refused, each with its reason.

As in ``native_files``: one good file with one thing wrong, the digest made right again. The good
file holds ``table``, 5 rows of 6 entries in 4 bits by groups of 4, and ``linear``, 6 inputs and 2
outputs in 8 bits.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

from checkpoints import join, sign, split


def header_files(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    """``(name, bytes, pattern of the reason)``; refused by ``inspect`` and ``load`` alike."""

    def changed(name: str = "table", version: str = "3", gone: str = "", **entry: Any) -> bytes:
        head, data = split(good)
        layers = json.loads(head["__metadata__"]["layers"])
        layers[name] |= entry
        layers[name].pop(gone, None)
        head["__metadata__"] |= {"layers": json.dumps(layers), "version": version}
        return join(sign(head), data)

    where = "layer 'table': .*"
    for version in ("1", "2"):
        reason = "layer '(table|linear)': .*kind must be 'embedding', from version 3 on"
        yield f"version_{version}", changed(version=version), reason
    yield "version_4", changed(version="4"), "version '4' of the format; this zeropoint reads 1, 2,"
    for kind in ("linear", "Embedding", None, 1, True, ["embedding"], {}):
        yield f"kind_{kind}", changed(kind=kind), where + "kind must be 'embedding'"
    yield "kind_gone", changed(gone="kind"), where + "exactly the keys bias, in_features"
    yield "kind_of_a_linear", changed("linear", kind="embedding"), "layer 'linear': .*exactly"
    for key in ("num_embeddings", "embedding_dim", "dtype", "weight"):
        yield f"{key}_gone", changed(gone=key), where + "exactly the keys dtype, embedding_dim"
    yield "key_more", changed(padding_idx=0), where + "exactly the keys"
    yield "bias", changed(bias=True), where + "exactly the keys"
    for key in ("num_embeddings", "embedding_dim"):
        for size in (-1, True, "5", None, 5.0, [5], 2**62):
            try:
                data = changed(**{key: size})
            except ValueError:
                continue
            reason = "numbers must be|not valid JSON|" + where + f"{key} must be an integer"
            yield f"{key}_{str(size)[:5]}", data, reason
    for dtype in ("int8", "F32", "float8_e4m3fn", None, 32, ["float32"], {}):
        yield f"dtype_{str(dtype)[:8]}", changed(dtype=dtype), where + "dtype must be one of"
    for name, weight, reason in (
        ("text", "int4", "weight must be a JSON object"),
        ("null", None, "weight must be a JSON object"),
        ("bits_1", {"bits": 1}, "bits must be an integer from 2 to 8"),
        ("rows", {"bits": 8, "signed": True, "granularity": "per-row"}, "granularity must be"),
        (
            "signed",
            {"bits": 8, "signed": 1, "granularity": "per-channel", "axis": 0},
            "weight must",
        ),
        ("axis", {"bits": 8, "signed": True, "granularity": "per-channel", "axis": 1}, "weight mu"),
    ):
        yield f"weight_{name}", changed(weight=weight), where + reason
    # What the table says and what the file holds.
    held = r"'table': tensor 'table.weight': expected U8 "
    yield "rows_6", changed(num_embeddings=6), held + r"\[6, 3\].*holds U8 \[5, 3\]"
    yield "rows_huge", changed(num_embeddings=2**61), held
    yield "columns_7", changed(embedding_dim=7), held + r"\[5, 4\]"
    yield "columns_huge", changed(embedding_dim=2**61), held
    head, data = split(good)
    head["table.scales"] = head.pop("table.scale")
    yield "scale_gone", join(sign(head, data), data), where + "(such|missing)"
    head, data = split(good)
    head["table.bias"] = head.pop("linear.bias")
    yield "bias_there", join(sign(head, data), data), "(table|linear).*(such|missing)"


def value_files(good: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Files with a sound header whose values are out of range; ``load`` refuses them."""
    for name, key, packed, reason in (
        ("scale_zero", "table.scale", struct.pack("<f", 0), "positive and finite, got 0.0"),
        ("scale_nan", "table.scale", struct.pack("<f", float("nan")), "positive and finite"),
        ("zero_point_16", "table.zero_point", b"\x10", r"within \[0, 15\], got 16"),
    ):
        head, data = split(good)
        at = head[key]["data_offsets"][0]
        data = data[:at] + packed + data[at + len(packed) :]
        yield name, join(sign(head, data), data), f"'table'.*'{key}'.*{reason}"
