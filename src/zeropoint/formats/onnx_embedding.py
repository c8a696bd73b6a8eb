"""Rows of a quantized table in ONNX: gathered as integers, then dequantized."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from .onnx_graph import Builder

_FLOAT, _UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
_INT32 = ir.DataType.INT32


def embedding(new: Builder, given: Any, attributes: Any, weight: ir.Value | None) -> ir.Value:
    """:class:`zeropoint.QuantizedEmbedding`, bit for bit, by ONNX's own operators.

    Args:
        given: the inputs of the node: indices, and the table's weight, scale and zero point.
        attributes: of the node.
        weight: integers of 4 bits, packed, or 8, in place of the table's.
    """
    index, columns = given["input"], attributes["in_features"]
    group_size = attributes.get("group_size")
    weight = given["weight"] if weight is None else weight
    rows = new("Gather", weight, index, axis=0)
    if attributes["bits"] <= 4:
        rows = _unpacked(new, rows, index, columns)
    integers = new.cast(rows, weight.dtype, _INT32)

    def of_entries(key: str, dtype: ir.DataType) -> ir.Value:
        value = new("Gather", given[key], index, axis=0)
        if group_size is None:
            value = new("Unsqueeze", value, new.numbers([-1]))
        elif group_size < columns:
            groups = new.constant(
                f"zeropoint.groups.{columns}.{group_size}",
                lambda: torch.arange(columns) // group_size,
            )
            value = new("Gather", value, groups, axis=-1)
        return new.cast(value, given[key].dtype, dtype)

    integers = new("Sub", integers, of_entries("zero_point", _INT32))
    real = new("Mul", new.cast(integers, _INT32, _FLOAT), of_entries("scale", _FLOAT))
    return new.cast(real, _FLOAT, ir.DataType(attributes["dtype"]))


def _unpacked(new: Builder, rows: ir.Value, index: ir.Value, columns: int) -> ir.Value:
    """Two codes of 4 bits out of each byte, the first from its low half."""
    last = new.numbers([-1])
    low = new("BitwiseAnd", rows, new.scalar(15, _UINT8))
    high = new("BitShift", rows, new.scalar(4, _UINT8), direction="RIGHT")
    pairs = new("Concat", new("Unsqueeze", low, last), new("Unsqueeze", high, last), axis=-1)
    width = new.numbers([columns + columns % 2])
    rows = new("Reshape", pairs, new("Concat", new("Shape", index), width, axis=0))
    if columns % 2:
        rows = new("Slice", rows, new.numbers([0]), new.numbers([columns]), last)
    return rows
