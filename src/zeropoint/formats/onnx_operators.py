"""zeropoint's operators as single nodes of the graph that torch's ONNX exporter makes.

In torch's exported program a quantized layer is one operator on plain tensors
(:mod:`zeropoint.ops`). Each is translated into one node of the domain ``zeropoint``, which no
optimization of the exporter sees through: integer weights stay what they are until
:mod:`zeropoint.formats.onnx_lowering` puts ONNX's operators in its place. Imports onnx and
onnxscript.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript import values
from torch import Tensor, nn
from torch.library import Library, register_fake

from .. import ops as _ops  # makes torch.ops.zeropoint
from ..embedding import QuantizedEmbedding

__all__ = ["DOMAIN", "OPERATORS", "embeddings_as_nodes", "translations"]

DOMAIN = "zeropoint"
_WEIGHT = ("input", "weight", "scale", "zero_point", "bias")
_INPUT = ("input_scale", "input_zero_point")
_OUTPUT = ("output_scale", "output_zero_point")
_POST = ("activation", "residual")
OPERATORS: dict[str, tuple[str, ...]] = {
    "linear_dynamic": (*_WEIGHT, *_POST),
    "linear_weight_only": (*_WEIGHT, *_POST),
    "linear_static": (*_WEIGHT, *_INPUT, *_POST),
    "linear_integer": (*_WEIGHT, *_INPUT, *_POST),
    "linear_quantized": (*_WEIGHT, *_INPUT, *_OUTPUT, "activation"),
    "linear_float": ("input", "weight", "bias", *_POST),
    "embedding": ("input", "weight", "scale", "zero_point"),
}
"""Name → arguments, in order. All but the activation, an attribute, are inputs of the node."""

# A table's rows are looked up by plain operations of torch, whose translation below 8 bits is long
# and wrong (torch 2.13: BitwiseAnd of int8 and uint8). While exporting they are one operator.
_LIBRARY = Library("zeropoint_onnx", "DEF")
_LIBRARY.define(
    "embedding(Tensor input, Tensor weight, Tensor scale, Tensor zero_point, *, int bits, "
    "int? group_size, int in_features, ScalarType dtype) -> Tensor"
)


def _fake_embedding(input: Tensor, weight: Tensor, *_: Tensor, **layout: Any) -> Tensor:
    return weight.new_empty((*input.shape, layout["in_features"]), dtype=layout["dtype"])


register_fake("zeropoint_onnx::embedding", _fake_embedding, lib=_LIBRARY)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` of ``torch.onnx.export``."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        getattr(torch.ops.zeropoint, name).default: _translation(name)
        for name in OPERATORS
        if hasattr(_ops, name)
    }
    table[torch.ops.zeropoint_onnx.embedding.default] = _translation("embedding")
    return table


def _translation(name: str) -> Callable[..., Any]:
    operator = values.Op(values.Opset(DOMAIN, 1), name, _schema(name))

    def translate(*arguments: Any, **layout: Any) -> Any:
        given = dict(zip(OPERATORS[name], arguments, strict=False))
        given |= {key: layout.pop(key) for key in OPERATORS[name] if key in layout}
        inputs = [given.get(key) for key in OPERATORS[name] if key != "activation"]
        attributes = {key: int(value) for key, value in layout.items() if value is not None}
        if given.get("activation") is not None:
            attributes["activation"] = given["activation"]
        return operator(*inputs, **attributes)

    translate.__name__ = name
    return translate


def _schema(name: str) -> OpSchema:
    """Of a node, so that onnxscript knows inputs from attributes."""
    kinds = ("float", "float16", "bfloat16", "double", "int8", "uint8", "int32", "int64")
    parameter, attribute = OpSchema.FormalParameter, OpSchema.Attribute
    optional = OpSchema.FormalParameterOption.Optional
    single = OpSchema.FormalParameterOption.Single
    names = [key for key in OPERATORS[name] if key != "activation"]
    inputs = [
        parameter(key, f"T{i}", param_option=optional if key in ("bias", "residual") else single)
        for i, key in enumerate(names)
    ]
    numbers = ("bits", "signed", "group_size", "in_features", "dtype")
    return OpSchema(
        name,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[parameter("output", "T")],
        type_constraints=[
            (key, [f"tensor({kind})" for kind in kinds], "")
            for key in ("T", *(f"T{i}" for i in range(len(names))))
        ],
        attributes=[
            *(attribute(key, OpSchema.AttrType.INT, "", required=False) for key in numbers),
            attribute("activation", OpSchema.AttrType.STRING, "", required=False),
        ],
    )


@contextmanager
def embeddings_as_nodes(model: nn.Module) -> Iterator[None]:
    """Quantized embeddings call one operator, until the block ends."""
    before = {
        module: module.__dict__.get("forward")
        for module in model.modules()
        if isinstance(module, QuantizedEmbedding)
    }
    try:
        for module in before:
            module.__dict__["forward"] = _lookup(module)
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _lookup(table: QuantizedEmbedding) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        return torch.ops.zeropoint_onnx.embedding(
            input,
            table.weight,
            table.scale,
            table.zero_point,
            bits=table.bits,
            group_size=table.group_size,
            in_features=table.embedding_dim,
            dtype=table.output_dtype,
        )

    return forward
