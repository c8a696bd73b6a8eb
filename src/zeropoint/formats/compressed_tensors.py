"""Checkpoints of compressed-tensors, the format of vLLM and LLM Compressor: integers, written and
read. See docs/interop.md.

Needs no package but torch. The layouts are those of compressed-tensors 0.20
(https://github.com/vllm-project/compressed-tensors), which the tests compare with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import write_text
from ..spec import integer_range
from ..tensor import QTensor
from . import int32_words
from .compressed_config import METHOD, Config, Scheme, encode
from .container import CheckpointError, TensorInfo, dtype_name
from .contents import Contents, LayerContents, of_checkpoint, of_model
from .header import qualified
from .hf_folder import CONFIG, FLOATS, WEIGHTS, Folder, open_folder
from .new_folder import new_folder
from .writer import open_writer

__all__ = ["CheckpointError", "read", "write"]

_OWN = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias")
_OF_INPUT = ("input_scale", "input_zero_point")
_STRANGE = ("weight_g_idx", "weight_global_scale", "input_global_scale", "output_scale")


def read(path: str | os.PathLike[str]) -> Contents:
    """What a checkpoint of compressed-tensors holds.

    Read are integer weights of 2 to 8 bits by tensor, channel or group, packed
    (``pack-quantized``) or not (``int-quantized``, ``naive-quantized``); activations that are
    floats, or 8 bits, static by tensor or dynamic.

    Args:
        path: a folder with config.json and safetensors files, or one such file beside its
            config.json.

    Returns:
        The layers, and all other tensors as they are. Scales by group keep their dtype; others
        become float32, which changes no value.

    Raises:
        CheckpointError: a damaged or contradicting file, or one that uses what zeropoint has not
            (floats of 8 or 4 bits, sparsity, transforms, a quantized cache, activation order by
            group): says what, and the layer.
        OSError: a file cannot be opened or read.
    """
    with open_folder(path) as folder:
        config = Config(folder.path, folder.quantization)
        names = folder.infos
        layers: dict[str, LayerContents] = {}
        used: set[str] = set()
        notes: set[str] = set()
        for tensor in names:
            layer, _, key = tensor.rpartition(".")
            if key in ("weight_packed", "weight_scale") and layer not in layers:
                scheme = config.scheme(layer)
                layers[layer] = _read_layer(folder, layer, scheme)
                if scheme.mode == "dynamic" and scheme.input_symmetric:
                    notes.add(
                        "the file quantizes activations about zero; zeropoint's dynamic layers "
                        "give each row a zero point, which is as fine or finer"
                    )
                used |= {qualified(layer, own) for own in (*_OWN, *_OF_INPUT)}
        if not layers:
            raise CheckpointError(folder.path, "it holds no quantized layer")
        tensors = {name: folder.tensor(name) for name in names if name not in used}
        return Contents(folder.path, METHOD, layers, tensors, notes=tuple(sorted(notes)))


def _read_layer(folder: Folder, layer: str, scheme: Scheme) -> LayerContents:
    infos = folder.infos

    def fail(reason: str, key: str | None = None) -> CheckpointError:
        tensor = None if key is None else qualified(layer, key)
        return CheckpointError(folder.path, reason, layer, tensor)

    get = partial(folder.of_layer, layer)
    for key in _STRANGE:
        if qualified(layer, key) in infos:
            raise fail("a tensor whose meaning zeropoint has not", key)
    qmin = integer_range(scheme.bits, True)[0]
    if scheme.packed:
        size = get("weight_shape", torch.int64, torch.int32, shape=(2,)).tolist()
        if not all(0 <= n < 1 << 40 for n in size):
            raise fail(f"must hold two sizes, holds {size}", "weight_shape")
        shape = (size[0], int32_words.words(size[1], scheme.bits))
        packed = get("weight_packed", torch.int32, shape=shape)
        codes = int32_words.unpack(packed, scheme.bits, size[1])
        integers = (codes.to(torch.int16) + qmin).to(torch.int8)
    else:
        integers = get("weight", torch.int8)
        if integers.ndim != 2:
            raise fail(f"must have two dimensions, has {integers.ndim}", "weight")
        size = list(integers.shape)
    groups = 1
    if scheme.group_size is not None:
        if size[1] % scheme.group_size:
            raise fail(f"groups of {scheme.group_size} do not divide its {size[1]} inputs")
        groups = size[1] // scheme.group_size
    scale = get("weight_scale", *FLOATS)
    rows = 1 if scheme.strategy == "tensor" else size[0]
    if scale.numel() != rows * groups or scale.shape[:1] not in ((rows,), ()):
        raise fail(f"must have shape {[rows, groups]}, has {list(scale.shape)}", "weight_scale")
    zero_point = torch.zeros(rows, groups, dtype=torch.int32)
    if not scheme.symmetric:
        if scheme.packed and scheme.strategy != "tensor":
            shape = (int32_words.words(rows, scheme.bits), groups)
            packed = get("weight_zero_point", torch.int32, shape=shape)
            zeros = int32_words.unpack(packed.T.contiguous(), scheme.bits, rows).T
            zero_point = zeros.to(torch.int32) + qmin
        else:
            stored = get("weight_zero_point", torch.int8, torch.int32, torch.int64)
            if stored.numel() != rows * groups:
                raise fail(f"must have {rows * groups} entries", "weight_zero_point")
            limit = 1 << 20  # beyond every range, within int32
            zero_point = stored.reshape(rows, groups).to(torch.int64).clamp(-limit, limit)
    scale = scale.reshape(rows, groups)
    try:
        if scheme.group_size is not None:
            weight = QTensor(
                integers, scale, zero_point, bits=scheme.bits, group_size=scheme.group_size
            )
        else:
            one = (scale[:, 0].to(torch.float32), zero_point[:, 0])
            axis = None if scheme.strategy == "tensor" else 0
            weight = QTensor(integers, *one, axis=axis, bits=scheme.bits)
    except ValueError as error:
        raise fail(str(error)) from None
    bias = None
    if qualified(layer, "bias") in infos:
        bias = get("bias", *FLOATS, shape=(size[0],))
    qparams = None
    if scheme.mode == "static":
        scales, zeros = get("input_scale", *FLOATS), torch.zeros(1, dtype=torch.int32)
        if not scheme.input_symmetric:
            zeros = get("input_zero_point", torch.int8, torch.int32, torch.int64)
        if scales.numel() != 1 or zeros.numel() != 1:
            raise fail("must hold one number", "input_scale")
        # They are signed there, unsigned here: both the integers and their zero point are raised.
        qparams = (scales.to(torch.float32).item(), int(zeros.item()) + 128)
    contents = LayerContents(weight, bias, scheme.mode, qparams)
    try:
        contents.build()
    except ValueError as error:
        raise fail(str(error)) from None
    return contents


def write(
    source: nn.Module | Contents | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> tuple[str, ...]:
    """Write a folder that vLLM and transformers read with the compressed-tensors package.

    Weight-only layers are written ``pack-quantized`` (W4A16, W8A16 …), dynamic and static ones
    ``int-quantized`` (W8A8). The integers, scales and zero points are those of the layers, so that
    dequantized weights are equal.

    Args:
        source: a quantized model, the path of a checkpoint of zeropoint's, or :class:`Contents`.
        folder: to write, complete or not at all; must not exist, or be empty.
        config: the config.json of the float model, as a mapping or a file; ``quantization_config``
            is added to it. Without one, config.json holds that alone.

    Returns:
        What is left behind, in words; empty where nothing is.

    Raises:
        TypeError: ``source`` or ``config`` of another type.
        CheckpointError: no quantized layer; a layer with an input factor, with groups that do not
            divide its inputs, or without entries: the format cannot hold it. Nothing is written.
        FileExistsError: ``folder`` is not empty.
        OSError: the file system's.

    >>> import tempfile, zeropoint
    >>> model = zeropoint.quantize(nn.Sequential(nn.Linear(32, 8)), "int8-weight-only")
    >>> with tempfile.TemporaryDirectory() as there:
    ...     left = write(model, f"{there}/model")
    ...     read(f"{there}/model").layers["0"].weight.shape
    torch.Size([8, 32])
    """
    if not isinstance(source, Contents):
        source = of_model(source) if isinstance(source, nn.Module) else of_checkpoint(source)
    base = _base_config(config)
    if not source.layers:
        raise CheckpointError(source.path, "there is no quantized layer to write")
    tensors: dict[str, Tensor] = dict(source.tensors)
    schemes: dict[str, Scheme] = {}
    left = [f"the integers of {name!r}: {reason}" for name, reason in source.dequantized.items()]
    for name, layer in source.layers.items():
        schemes[name], own = _layer(source.path, name, layer)
        tensors |= {qualified(name, key): tensor for key, tensor in own.items()}
        if layer.output_qparams is not None:
            left.append(f"the output scale of {name!r}: outputs are floats there")
    for name, tensor in tensors.items():
        if dtype_name(tensor.dtype) is None:
            raise CheckpointError(folder, f"{tensor.dtype} has no name there", tensor=name)
    floats = {
        name.removesuffix(".weight")
        for name, tensor in source.tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2 and tensor.is_floating_point()
    }
    entries = [(name, dtype_name(t.dtype) or "", t.shape) for name, t in tensors.items()]

    def metadata(infos: dict[str, TensorInfo], sha256: dict[str, str]) -> dict[str, str]:
        return {"format": "pt"}

    with new_folder(folder) as there:
        with open_writer(there / WEIGHTS, entries, metadata) as writer:
            for name, tensor in tensors.items():
                writer.write_tensor(name, tensor)
        content = {**base, "quantization_config": encode(schemes, floats)}
        write_text(there / CONFIG, json.dumps(content, indent=2) + "\n")
    return tuple(left)


def _base_config(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(path, f"not valid JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise TypeError(f"config must hold a JSON object, got {type(config).__name__}")
    return dict(config)


def _layer(path: Path, name: str, layer: LayerContents) -> tuple[Scheme, dict[str, Tensor]]:
    """A layer's scheme and its tensors, by their names within it."""
    if layer.input_factor is not None:
        raise CheckpointError(
            path, "it has an input factor, which compressed-tensors cannot hold", name
        )
    weight = layer.build().weight_qtensor()  # per channel or per group, whatever it was
    rows, columns = weight.shape
    size, bits = weight.group_size, weight.bits
    if not rows or not columns:
        raise CheckpointError(path, f"its weight is empty, {tuple(weight.shape)}", name)
    if size is not None and size > columns:
        size = None  # one group, longer than the row: that is by channel
    elif size is not None and columns % size:
        reason = f"groups of {size} do not divide its {columns} inputs, as they must there"
        raise CheckpointError(path, reason, name)
    qmin = integer_range(bits, True)[0]
    integers, zero_point = weight.int_repr(), weight.zero_point.reshape(rows, -1).to(torch.int32)
    if integers.dtype == torch.uint8:
        integers = (integers.to(torch.int16) + qmin).to(torch.int8)
        zero_point = zero_point + qmin
    symmetric, packed = not bool(zero_point.any()), layer.mode == "weight-only"
    own: dict[str, Tensor] = {"weight_scale": weight.scale.reshape(rows, -1)}
    if packed:
        own["weight_packed"] = int32_words.pack(_codes(integers, qmin), bits)
        own["weight_shape"] = torch.tensor([rows, columns])
    else:
        own["weight"] = integers
    if not symmetric:
        own["weight_zero_point"] = zero_point.to(torch.int8)
        if packed:
            codes = _codes(own["weight_zero_point"], qmin).T.contiguous()
            own["weight_zero_point"] = int32_words.pack(codes, bits).T.contiguous()
    input_symmetric = False
    if layer.input_qparams is not None:
        scale, zero = layer.input_qparams
        input_symmetric = zero == 128
        own["input_scale"] = torch.tensor([scale], dtype=torch.float32)
        if not input_symmetric:
            own["input_zero_point"] = torch.tensor([zero - 128], dtype=torch.int8)
    if layer.bias is not None:
        own["bias"] = layer.bias
    strategy = "channel" if size is None else "group"
    scheme = Scheme(bits, symmetric, strategy, size, layer.mode, input_symmetric, packed)
    return scheme, own


def _codes(integers: Tensor, qmin: int) -> Tensor:
    return (integers.to(torch.int16) - qmin).to(torch.uint8)
