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
from typing import Any, TypeAlias, get_args

from torch import nn

from ..embedding import QuantizedEmbedding
from ..input_transform import check_rotation
from ..modules import Mode, QuantizedLinear
from .container import CheckpointError, Reader, TensorInfo, parse_json
from .embedding_info import EmbeddingInfo
from .weight_entry import (
    MAX_SIZE,
    SCALE_DTYPE_OF,
    canonical,
    weight_from_dict,
    weight_tensors,
    weight_to_dict,
)

FORMAT = "zeropoint"
VERSIONS = ("1", "2", "3")
"""Of the format; a file has the lowest that can say what it holds."""

RESERVED = ("format", "version", "layers", "aliases", "sha256", "digest")
"""Keys of ``__metadata__`` that the format keeps for itself."""

_WEIGHT_1 = weight_to_dict(8)
"""The weights of version 1."""


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
        bits: width of its weight, 2 to 8.
        group_size: inputs that share a scale; ``None`` means one scale an output channel.
        scale_dtype: of the scales of groups: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        rotation: 0: it takes its input as it is; 1: it multiplies it by an input factor; above: it
            also rotates runs of so many entries.
    """

    mode: Mode
    in_features: int
    out_features: int
    bias: bool
    quantized_output: bool = False
    bits: int = 8
    group_size: int | None = None
    scale_dtype: str = "float32"
    rotation: int = 0

    @classmethod
    def of(cls, layer: QuantizedLinear) -> LayerInfo:
        """The entry of an existing layer."""
        return cls(
            layer.mode,
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.output_scale is not None,
            layer.bits,
            layer.group_size,
            str(layer.scale_dtype).removeprefix("torch."),
            0 if layer.input_factor is None else layer.rotation,
        )

    @property
    def columns(self) -> int:
        """Integers in a row of the weight."""
        return self.in_features

    def build(self, device: Any) -> QuantizedLinear:
        """A layer by this entry, its integers zero."""
        return QuantizedLinear(
            self.in_features,
            self.out_features,
            self.bias,
            self.mode,
            self.quantized_output,
            device,
            bits=self.bits,
            group_size=self.group_size,
            scale_dtype=SCALE_DTYPE_OF[self.scale_dtype],
            input_factor=self.rotation > 0,
            rotation=max(1, self.rotation),
        )

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Safetensors dtype and shape of each of the layer's tensors, by their names within it."""
        size = self.out_features, self.in_features
        result = weight_tensors(*size, self.bits, self.group_size, self.scale_dtype)
        if self.bias:
            result["bias"] = ("F32", (self.out_features,))
        sides = ["input"] if self.mode == "static" else []
        for side in sides + ["output"] * self.quantized_output:
            result[f"{side}_scale"] = ("F32", ())
            result[f"{side}_zero_point"] = ("I32", ())
        if self.rotation:
            result["input_factor"] = ("F32", (self.in_features,))
        return result

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON holds it."""
        changed = {"input": {"factor": True, "rotation": self.rotation}} if self.rotation else {}
        return changed | {
            "mode": self.mode,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "quantized_output": self.quantized_output,
            "weight": self.weight(),
        }

    def weight(self) -> dict[str, Any]:
        """What the entry says of the weight."""
        return weight_to_dict(self.bits, self.group_size, self.scale_dtype)

    @classmethod
    def from_dict(cls, path: Path, layer: str, entry: Any, version: str) -> LayerInfo:
        """The inverse of :meth:`to_dict`. Raises :class:`CheckpointError`."""

        def fail(reason: str) -> CheckpointError:
            return CheckpointError(path, f"in the layer table, {reason}", layer)

        expected = {"mode", "in_features", "out_features", "bias", "quantized_output", "weight"}
        if not isinstance(entry, dict) or set(entry) - {"input"} != expected:
            raise fail(f"the entry must have exactly the keys {', '.join(sorted(expected))}")
        if entry["mode"] not in get_args(Mode):
            raise fail(f"mode must be one of {get_args(Mode)}, got {str(entry['mode'])[:40]!r}")
        for key in ("in_features", "out_features"):
            if type(entry[key]) is not int or not 0 <= entry[key] < MAX_SIZE:
                raise fail(f"{key} must be an integer from 0, got {str(entry[key])[:40]!r}")
        for key in ("bias", "quantized_output"):
            if not isinstance(entry[key], bool):
                raise fail(f"{key} must be true or false, got {str(entry[key])[:40]!r}")
        if entry["quantized_output"] and entry["mode"] != "static":
            raise fail(f"quantized_output needs mode 'static', got {entry['mode']!r}")
        rotation = 0
        if "input" in entry:
            rotation = _rotation(entry.pop("input"), entry["in_features"], version, fail)
        weight = entry.pop("weight")
        # Compared as JSON, where true is not 1.
        if version == "1" and canonical(weight) != canonical(_WEIGHT_1):
            raise fail(f"weight must be {json.dumps(_WEIGHT_1)} in version 1")
        return cls(**entry, **weight_from_dict(weight, fail), rotation=rotation)


AnyInfo: TypeAlias = LayerInfo | EmbeddingInfo
"""An entry of the layer table."""


def info_of(module: nn.Module) -> AnyInfo | None:
    """The entry of a quantized layer or table; ``None`` for other modules."""
    if isinstance(module, QuantizedEmbedding):
        return EmbeddingInfo.of(module)
    return LayerInfo.of(module) if isinstance(module, QuantizedLinear) else None


def info_from_dict(path: Path, layer: str, entry: Any, version: str) -> AnyInfo:
    """The entry of a layer or a table from JSON. Raises :class:`CheckpointError`."""
    if not isinstance(entry, dict) or "kind" not in entry:
        return LayerInfo.from_dict(path, layer, entry, version)
    return EmbeddingInfo.from_dict(
        entry,
        version,
        lambda reason: CheckpointError(path, f"in the layer table, {reason}", layer),
    )


def _rotation(changed: Any, in_features: int, version: str, fail: Any) -> int:
    """What an entry says that the layer does to its input."""
    rotation = changed.get("rotation") if isinstance(changed, dict) else None
    if version == "1" or canonical(changed) != canonical({"factor": True, "rotation": rotation}):
        raise fail('input must be {"factor": true, "rotation": n}, from version 2 on')
    try:
        check_rotation("rotation", rotation, in_features)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise fail(str(error)[:200]) from None
    return rotation  # type: ignore[return-value]


@dataclass(frozen=True)
class Header:
    """A checkpoint's header, checked.

    Attributes:
        layers: name → what to build.
        tensors: name → where its bytes are, in their order.
        aliases: name of a tied tensor → name of the one whose bytes it shares.
        sha256: name → checksum of its bytes.
        metadata: the user's own strings.
        version: of the format.
    """

    layers: dict[str, AnyInfo]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    sha256: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)
    version: str = VERSIONS[0]

    def source(self, name: str) -> str:
        """The tensor that holds the bytes of ``name``."""
        return self.aliases.get(name, name)

    def layer_of(self, name: str) -> str | None:
        """The quantized layer that a tensor belongs to."""
        layer, _, key = name.rpartition(".")
        info = self.layers.get(layer)
        return layer if info is not None and key in info.tensors() else None


def digest(metadata: Mapping[str, str], tensors: Iterable[TensorInfo]) -> str:
    """SHA-256 over all that the header says; the data is covered by the checksums in it."""
    covered = {
        "metadata": {key: value for key, value in metadata.items() if key != "digest"},
        "tensors": {t.name: {"dtype": t.dtype, "shape": list(t.shape)} for t in tensors},
    }
    return hashlib.sha256(canonical(covered).encode("ascii")).hexdigest()


def encode(
    layers: Mapping[str, AnyInfo],
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    sha256: Mapping[str, str],
) -> dict[str, str]:
    """``__metadata__`` of a checkpoint."""
    linears = [info for info in layers.values() if isinstance(info, LayerInfo)]
    first = all(info.weight() == _WEIGHT_1 and not info.rotation for info in linears)
    lowest = "3" if len(linears) < len(layers) else "1" if first else "2"
    result = {
        "format": FORMAT,
        "version": lowest,
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
    version = metadata.get("version")
    if version not in VERSIONS:
        raise CheckpointError(
            path,
            f"version {version!r} of the format; this zeropoint reads {', '.join(VERSIONS)}",
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
    layers = {
        name: info_from_dict(path, name, entry, version) for name, entry in tables["layers"].items()
    }
    user = {key: value for key, value in metadata.items() if key not in RESERVED}
    header = Header(layers, reader.tensors, tables["aliases"], tables["sha256"], user, version)
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
