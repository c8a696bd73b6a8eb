"""What a checkpoint's header says beyond safetensors: layers, ties, checksums. See docs/format.md.

Everything that can be checked without a model is checked here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from ..modules import Mode, QuantizedLinear
from .container import CheckpointError, Reader, TensorInfo, parse_json

FORMAT = "zeropoint"
VERSION = "1"
RESERVED = ("format", "version", "layers", "aliases", "sha256", "digest")
"""Keys of ``__metadata__`` that the format keeps for itself."""

_WEIGHT = {"bits": 8, "signed": True, "granularity": "per-channel", "axis": 0}
_MAX_SIZE = 1 << 62


def qualified(layer: str, key: str) -> str:
    """The name of a layer's tensor; the model itself is the layer ``""``."""
    return f"{layer}.{key}" if layer else key


@dataclass(frozen=True)
class LayerInfo:
    """One entry of the layer table: what to build for a quantized layer.

    Attributes:
        mode: ``"dynamic"``, ``"static"`` or ``"weight-only"``.
        in_features, out_features: of the layer.
        bias: whether it has one.
        quantized_output: whether it holds an output scale and zero point (static mode only).
    """

    mode: Mode
    in_features: int
    out_features: int
    bias: bool
    quantized_output: bool = False

    @classmethod
    def of(cls, layer: QuantizedLinear) -> LayerInfo:
        """The entry of an existing layer."""
        return cls(
            layer.mode,
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.output_scale is not None,
        )

    def build(self, device: Any) -> QuantizedLinear:
        """A layer by this entry, its integers zero."""
        return QuantizedLinear(
            self.in_features, self.out_features, self.bias, self.mode, self.quantized_output, device
        )

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Safetensors dtype and shape of each of the layer's tensors, by their names within it."""
        out = (self.out_features,)
        result: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight": ("I8", (self.out_features, self.in_features)),
            "scale": ("F32", out),
            "zero_point": ("I32", out),
        }
        if self.bias:
            result["bias"] = ("F32", out)
        sides = ["input"] if self.mode == "static" else []
        for side in sides + ["output"] * self.quantized_output:
            result[f"{side}_scale"] = ("F32", ())
            result[f"{side}_zero_point"] = ("I32", ())
        return result

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON holds it."""
        return {
            "mode": self.mode,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "quantized_output": self.quantized_output,
            "weight": dict(_WEIGHT),
        }

    @classmethod
    def from_dict(cls, path: Path, layer: str, entry: Any) -> LayerInfo:
        """The inverse of :meth:`to_dict`. Raises :class:`CheckpointError`."""

        def fail(reason: str) -> CheckpointError:
            return CheckpointError(path, f"in the layer table, {reason}", layer)

        expected = {"mode", "in_features", "out_features", "bias", "quantized_output", "weight"}
        if not isinstance(entry, dict) or set(entry) != expected:
            raise fail(f"the entry must have exactly the keys {', '.join(sorted(expected))}")
        if entry["mode"] not in get_args(Mode):
            raise fail(f"mode must be one of {get_args(Mode)}, got {str(entry['mode'])[:40]!r}")
        for key in ("in_features", "out_features"):
            if type(entry[key]) is not int or not 0 <= entry[key] < _MAX_SIZE:
                raise fail(f"{key} must be an integer from 0, got {str(entry[key])[:40]!r}")
        for key in ("bias", "quantized_output"):
            if not isinstance(entry[key], bool):
                raise fail(f"{key} must be true or false, got {str(entry[key])[:40]!r}")
        if entry["quantized_output"] and entry["mode"] != "static":
            raise fail(f"quantized_output needs mode 'static', got {entry['mode']!r}")
        weight = entry["weight"]
        # Compared as JSON, where true is not 1.
        if canonical(weight) != canonical(_WEIGHT):
            raise fail(f"weight must be {json.dumps(_WEIGHT)} in version {VERSION}")
        return cls(**{key: value for key, value in entry.items() if key != "weight"})


@dataclass(frozen=True)
class Header:
    """A checkpoint's header, checked.

    Attributes:
        layers: name → what to build.
        tensors: name → where its bytes are, in their order.
        aliases: name of a tied tensor → name of the one whose bytes it shares.
        sha256: name → checksum of its bytes.
        metadata: the user's own strings.
    """

    layers: dict[str, LayerInfo]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    sha256: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """The tensor that holds the bytes of ``name``."""
        return self.aliases.get(name, name)

    def layer_of(self, name: str) -> str | None:
        """The quantized layer that a tensor belongs to."""
        layer, _, key = name.rpartition(".")
        info = self.layers.get(layer)
        return layer if info is not None and key in info.tensors() else None


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(metadata: Mapping[str, str], tensors: Iterable[TensorInfo]) -> str:
    """SHA-256 over all that the header says; the data is covered by the checksums in it."""
    covered = {
        "metadata": {key: value for key, value in metadata.items() if key != "digest"},
        "tensors": {t.name: {"dtype": t.dtype, "shape": list(t.shape)} for t in tensors},
    }
    return hashlib.sha256(canonical(covered).encode("ascii")).hexdigest()


def encode(
    layers: Mapping[str, LayerInfo],
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    sha256: Mapping[str, str],
) -> dict[str, str]:
    """``__metadata__`` of a checkpoint."""
    result = {
        "format": FORMAT,
        "version": VERSION,
        "layers": canonical({name: info.to_dict() for name, info in layers.items()}),
        "aliases": canonical(dict(aliases)),
        "sha256": canonical(dict(sha256)),
        **metadata,
    }
    return {**result, "digest": digest(result, tensors.values())}


def check_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str] | None) -> None:
    """Refuse metadata of the user that the header cannot hold.

    Raises:
        TypeError: something other than strings.
        ValueError: a key that the format keeps for itself.
    """
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
        if key in RESERVED:
            raise ValueError(f"metadata must not hold {key!r}, a key of the format itself")


def decode(reader: Reader) -> Header:
    """Read and check the header of a checkpoint.

    Raises:
        CheckpointError: it is not one, of another version, altered, or contradicts itself.
    """
    path, metadata = reader.path, reader.metadata
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            path,
            f"not a zeropoint checkpoint: its format is {metadata.get('format')!r}, expected "
            f"{FORMAT!r}",
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            path, f"version {metadata.get('version')!r} of the format; this zeropoint reads '1'"
        )
    for key in RESERVED:
        if key not in metadata:
            raise CheckpointError(path, f"__metadata__ lacks {key!r}")
    if digest(metadata, reader.tensors.values()) != metadata["digest"]:
        raise CheckpointError(path, "altered: the header does not match its digest")
    tables: dict[str, dict[str, Any]] = {}
    for key in ("layers", "aliases", "sha256"):
        try:
            table = parse_json(metadata[key])
        except ValueError as error:
            raise CheckpointError(path, f"{key!r} is not valid JSON: {error}") from None
        if not isinstance(table, dict):
            raise CheckpointError(path, f"{key!r} must be a JSON object")
        tables[key] = table
    for key in ("aliases", "sha256"):
        for name, value in tables[key].items():
            if not isinstance(value, str):
                raise CheckpointError(path, f"{key!r} must map strings to strings", tensor=name)
    layers = {n: LayerInfo.from_dict(path, n, entry) for n, entry in tables["layers"].items()}
    user = {key: value for key, value in metadata.items() if key not in RESERVED}
    header = Header(layers, reader.tensors, tables["aliases"], tables["sha256"], user)
    _check(path, header)
    return header


def _check(path: Path, header: Header) -> None:
    for name, target in header.aliases.items():
        if name in header.tensors:
            raise CheckpointError(path, "it has data and is an alias as well", tensor=name)
        if target not in header.tensors:
            raise CheckpointError(
                path, f"an alias of {target!r}, which the file does not hold", tensor=name
            )
    for name in header.tensors:
        if not re.fullmatch("[0-9a-f]{64}", header.sha256.get(name, "")):
            raise CheckpointError(path, "its SHA-256 is missing or not 64 hex digits", tensor=name)
    for name in header.sha256:
        if name not in header.tensors:
            raise CheckpointError(path, "a SHA-256 of a tensor that is not there", tensor=name)
    for name in (*header.tensors, *header.aliases):
        layer, _, key = name.rpartition(".")
        if layer in header.layers and key not in header.layers[layer].tensors():
            raise CheckpointError(path, "by the layer table, the layer has no such", layer, name)
    for layer, info in header.layers.items():
        for key, (dtype, shape) in info.tensors().items():
            name = qualified(layer, key)
            tensor = header.tensors.get(header.source(name))
            if tensor is None:
                raise CheckpointError(path, "missing from the file", layer, name)
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise CheckpointError(
                    path,
                    f"expected {dtype} {list(shape)} by the layer table, the file holds "
                    f"{tensor.dtype} {list(tensor.shape)}",
                    layer,
                    name,
                )


def check_values(path: str | os.PathLike[str], layer: str, key: str, tensor: Tensor) -> None:
    """Refuse scales and zero points of a quantized layer that no arithmetic can use.

    Raises:
        CheckpointError: a scale that is not positive and finite, a zero point out of the range of
            its integers (int8 for weights, uint8 for activations).
    """
    if key.endswith("scale"):
        bad = ~((tensor > 0) & tensor.isfinite())
        expected = "positive and finite"
    elif key.endswith("zero_point"):
        low, high = (-128, 127) if key == "zero_point" else (0, 255)
        bad = (tensor < low) | (tensor > high)
        expected = f"within [{low}, {high}]"
    else:
        return
    if bool(bad.any()):
        raise CheckpointError(
            path,
            f"must be {expected}, got {tensor[bad].flatten()[0].item()}",
            layer,
            qualified(layer, key),
        )
