"""ONNX files, written and run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zeropoint import QuantizedLinear, available_isas
from zeropoint.formats import onnx as zp_onnx
from zeropoint.reference import quantize_rows, quantize_static

onnx = pytest.importorskip("onnx", reason="needs zeropoint[onnx]")
pytest.importorskip("onnxscript", reason="needs zeropoint[onnx]")
onnxruntime = pytest.importorskip("onnxruntime")

ANY = torch.export.Dim.DYNAMIC
# Without VNNI, ONNX Runtime's products of bytes saturate on x86 unless it is told to be exact.
PRECISE = {"session.x64quantprecision": "1"}
VNNI = any("vnni" in isa or "amx" in isa for isa in available_isas())
DEFAULT = PRECISE if "avx2" in available_isas() and not VNNI else {}
# DequantizeLinear before a MatMul of floats would become a product of integers.
FLOATS = {**DEFAULT, "session.qdq_matmulnbits_accuracy_level": "1"}


def run(path: Path, *inputs: Tensor, entries: dict[str, str] = DEFAULT) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


def through(
    model: nn.Module, path: Path, *inputs: Tensor, entries: dict[str, str] = DEFAULT, **how: Any
) -> list[Tensor]:
    """Written and run."""
    zp_onnx.write(model, path, inputs, **how)
    return run(path, *inputs, entries=entries)


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → type and shape of what the file holds."""
    graph = onnx.load(path).graph
    kind = onnx.TensorProto.DataType.Name
    return {t.name: (kind(t.data_type), tuple(t.dims)) for t in graph.initializer}


def nodes(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def bound(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """What docs/onnx.md says that outputs may differ by: ``(K + 8) · 2⁻²³ · (Σ |x·w| + |b|)``, with
    the activations that the product sees: the real ones where floats are quantized, and with groups
    ``(|q − 128| + |zero_point − 128|) · scale``, since the reference counts from the middle."""
    rows = x.reshape(-1, x.shape[-1])
    real = rows.to(torch.float64)
    if layer.mode != "weight-only":
        if layer.mode == "dynamic":
            q, scale, zero_point, _ = quantize_rows(rows)
            scale, zero_point = scale[:, None], zero_point[:, None]
        else:
            scale, zero_point = layer.input_scale, layer.input_zero_point
            q, _ = quantize_static(rows, scale, zero_point)
        steps = q - zero_point
        if layer.group_size is not None:
            steps = (q - 128).abs() + (zero_point - 128).abs()
        real = steps * scale.to(torch.float64)
    weight = layer.weight_qtensor().dequantize().double()
    size = (real.abs() @ weight.abs().T).reshape(*x.shape[:-1], layer.out_features)
    if layer.bias is not None:
        size = size + layer.bias.double().abs()
    return (layer.in_features + 8) * 2.0**-23 * size


class Several(nn.Module):
    """Modules that get the same input, their outputs side by side: one export for all."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x) for module in self.parts.values())


class Calls(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(*inputs)
