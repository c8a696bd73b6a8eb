"""Checkpoints of AWQ, as AutoAWQ writes them (version GEMM): read. See docs/interop.md.

The layout (https://github.com/casper-hansen/AutoAWQ, ``awq/modules/linear/gemm.py``): ``qweight``
int32 ``(in, out / 8)`` and ``qzeros`` int32 ``(groups, out / 8)``, both packed along the outputs,
the eight nibbles of a word being the outputs 0, 2, 4, 6, 1, 3, 5, 7; ``scales`` ``(groups, out)``.
``real = scale · (q − zero_point)``. The smoothing that AWQ found is in the weights and in what
stands before the layers; nothing of it is left to do.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import int32_words
from .container import CheckpointError
from .contents import Contents, LayerContents
from .foreign_scales import to_qtensor
from .header import qualified
from .hf_folder import FLOATS, Folder, open_folder

__all__ = ["CheckpointError", "read"]

_OWN = ("qweight", "qzeros", "scales", "bias")
_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


def read(path: str | os.PathLike[str]) -> Contents:
    """What an AWQ checkpoint holds: weights of 4 bits by group, floats as activations.

    Args:
        path: a folder with config.json and safetensors files, or one such file beside its config.

    Returns:
        The layers, weight-only, and all other tensors as they are.

    Raises:
        CheckpointError: a damaged or contradicting file, or another version (GEMV, Marlin …) or
            width.
        OSError: a file cannot be opened or read.
    """
    with open_folder(path) as folder:
        group_size, zero_points = _config(folder)
        layers: dict[str, LayerContents] = {}
        used: set[str] = set()
        for name in folder.infos:
            layer, _, key = name.rpartition(".")
            if key == "qweight":
                layers[layer] = _read_layer(folder, layer, group_size, zero_points)
                used |= {qualified(layer, own) for own in _OWN}
        if not layers:
            raise CheckpointError(folder.path, "it holds no quantized layer (no qweight)")
        tensors = {name: folder.tensor(name) for name in folder.infos if name not in used}
        return Contents(folder.path, "awq", layers, tensors)


def _config(folder: Folder) -> tuple[int, bool]:
    config = folder.quantization

    def fail(reason: str) -> CheckpointError:
        return CheckpointError(folder.path, f"quantization_config: {reason}")

    if config.get("quant_method") != "awq":
        got = str(config.get("quant_method"))[:40]
        raise fail(f"quant_method must be 'awq', got {got!r}")
    version, bits = config.get("version", "gemm"), config.get("bits", config.get("w_bit"))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise fail(f"version must be 'gemm', got {str(version)[:40]!r}")
    if type(bits) is not int or bits != 4:
        raise fail(f"bits must be 4, got {str(bits)[:40]}")
    group_size = config.get("group_size", config.get("q_group_size"))
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise fail(f"group_size must be an integer from 1, or -1, got {str(group_size)[:40]}")
    zero_points = config.get("zero_point", True)
    if type(zero_points) is not bool:
        raise fail(f"zero_point must be true or false, got {str(zero_points)[:40]}")
    return group_size, zero_points


def _read_layer(folder: Folder, layer: str, group_size: int, zero_points: bool) -> LayerContents:
    qweight = folder.of_layer(layer, "qweight", torch.int32)
    if qweight.ndim != 2 or not qweight.numel():
        reason = f"no packed weight: shape {list(qweight.shape)}"
        raise CheckpointError(folder.path, reason, layer, qualified(layer, "qweight"))
    in_features, words = qweight.shape
    out_features = words * 8
    size = in_features if group_size == -1 else group_size
    groups = -(-in_features // size)
    scales = folder.of_layer(layer, "scales", *FLOATS, shape=(groups, out_features))
    zero_point = torch.full((out_features, groups), 8, dtype=torch.int32)
    if zero_points:
        qzeros = folder.of_layer(layer, "qzeros", torch.int32, shape=(groups, words))
        zero_point = _unpack(qzeros).to(torch.int32)
    bias = None
    if qualified(layer, "bias") in folder.infos:
        bias = folder.of_layer(layer, "bias", *FLOATS, shape=(out_features,))
    weight = to_qtensor(
        folder.path,
        layer,
        _unpack(qweight),
        scales.T.contiguous(),
        zero_point,
        4,
        None if group_size == -1 else group_size,
    )
    return LayerContents(weight, bias)


def _unpack(packed: Tensor) -> Tensor:
    """``(rows, out / 8)`` int32 as ``(out, rows)`` uint8."""
    nibbles = int32_words.unpack(packed, 4, packed.shape[1] * 8)
    by_word = nibbles.reshape(packed.shape[0], -1, 8)[..., list(_NIBBLE_OF_OUTPUT)]
    return by_word.reshape(packed.shape[0], -1).T.contiguous()
