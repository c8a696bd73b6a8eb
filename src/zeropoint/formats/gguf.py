"""GGUF, the files of llama.cpp: Q8_0, Q4_0 and Q4_1 written and read, all other quantized types
read as floats. Needs the gguf package: ``pip install 'zeropoint[gguf]'``. See docs/interop.md.

A block is 32 values of a row: Q8_0 holds a float16 ``d`` and signed bytes, ``d·q``; Q4_0 a ``d``,
which may be negative, and nibbles, ``d·(q − 8)``; Q4_1 a ``d``, a minimum ``m`` and nibbles,
``d·q + m``. In both, the low halves of 16 bytes are the first 16 values, the high halves the rest.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..spec import integer_range
from .container import CheckpointError
from .contents import Contents, LayerContents, of_checkpoint, of_model
from .foreign_scales import to_qtensor
from .gguf_file import GgufFile, GgufTensor, open_gguf
from .header import qualified

__all__ = ["CheckpointError", "read", "write"]

_BLOCK = 32
_PLAIN = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"GGUF files need the gguf package ({error}): pip install 'zeropoint[gguf]'"
        ) from error
    return gguf


def read(
    path: str | os.PathLike[str], *, q4_1: Literal["floats", "integers"] = "floats"
) -> Contents:
    """What a GGUF file holds, under its own names (``blk.0.attn_q.weight``).

    Two-dimensional weights in Q8_0 and Q4_0 become layers, weight-only, in groups of 32 with
    float16 scales: exactly what :func:`gguf.quants.dequantize` gives. Everything else that is
    quantized becomes float32 by that function. Which weights are of Linear layers a file does not
    say: an embedding table counts as a layer.

    Args:
        path: the file, of version 2 or 3, little-endian.
        q4_1: Q4_1 has a real minimum where an integer layer has a zero point. ``"integers"`` takes
            the zero point that the minimum was rounded from, as :func:`write` rounds it, and
            refuses a file where there is none.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: ``q4_1`` is neither.
        CheckpointError: a damaged file; a type that the package cannot dequantize.
        OSError: it cannot be opened or read.
    """
    package = _package()
    if q4_1 not in ("floats", "integers"):
        raise ValueError(f"q4_1 must be 'floats' or 'integers', got {q4_1!r}")
    integer = ("Q8_0", "Q4_0", "Q4_1") if q4_1 == "integers" else ("Q8_0", "Q4_0")
    layers: dict[str, LayerContents] = {}
    tensors: dict[str, Tensor] = {}
    dequantized: dict[str, str] = {}
    with open_gguf(path) as file:
        names = set(file.tensors)
        biases = set()
        for name, tensor in file.tensors.items():
            kind, data = _load(package, file, tensor)
            layer = name.removesuffix("weight").removesuffix(".")
            is_weight = name == qualified(layer, "weight") and len(tensor.shape) == 2
            if kind in integer and is_weight and 0 not in tensor.shape:
                bias_name = qualified(layer, "bias")
                bias = None
                if bias_name in names and file.tensors[bias_name].shape == tensor.shape[:1]:
                    bias_kind, bias_data = _load(package, file, file.tensors[bias_name])
                    bias = _floats(package, file, bias_name, bias_kind, bias_data, tensor.shape[:1])
                    biases.add(bias_name)
                layers[layer] = LayerContents(_unblock(file, layer, kind, data), bias)
                continue
            tensors[name] = _floats(package, file, name, kind, data, tensor.shape)
            if kind in integer:
                dequantized[name] = f"{kind}, but no weight of two dimensions"
            elif kind not in _PLAIN:
                dequantized[name] = f"{kind}, which has no integers with one scale and zero point"
        for name in biases:
            tensors.pop(name, None)
        return Contents(file.path, "gguf", layers, tensors, dequantized)


def _load(package: Any, file: GgufFile, tensor: GgufTensor) -> tuple[str, Any]:
    """The name of a tensor's type, and its bytes, ``(rows, bytes of a row)``."""
    try:
        kind = package.GGMLQuantizationType(tensor.type)
        block, size = package.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        reason = f"a type that the gguf package does not know, {tensor.type}"
        raise CheckpointError(file.path, reason, tensor=tensor.name) from None
    row = tensor.shape[-1] if tensor.shape else 1
    if row % block:
        reason = f"rows of {row} are no whole number of {kind.name} blocks of {block}"
        raise CheckpointError(file.path, reason, tensor=tensor.name)
    rows, row_bytes = math.prod(tensor.shape[:-1]), row // block * size
    return kind.name, file.data(tensor, rows * row_bytes).reshape(rows, row_bytes)


def _floats(
    package: Any, file: GgufFile, name: str, kind: str, data: Any, shape: tuple[int, ...]
) -> Tensor:
    if kind in _PLAIN:
        return torch.from_numpy(data.reshape(-1)).view(_PLAIN[kind]).reshape(shape)
    try:
        with np.errstate(all="ignore"):
            floats = package.quants.dequantize(data, package.GGMLQuantizationType[kind])
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(file.path, f"{kind}: {error}", tensor=name) from None
    return torch.from_numpy(np.ascontiguousarray(floats, dtype=np.float32)).reshape(shape)


def _unblock(file: GgufFile, layer: str, kind: str, data: Any) -> Any:
    """The weight of a layer, from ``(rows, bytes)``."""
    rows = data.shape[0]
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    blocks = torch.from_numpy(data).reshape(rows, -1, size)
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    if kind == "Q8_0":
        signed = blocks[..., 2:].reshape(rows, -1).view(torch.int8)
        codes, bits = (signed.to(torch.int16) + 128).to(torch.uint8), 8
        zero_point = torch.full(scale.shape, 128, dtype=torch.int32)
    else:
        bits, nibbles = 4, blocks[..., size - 16 :]
        codes = torch.cat([nibbles & 15, nibbles >> 4], -1).reshape(rows, -1)
        zero_point = torch.full(scale.shape, 8, dtype=torch.int32)
    if kind == "Q4_1":
        minimum = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0]
        zero_point = _zero_points(file, layer, scale, minimum)
    return to_qtensor(file.path, layer, codes, scale, zero_point, bits, _BLOCK)


def _zero_points(file: GgufFile, layer: str, scale: Tensor, minimum: Tensor) -> Tensor:
    """Those that ``minimum`` was rounded from."""
    found = torch.full(scale.shape, -1, dtype=torch.int32)
    for zero_point in range(16):
        found[(_minimum(scale, torch.tensor(zero_point)) == minimum) & (found < 0)] = zero_point
    if bool((found < 0).any()):
        reason = "a Q4_1 minimum that is no whole number of steps; q4_1='floats' reads it exactly"
        raise CheckpointError(file.path, reason, layer)
    return found


def _minimum(scale: Tensor, zero_point: Tensor) -> Tensor:
    return (-scale.to(torch.float32) * zero_point).to(torch.float16)


def write(
    source: nn.Module | Contents | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    architecture: str = "zeropoint",
    metadata: Mapping[str, str | int | float | bool] | None = None,
    unfit: Literal["refuse", "floats"] = "refuse",
) -> tuple[str, ...]:
    """Write a GGUF file with the integers of a quantized model, under its own names.

    A layer in groups of 32 whose scales are float16 numbers is written as Q8_0 (8 bits, zero points
    0) or Q4_0 (4 bits, zero points 8), exactly; with other zero points as Q4_1, whose minimum is
    rounded to float16: a weight may change by half a unit in the last place of it.

    Args:
        source: a quantized model, the path of a checkpoint of zeropoint's, or :class:`Contents`.
        path: of the file, written atomically.
        architecture: ``general.architecture``. llama.cpp runs a file only if this, the names and
            the metadata are those of a model it knows; that is left to you.
        metadata: further keys.
        unfit: what to do with a layer that no type holds: ``"floats"`` writes the floats it stands
            for.

    Returns:
        What is left behind, in words: activations (all weights are weight-only there), layers
        written as floats.

    Raises:
        ImportError: the gguf package is not installed.
        TypeError, ValueError: an argument that is none of those.
        CheckpointError: a layer that no type holds, or tensors of a dtype that GGUF lacks; names
            it. Nothing is written.
        OSError: the file system's.
    """
    package = _package()
    if unfit not in ("refuse", "floats"):
        raise ValueError(f"unfit must be 'refuse' or 'floats', got {unfit!r}")
    if not isinstance(source, Contents):
        source = of_model(source) if isinstance(source, nn.Module) else of_checkpoint(source)
    kinds = package.GGMLQuantizationType
    entries: dict[str, tuple[Any, Any]] = {}
    left = [f"the integers of {name!r}: {reason}" for name, reason in source.dequantized.items()]
    for name, tensor in source.tensors.items():
        entries[name] = _plain(source.path, name, tensor, kinds)
    for name, layer in source.layers.items():
        weight = qualified(name, "weight")
        try:
            kind, blocks = _block(source.path, name, layer)
            entries[weight] = (blocks, kinds[kind])
        except CheckpointError as error:
            if unfit == "refuse":
                raise
            entries[weight] = (layer.build().dequantize().weight.detach().numpy(), kinds.F32)
            left.append(f"the integers of {name!r}: {error.reason}")
        if layer.bias is not None:
            entries[qualified(name, "bias")] = _plain(source.path, name, layer.bias, kinds)
        if layer.mode != "weight-only":
            left.append(f"the {layer.mode} activations of {name!r}")
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".zeropoint-{secrets.token_hex(8)}.tmp"
    try:
        writer = package.GGUFWriter(temporary, architecture)
        for key, value in (metadata or {}).items():
            adder = {str: "string", bool: "bool", int: "int64", float: "float64"}.get(type(value))
            if adder is None:
                raise TypeError(f"metadata must hold strings and numbers, got {key!r}: {value!r}")
            getattr(writer, f"add_{adder}")(key, value)
        for name, (data, kind) in entries.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return tuple(left)


def _plain(path: Path, name: str, tensor: Tensor, kinds: Any) -> tuple[Any, Any]:
    dtypes = {dtype: kind for kind, dtype in _PLAIN.items()}
    if tensor.dtype not in dtypes:
        raise CheckpointError(path, f"GGUF has no {tensor.dtype}", tensor=name)
    if tensor.ndim > 4:
        raise CheckpointError(path, f"{tensor.ndim} dimensions; GGUF has 4", tensor=name)
    data = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none: bytes, the writer wants them by rows
        raw = data.reshape(tensor.shape or (1,)).view(torch.uint8).numpy()
        return raw, kinds.BF16
    return data.reshape(tensor.shape or (1,)).numpy(), kinds[dtypes[tensor.dtype]]


def _block(path: Path, name: str, layer: LayerContents) -> tuple[str, Any]:
    """The name of the type that holds a layer, and its bytes ``(rows, bytes of a row)``."""
    weight = layer.build().weight_qtensor()
    rows, columns = weight.shape

    def fail(reason: str) -> CheckpointError:
        return CheckpointError(path, f"no GGUF type holds it: {reason}", name)

    if layer.input_factor is not None:
        raise fail("it has an input factor")
    if weight.bits not in (4, 8) or weight.group_size != _BLOCK:
        groups = "no groups" if weight.group_size is None else f"groups of {weight.group_size}"
        raise fail(f"{weight.bits} bits, {groups}; 4 or 8 bits in groups of 32 are needed")
    if columns % _BLOCK or not rows * columns:
        raise fail(f"rows of {columns} are no whole number of blocks of 32")
    scale = weight.scale.to(torch.float16)
    if not torch.equal(scale.to(torch.float32), weight.scale.to(torch.float32)):
        raise fail("a scale that is no float16 number (quantize with scale_dtype=torch.float16)")
    lowest = integer_range(weight.bits, weight.dtype == torch.int8)[0]
    zero_point = weight.zero_point.to(torch.int32) - lowest
    codes = (weight.int_repr().to(torch.int16) - lowest).reshape(rows, -1, _BLOCK)
    parts = [scale[..., None].view(torch.uint8)]
    if weight.bits == 8:
        if bool((zero_point != 128).any()):
            raise fail("8 bits with zero points")
        kind, body = "Q8_0", (codes - 128).to(torch.int8).view(torch.uint8)
    else:
        body = (codes[..., :16] | codes[..., 16:] << 4).to(torch.uint8)
        kind = "Q4_0"
        if bool((zero_point != 8).any()):
            kind, minimum = "Q4_1", _minimum(scale, zero_point)
            if not bool(minimum.isfinite().all()):
                raise fail("a minimum beyond float16")
            parts.append(minimum[..., None].view(torch.uint8))
    return kind, torch.cat([*parts, body], -1).reshape(rows, -1).numpy()
