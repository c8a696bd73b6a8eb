"""What a quantized checkpoint holds, whatever its format: the meeting point of all conversions.

A reader of a format gives :class:`Contents`, a writer takes them; so each format is written against
this file alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..embedding import QuantizedEmbedding
from ..modules import Mode, QuantizedLinear
from ..tensor import QTensor
from . import header as _header
from .assembled import without_twins, write_checkpoint
from .container import CheckpointError, open_reader
from .header import LayerInfo, qualified
from .loading import load_into
from .values import check_values

Qparams = tuple[float, int]


@dataclass(frozen=True)
class LayerContents:
    """A quantized Linear layer: its integers, and what becomes of its input.

    Attributes:
        weight: ``(out_features, in_features)``, per tensor, per channel along axis 0 or per group.
        bias: ``(out_features,)``, any float dtype, or ``None``.
        mode: as :class:`zeropoint.QuantizedLinear`.
        input_qparams, output_qparams: ``(scale, zero_point)`` of unsigned 8 bits, static mode only.
        input_factor, rotation: as :class:`zeropoint.QuantizedLinear`.
    """

    weight: QTensor
    bias: Tensor | None = None
    mode: Mode = "weight-only"
    input_qparams: Qparams | None = None
    output_qparams: Qparams | None = None
    input_factor: Tensor | None = None
    rotation: int = 1

    @classmethod
    def of(cls, layer: QuantizedLinear) -> LayerContents:
        """Those of a layer, whose buffers they share."""

        def qparams(side: str) -> Qparams | None:
            scale, zero_point = (getattr(layer, f"{side}_{key}") for key in ("scale", "zero_point"))
            return None if scale is None else (scale.item(), zero_point.item())

        return cls(
            layer.weight_qtensor(),
            layer.bias,
            layer.mode,
            qparams("input"),
            qparams("output"),
            layer.input_factor,
            layer.rotation,
        )

    def build(self) -> QuantizedLinear:
        """The layer.

        Raises:
            ValueError: parts that do not fit together.
        """
        return QuantizedLinear.from_quantized(
            self.weight,
            self.bias,
            self.mode,
            self.input_qparams,
            self.output_qparams,
            input_factor=self.input_factor,
            rotation=self.rotation,
        )


@dataclass(frozen=True)
class Contents:
    """What a reader found.

    Attributes:
        path: the file or folder.
        format: its name, such as ``"compressed-tensors"``.
        layers: name → quantized Linear layer.
        tensors: name → everything else, as it is.
        dequantized: those of ``tensors`` that were integers in the file, and are the floats that
            these stood for, with the reason.
        notes: what a reader of the result should know.
    """

    path: Path
    format: str
    layers: dict[str, LayerContents]
    tensors: dict[str, Tensor]
    dequantized: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def save(
        self, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a checkpoint of zeropoint's, atomically: :func:`zeropoint.load` reads it.

        Raises:
            CheckpointError: parts that do not fit together; no file is written.
            TypeError, ValueError: see :func:`zeropoint.save`.
            OSError: the file system's.
        """
        _header.check_metadata(path, metadata)
        infos: dict[str, LayerInfo] = {}
        held: dict[str, Tensor] = dict(self.tensors)
        for name, layer in self.layers.items():
            try:
                built = layer.build()
            except ValueError as error:
                raise CheckpointError(self.path, str(error), name) from None
            infos[name] = LayerInfo.of(built)
            for key, tensor in built.state_dict().items():
                if (tensor_name := qualified(name, key)) in held:
                    reason = "it belongs to a quantized layer and is a tensor of its own as well"
                    raise CheckpointError(self.path, reason, name, tensor_name)
                check_values(self.path, name, infos[name], key, tensor)
                held[tensor_name] = tensor
        tensors, aliases = without_twins(path, held)
        write_checkpoint(path, tensors, aliases, infos, metadata)

    def load_into(self, model: nn.Module, *, device: torch.device | str = "cpu") -> nn.Module:
        """Put all of it into a model, which is changed only if everything fits; see
        :func:`zeropoint.load`. Goes through a temporary file of the size of the checkpoint.

        Raises:
            CheckpointError: the model has other layers or tensors; it is as it was.
        """
        with tempfile.TemporaryDirectory(prefix="zeropoint-") as folder:
            self.save(file := Path(folder) / "model.safetensors")
            with open_reader(file) as reader:
                header = _header.decode(reader)
                try:
                    return load_into(model, reader, header, torch.device(device), progress=False)
                except CheckpointError as error:
                    where = (error.reason, error.layer, error.tensor)
                    raise CheckpointError(self.path, *where) from None


def of_model(model: nn.Module) -> Contents:
    """Those of a model: its quantized layers, and the rest of its ``state_dict``. Quantized
    embeddings become the floats that they stand for.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear | QuantizedEmbedding)
    }
    tensors = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in layers
    }
    return _sorted(Path("(the model)"), layers, tensors)


def of_checkpoint(path: str | os.PathLike[str]) -> Contents:
    """Those of a checkpoint of zeropoint's, read whole and verified; as :func:`of_model`.

    Raises:
        CheckpointError: it is none, or damaged.
        OSError: the file cannot be opened or read.
    """
    with open_reader(path) as reader:
        header = _header.decode(reader)
        held = {name: reader.tensor(name, header.sha256[name]) for name in reader.tensors}
        held |= {name: held[source] for name, source in header.aliases.items()}
        layers: dict[str, nn.Module] = {}
        for name, info in header.layers.items():
            layers[name] = layer = info.build("cpu")
            for key in info.tensors():
                tensor = held.pop(qualified(name, key))
                check_values(reader.path, name, info, key, tensor)
                getattr(layer, key).copy_(tensor)
        return _sorted(reader.path, layers, held)


def _sorted(path: Path, modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Contents:
    layers: dict[str, LayerContents] = {}
    dequantized: dict[str, str] = {}
    for name, module in modules.items():
        if isinstance(module, QuantizedLinear):
            layers[name] = LayerContents.of(module)
        elif isinstance(module, QuantizedEmbedding):
            weight = qualified(name, "weight")
            tensors[weight] = module.dequantize().weight.detach()
            dequantized[weight] = "a quantized embedding, which other formats have no layer for"
    return Contents(path, "zeropoint", layers, tensors, dequantized)
