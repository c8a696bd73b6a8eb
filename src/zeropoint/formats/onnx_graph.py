"""Building a part of an ONNX graph: nodes, constants, and what takes another's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


class Builder:
    """Makes the nodes that replace one node, and remembers what all of them can share.

    Args:
        model: to be changed.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._nodes: list[ir.Node] = []
        self._constants: dict[Any, ir.Value] = {}
        self._shared: dict[Any, Any] = {}

    def __call__(self, op: str, *inputs: ir.Value | None, domain: str = "", **more: Any) -> Any:
        """The one output of a new node."""
        if domain:
            self._model.opset_imports.setdefault(domain, 1)
        node = ir.node(op, list(inputs), attributes=more, domain=domain)
        self._nodes.append(node)
        return node.outputs[0]

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, or what it returned for the same key in this graph."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def scalar(self, value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        key = f"zeropoint.{dtype.name.lower()}.{value}"
        return self.constant(key, lambda: np.array(value, dtype=dtype.numpy()))

    def numbers(self, values: list[int]) -> ir.Value:
        key = f"zeropoint.axis.{'.'.join(map(str, values))}"
        return self.constant(key, lambda: torch.tensor(values))

    def constant(
        self, name: str, make: Callable[[], Any], dtype: ir.DataType | None = None
    ) -> ir.Value:
        """An initializer of that name, of the array or tensor that ``make()`` gives at first."""
        if name in self._constants:
            return self._constants[name]
        held = make()
        if isinstance(held, Tensor):
            tensor: Any = TorchTensor(held.contiguous(), name=name)
        else:
            tensor = ir.Tensor(np.asarray(held), dtype=dtype, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
        graph = self._model.graph
        if name in graph.initializers:
            raise ValueError(f"the model has a tensor with the name {name!r} already")
        graph.initializers[name] = value
        self._constants[name] = value
        return value

    def cast(self, x: ir.Value, dtype: ir.DataType | None, to: ir.DataType) -> ir.Value:
        return x if dtype == to else self("Cast", x, to=int(to))

    def replace(self, node: ir.Node, output: ir.Value) -> None:
        """Put all nodes made since the last time in place of ``node``, for its one output."""
        old, graph = node.outputs[0], node.graph
        assert graph is not None
        ir.convenience.replace_nodes_and_values(graph, node, [node], self._nodes, [old], [output])
        self._nodes = []


def constant_of(value: ir.Value, what: str) -> Tensor:
    """The tensor of an initializer.

    Raises:
        ValueError: the value is computed, or comes from outside.
    """
    const = value.const_value
    if const is None:
        raise ValueError(
            f"{what} must be a parameter or buffer of the model, or a number; {value.name!r} is "
            "computed in the graph"
        )
    raw = getattr(const, "raw", None)
    if isinstance(raw, Tensor):
        return raw.detach()
    array = const.numpy()
    if const.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def remove_unused(model: ir.Model) -> None:
    """Initializers that nothing uses any more."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
