"""Folders as Hugging Face's libraries write them: config.json beside safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .container import CheckpointError, Reader, TensorInfo, open_reader
from .header import qualified

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_JSON_BYTES = 64 << 20
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@dataclass(frozen=True)
class Folder:
    """An open checkpoint.

    Attributes:
        path: the folder, or the file that was given.
        config: config.json, ``{}`` where there is none.
        quantization: what it says of the quantization; ``{}`` where nothing.
    """

    path: Path
    config: dict[str, Any]
    quantization: dict[str, Any]
    _readers: Mapping[str, Reader]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Name → entry of every tensor of every file."""
        return {name: reader.tensors[name] for name, reader in self._readers.items()}

    @property
    def files(self) -> list[Path]:
        """The safetensors files."""
        return list({reader.path: None for reader in self._readers.values()})

    def tensor(self, name: str) -> Tensor:
        """A tensor, read into memory of its own."""
        return self._readers[name].tensor(name)

    def of_layer(
        self, layer: str, key: str, *dtypes: torch.dtype, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """A layer's tensor.

        Raises:
            CheckpointError: it is missing, or of another dtype or shape.
        """
        name = qualified(layer, key)
        reader = self._readers.get(name)
        if reader is None:
            raise CheckpointError(self.path, "missing from the file", layer, name)
        info = reader.tensors[name]
        if info.torch_dtype not in dtypes:
            reason = f"must be {' or '.join(map(str, dtypes))}, is {info.torch_dtype}"
            raise CheckpointError(self.path, reason, layer, name)
        if shape is not None and info.shape != shape:
            reason = f"must have shape {list(shape)}, has {list(info.shape)}"
            raise CheckpointError(self.path, reason, layer, name)
        return self.tensor(name)


@contextmanager
def open_folder(path: str | os.PathLike[str]) -> Iterator[Folder]:
    """Open a folder, or a .safetensors file with its config.json beside it.

    Raises:
        CheckpointError: it holds no weights, a file is damaged, an index leads out of the folder or
            does not fit the files, two files hold one name.
        OSError: a file cannot be opened or read.
    """
    path = Path(path)
    folder, files = (path, None) if path.is_dir() else (path.parent, [path])
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    quantization = config.get("quantization_config", config.get("compression_config", {}))
    if not quantization and (folder / "quantize_config.json").is_file():  # AutoGPTQ's own
        quantization = {"quant_method": "gptq"} | _read_json(folder / "quantize_config.json")
    if not isinstance(quantization, dict):
        raise CheckpointError(folder / CONFIG, "quantization_config must be a JSON object")
    with ExitStack() as stack:
        readers: dict[str, Reader] = {}
        listed: dict[str, str] = {}
        if files is None:
            files, listed = _files(folder)
        for file in files:
            reader = stack.enter_context(open_reader(file))
            for name in reader.tensors:
                if name in readers:
                    reason = f"{readers[name].path.name} holds one of this name as well"
                    raise CheckpointError(file, reason, tensor=name)
                readers[name] = reader
        for name, file_name in listed.items():
            if name not in readers or readers[name].path.name != file_name:
                raise CheckpointError(folder / file_name, f"lacks what {INDEX} lists", tensor=name)
        yield Folder(path, config, quantization, readers)


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files, and which of them holds which tensor where an index lists them."""
    if (folder / INDEX).is_file():
        table = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise CheckpointError(folder / INDEX, "weight_map must map tensors to file names")
        names = sorted(set(table.values()))
        for name in names:
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise CheckpointError(folder / INDEX, f"{name[:80]!r} is no file of the folder")
            if not (folder / name).is_file():
                raise CheckpointError(folder / INDEX, f"{name[:80]!r} is missing")
        return [folder / name for name in names], table
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], {}
    only = list(folder.glob("*.safetensors"))
    if len(only) == 1:
        return only, {}
    reason = f"it holds neither {WEIGHTS} nor {INDEX}, and {len(only)} other .safetensors files"
    raise CheckpointError(folder, reason)


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(path, f"longer than {MAX_JSON_BYTES >> 20} MiB")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not valid JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(path, "must hold a JSON object")
    return content
