"""A checkpoint of tensors that are in memory: twins found, header made, all of it written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import header as _header
from .container import CheckpointError, TensorInfo, dtype_name, progress_bar
from .header import AnyInfo
from .slots import same_memory
from .writer import open_writer


def without_twins(
    path: str | os.PathLike[str], held: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share their memory whole, once; and alias → name of the others.

    Raises:
        CheckpointError: a dtype that safetensors has no name for.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in held.items():
        if dtype_name(tensor.dtype) is None:
            reason = f"{tensor.dtype}, which safetensors has no name for"
            raise CheckpointError(path, reason, tensor=name)
        source = first.setdefault(same_memory(tensor), name)
        if source != name:
            aliases[name] = source
        else:
            tensors[name] = tensor
    return tensors, aliases


def write_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    layers: Mapping[str, AnyInfo],
    metadata: Mapping[str, str] | None,
    *,
    progress: bool = False,
) -> None:
    """Write what :func:`without_twins` gave, with the table of quantized layers, atomically.

    Raises:
        OSError: the file system's; no partial file is left.
    """

    def header(entries: dict[str, TensorInfo], sha256: dict[str, str]) -> dict[str, str]:
        return _header.encode(layers, aliases, metadata or {}, entries, sha256)

    entries = [(name, dtype_name(t.dtype) or "", t.shape) for name, t in tensors.items()]
    total = sum(tensor.nbytes for tensor in tensors.values())
    with (
        open_writer(path, entries, header) as writer,
        progress_bar("saving", total, progress) as bar,
    ):
        for name, tensor in tensors.items():
            writer.write_tensor(name, tensor)
            bar.update(tensor.nbytes)
