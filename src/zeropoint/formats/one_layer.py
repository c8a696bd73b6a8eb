"""One quantized layer out of a checkpoint, without the model it belongs to."""

from __future__ import annotations

import os

from ..modules import QuantizedLinear
from . import header as _header
from .container import CheckpointError, open_reader
from .header import LayerInfo, qualified
from .values import check_values


def load_layer(path: str | os.PathLike[str], name: str) -> QuantizedLinear:
    """The quantized layer ``name`` of a checkpoint; only its tensors are read, and verified.

    Raises:
        CheckpointError: the file is damaged, or has no such quantized layer.
        OSError: the file cannot be opened or read.
    """
    with open_reader(path) as reader:
        header = _header.decode(reader)
        if name not in header.layers:
            known = ", ".join(repr(n) for n in header.layers)
            raise CheckpointError(
                path, f"has no quantized layer {name!r}; it has {known or 'none'}", name
            )
        info = header.layers[name]
        if not isinstance(info, LayerInfo):
            raise CheckpointError(path, "an embedding table, not a Linear layer", name)
        layer = info.build("cpu")
        for key in info.tensors():
            source = header.source(qualified(name, key))
            tensor = reader.tensor(source, header.sha256[source])
            check_values(path, name, info, key, tensor)
            getattr(layer, key).copy_(tensor)
    return layer.eval()
