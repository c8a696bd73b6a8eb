"""``zeropoint convert`` to ONNX, which needs the model as it runs and an example of its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loading import load


def to_onnx(source: Path, out: Path, model: str, data: Path, operators: Any) -> tuple[str, ...]:
    """Write a checkpoint of zeropoint's as ONNX; what is left behind, in words.

    The number of rows may vary, and of tokens where the data is text.
    """
    from ..formats import native, onnx
    from ..sources import load_data

    loaded = load(model)
    batch = load_data(data, loaded, batch_size=2, limit=2)[0]  # in the float model's dtype
    quantized = native.load(source, loaded.model)
    may_vary: Any = {0: torch.export.Dim.DYNAMIC}
    if data.suffix == ".txt":
        may_vary[1] = torch.export.Dim.DYNAMIC
    try:
        if isinstance(batch, Tensor):
            shapes: Any = (may_vary,)
            return onnx.write(
                quantized, out, (_two(batch),), dynamic_shapes=shapes, operators=operators
            )
        kwargs = {name: _two(tensor) for name, tensor in batch.items()}
        shapes = dict.fromkeys(kwargs, may_vary)
        return onnx.write(quantized, out, (), kwargs, dynamic_shapes=shapes, operators=operators)
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"torch cannot export {model}: {error}") from error


def _two(x: Tensor) -> Tensor:
    """At least two rows: torch takes a size of one for a constant."""
    return x if len(x) > 1 else torch.cat([x, x])
