"""zeropoint's own checkpoints: one safetensors file, its tensors plain, its header checked.

The format is a page of MUSTs: docs/format.md. A quantized layer is rebuilt from the layer table in
the header; nothing in a file is ever executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..embedding import QuantizedEmbedding
from ..modules import QuantizedLinear
from . import header as _header
from .assembled import without_twins, write_checkpoint
from .container import CheckpointError, TensorInfo, dtype_name, open_reader, progress_bar
from .embedding_info import EmbeddingInfo
from .header import AnyInfo, Header, LayerInfo, info_of, qualified
from .loading import load_into
from .slots import slots_of, why_not_plain
from .streaming import quantize_file
from .values import check_values

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "EmbeddingInfo",
    "LayerInfo",
    "TensorInfo",
    "inspect",
    "load",
    "quantize_file",
    "save",
]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds, as :func:`inspect` tells.

    Attributes:
        path: the file.
        version: of the format.
        file_bytes: its length.
        layers: quantized layers, name → :class:`LayerInfo`, or :class:`EmbeddingInfo` of tables.
        tensors: name → :class:`TensorInfo`, in the order of the data.
        aliases: tied tensors, name → name of the tensor whose bytes it shares.
        metadata: the strings given to :func:`save`.
        verified: whether the data was compared with its checksums.
    """

    path: Path
    version: str
    file_bytes: int
    layers: dict[str, AnyInfo]
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    metadata: dict[str, str]
    verified: bool

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return {
            "path": str(self.path),
            "version": self.version,
            "file_bytes": self.file_bytes,
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
            "tensors": {
                name: {"dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes}
                for name, t in self.tensors.items()
            },
            "aliases": dict(self.aliases),
            "metadata": dict(self.metadata),
            "verified": self.verified,
        }


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: bool = True,
) -> None:
    """Write a model's ``state_dict`` and the table of its quantized layers to one file.

    The file is written beside ``path`` under another name and renamed when it is complete and on
    the disk, so that ``path`` holds either the old file or the new one. Tensors that share their
    memory whole are written once. Memory beyond the model's: one tensor's copy at most.

    Args:
        model: any module, quantized or not, on any device that holds data.
        path: of the file; by custom it ends in ``.safetensors``.
        metadata: strings of your own to keep in the header.
        progress: show a progress bar where it takes over two seconds and stderr is a terminal.

    Raises:
        TypeError: ``model`` is not a module, or ``metadata`` holds something other than strings.
        ValueError: ``metadata`` uses a key of the format.
        CheckpointError: the model holds what the format cannot: state other than parameters and
            buffers, tensors without data or of a dtype safetensors lacks, a quantized layer with
            a scale or zero point out of range.
        OSError: the file system's; no partial file is left.

    >>> import tempfile
    >>> layer = QuantizedLinear.from_linear(nn.Linear(3, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(layer, f"{folder}/layer.safetensors")
    ...     load(f"{folder}/layer.safetensors", nn.Linear(3, 2))
    QuantizedLinear(in_features=3, out_features=2, bias=True, mode='dynamic', bits=8)
    """
    _require_module(model)
    _header.check_metadata(path, metadata)
    layers = _layer_table(path, model)
    held: dict[str, Tensor] = {}
    for name, slot in slots_of(path, model).items():
        _check_savable(path, name, slot.tensor)
        held[name] = slot.tensor
    tensors, aliases = without_twins(path, held)
    for layer, info in layers.items():
        for key, (dtype, shape) in info.tensors().items():
            name = qualified(layer, key)
            source = aliases.get(name, name)
            if source not in tensors:
                raise CheckpointError(path, "the layer has lost it", layer, name)
            tensor = tensors[source]
            if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (dtype, shape):
                raise CheckpointError(
                    path,
                    f"must be {dtype} {list(shape)}, is {tensor.dtype} {list(tensor.shape)}",
                    layer,
                    name,
                )
            check_values(path, layer, info, key, tensor)

    write_checkpoint(path, tensors, aliases, layers, metadata, progress=progress)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> nn.Module:
    """Read a checkpoint into a model, bit for bit as it was saved.

    ``model`` is changed in place, and only when the whole file has been read and found sound:

    * Linear layers that the file holds quantized are replaced by :class:`QuantizedLinear`,
      embeddings by :class:`zeropoint.QuantizedEmbedding`;
    * existing parameters and buffers keep their identity and device and take the file's values;
      those on the meta device are replaced by tensors on ``device``;
    * tensors that the file says are tied share memory afterwards.

    Args:
        path: a file written by :func:`save` or :func:`quantize_file`.
        model: of the architecture that was saved: float (fresh, pretrained or on the meta device)
            or quantized already.
        device: where tensors go that the model holds on the meta device.
        progress: show a progress bar where it takes over two seconds and stderr is a terminal.

    Returns:
        ``model``; where it is itself a layer that the file holds quantized, the one that takes its
        place.

    Raises:
        TypeError: ``model`` is not a module.
        CheckpointError: the file is truncated, altered, of another version, or does not fit the
            model: a layer or tensor missing, unexpected, or of another size or dtype. Names the
            layer and tensor. The model is as it was.
        OSError: the file cannot be opened or read.
    """
    _require_module(model)
    with open_reader(path) as reader:
        return load_into(model, reader, _header.decode(reader), torch.device(device), progress)


def inspect(
    path: str | os.PathLike[str], *, verify: bool = True, progress: bool = True
) -> CheckpointInfo:
    """What a checkpoint holds, without a model and without loading it.

    Args:
        path: a file written by :func:`save` or :func:`quantize_file`.
        verify: read all data once and compare it with its checksums; otherwise only the header is
            read.
        progress: show a progress bar where it takes over two seconds and stderr is a terminal.

    Raises:
        CheckpointError: the file is truncated, altered, of another version or contradicts itself.
        OSError: the file cannot be opened or read.
    """
    with open_reader(path) as reader:
        header: Header = _header.decode(reader)
        if verify:
            with progress_bar("verifying", reader.file_bytes, progress) as bar:
                for name, tensor in reader.tensors.items():
                    reader.verify(name, header.sha256[name])
                    bar.update(tensor.nbytes)
        return CheckpointInfo(
            reader.path,
            header.version,
            reader.file_bytes,
            header.layers,
            header.tensors,
            header.aliases,
            header.metadata,
            verify,
        )


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _layer_table(path: str | os.PathLike[str], model: nn.Module) -> dict[str, AnyInfo]:
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        info = info_of(module)
        if info is None:
            continue
        if type(module) not in (QuantizedLinear, QuantizedEmbedding):
            base = "QuantizedLinear" if isinstance(info, LayerInfo) else "QuantizedEmbedding"
            raise CheckpointError(
                path,
                f"{type(module).__name__} is a subclass of {base}, which loading would not bring "
                "back",
                name,
            )
        layers[name] = info
    return layers


def _check_savable(path: str | os.PathLike[str], name: str, tensor: Tensor) -> None:
    reason = why_not_plain(tensor)
    if reason is None and tensor.is_meta:
        reason = "on the meta device, without data"
    if reason is not None:
        raise CheckpointError(path, reason, tensor=name)
