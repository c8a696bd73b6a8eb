"""Checkpoints of GPTQ, as AutoGPTQ and GPTQModel write them: read. See docs/interop.md.

The layout (https://github.com/ModelCloud/GPTQModel, ``nn_modules/qlinear``): ``qweight`` int32
``(in · bits / 32, out)``, packed along the inputs; ``qzeros`` int32 ``(groups, out · bits / 32)``,
packed along the outputs; ``scales`` ``(groups, out)``; ``g_idx`` int32 ``(in,)``, the group of each
input. ``real = scale · (q − zero_point)``. Version 1 stores zero points less one, version 2 as they
are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from . import int32_words
from .container import CheckpointError
from .contents import Contents, LayerContents
from .foreign_scales import to_qtensor
from .header import qualified
from .hf_folder import FLOATS, Folder, open_folder

__all__ = ["CheckpointError", "read"]

_OWN = ("qweight", "qzeros", "scales", "g_idx", "bias")
_VERSIONS = {"gptq": "v1", "gptq_v2": "v2"}
_REASON = "its inputs are in an order of their own (g_idx), which an integer layer has not"


def read(
    path: str | os.PathLike[str],
    *,
    zero_points: Literal["v1", "v2"] | None = None,
    reordered: Literal["refuse", "dequantize"] = "refuse",
) -> Contents:
    """What a GPTQ checkpoint holds: weights of 2, 3, 4 or 8 bits, floats as activations.

    Args:
        path: a folder with config.json (or AutoGPTQ's quantize_config.json) and safetensors files,
            or one such file beside its config.
        zero_points: the convention; by default what ``checkpoint_format`` says, ``"v1"`` where it
            says nothing.
        reordered: what to do with layers whose groups are not runs of neighbouring inputs
            (``desc_act`` without static groups). ``"dequantize"`` makes them floats, in the dtype
            of their scales, rounded once.

    Returns:
        The layers, weight-only, and all other tensors as they are. Scales by group keep their
        dtype; a scale an output channel becomes float32.

    Raises:
        ValueError: an argument that is none of those.
        CheckpointError: a damaged or contradicting file; another packing (Marlin, BitBLAS …), bits
            that differ by layer; a zero point of version 1 that is stored as the largest code,
            which means 0 to some readers and ``2**bits`` to others; a layer that is reordered.
        OSError: a file cannot be opened or read.
    """
    if zero_points not in (None, "v1", "v2"):
        raise ValueError(f"zero_points must be 'v1', 'v2' or None, got {zero_points!r}")
    if reordered not in ("refuse", "dequantize"):
        raise ValueError(f"reordered must be 'refuse' or 'dequantize', got {reordered!r}")
    with open_folder(path) as folder:
        bits, group_size, version = _config(folder, zero_points)
        layers: dict[str, LayerContents] = {}
        used: set[str] = set()
        floats: dict[str, Tensor] = {}
        dequantized: dict[str, str] = {}
        for name in folder.infos:
            layer, _, key = name.rpartition(".")
            if key != "qweight":
                continue
            used |= {qualified(layer, own) for own in _OWN}
            read = _read_layer(folder, layer, bits, group_size, version)
            if isinstance(read, LayerContents):
                layers[layer] = read
            elif reordered == "refuse":
                reason = f"{_REASON}; reordered='dequantize' makes such layers floats"
                raise CheckpointError(folder.path, reason, layer)
            else:
                weight, bias = read
                floats[qualified(layer, "weight")] = weight
                dequantized[qualified(layer, "weight")] = _REASON
                if bias is not None:
                    floats[qualified(layer, "bias")] = bias
        if not used:
            raise CheckpointError(folder.path, "it holds no quantized layer (no qweight)")
        for name in folder.infos:
            if name not in used:
                if name in floats:
                    raise CheckpointError(
                        folder.path, "it is beside the layer's integers", tensor=name
                    )
                floats[name] = folder.tensor(name)
        return Contents(folder.path, "gptq", layers, floats, dequantized)


def _config(folder: Folder, version: str | None) -> tuple[int, int, str]:
    config = folder.quantization

    def fail(reason: str) -> CheckpointError:
        return CheckpointError(folder.path, f"quantization_config: {reason}")

    if config.get("quant_method", "gptq") != "gptq" or not config:
        got = str(config.get("quant_method"))[:40]
        raise fail(f"quant_method must be 'gptq', got {got!r}")
    bits, group_size = config.get("bits"), config.get("group_size")
    if bits not in (2, 3, 4, 8) or type(bits) is not int:
        raise fail(f"bits must be 2, 3, 4 or 8, got {str(bits)[:40]}")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise fail(f"group_size must be an integer from 1, or -1, got {str(group_size)[:40]}")
    if config.get("dynamic"):
        raise fail("bits or groups that differ by layer (dynamic) are not read")
    form = config.get("checkpoint_format") or "gptq"
    if not isinstance(form, str) or form not in _VERSIONS:
        raise fail(f"checkpoint_format must be 'gptq' or 'gptq_v2', got {str(form)[:40]!r}")
    return bits, group_size, version or _VERSIONS[form]


def _read_layer(
    folder: Folder, layer: str, bits: int, group_size: int, version: str
) -> LayerContents | tuple[Tensor, Tensor | None]:
    """The layer; or, where its inputs are reordered, its float weight and bias."""
    path = folder.path

    def fail(reason: str, key: str) -> CheckpointError:
        return CheckpointError(path, reason, layer, qualified(layer, key))

    qweight = folder.of_layer(layer, "qweight", torch.int32)
    if qweight.ndim != 2 or qweight.shape[0] * 32 % bits:
        raise fail(f"no packed weight of {bits} bits: shape {list(qweight.shape)}", "qweight")
    in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
    size = in_features if group_size == -1 else group_size
    groups = -(-in_features // size) if size else 0
    if not in_features or not out_features:
        raise fail("an empty weight", "qweight")
    scales = folder.of_layer(layer, "scales", *FLOATS, shape=(groups, out_features))
    zeros_shape = (groups, int32_words.words(out_features, bits))
    qzeros = folder.of_layer(layer, "qzeros", torch.int32, shape=zeros_shape)
    codes = int32_words.unpack(qweight.T.contiguous(), bits, in_features)
    zero_point = int32_words.unpack(qzeros, bits, out_features).to(torch.int32).T.contiguous()
    if version == "v1":
        if bool((zero_point == (1 << bits) - 1).any()):
            raise fail(
                f"a zero point is stored as {(1 << bits) - 1}: with version 1, which stores it "
                f"less one, some readers take that for 0 and others for {1 << bits}",
                "qzeros",
            )
        zero_point = zero_point + 1
    bias = None
    if qualified(layer, "bias") in folder.infos:
        bias = folder.of_layer(layer, "bias", *FLOATS, shape=(out_features,))
    scale = scales.T.contiguous()
    order = torch.arange(in_features) // size
    if qualified(layer, "g_idx") in folder.infos:
        integers = (torch.int32, torch.int64)
        order = folder.of_layer(layer, "g_idx", *integers, shape=(in_features,)).to(torch.int64)
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise fail(f"must hold groups from 0 to {groups - 1}", "g_idx")
    if not torch.equal(order, torch.arange(in_features) // size):
        if not bool(scale.isfinite().all()):
            raise fail("must be finite", "scales")
        steps = codes.to(torch.int32) - zero_point[:, order]
        weight = steps.to(torch.float32) * scale.to(torch.float32)[:, order]
        return weight.to(scales.dtype), bias
    groups_of = None if group_size == -1 else group_size
    weight_q = to_qtensor(Path(path), layer, codes, scale, zero_point, bits, groups_of)
    return LayerContents(weight_q, bias)
