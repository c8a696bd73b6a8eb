"""ONNX Runtime, called through bindings made beforehand, which is its fastest way."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .common import (
    GROUP,
    INPUT_SCALE,
    INPUT_ZERO,
    OUTPUT_ZERO,
    Case,
    Layer,
    Peer,
    integer_input,
    integer_output,
)

NUMPY = {torch.float32: np.float32, torch.uint8: np.uint8}
FLOAT, UINT8 = 1, 2  # of onnx.TensorProto


def missing() -> str | None:
    for module in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None


def _session(
    operator: str, constants: dict[str, Any], case: Case, types: tuple[int, int], **attributes: Any
) -> Any:
    """A session of one node, whose inputs are ``x`` and then the constants; "" is left out."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    n, k = case.weight.shape
    domain = "" if operator == "Gemm" else "com.microsoft"
    names = [name if value is not None else "" for name, value in constants.items()]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *names], ["y"], domain=domain, **attributes)],
        "layer",
        [helper.make_tensor_value_info("x", types[0], ["rows", k])],
        [helper.make_tensor_value_info("y", types[1], ["rows", n])],
        [
            numpy_helper.from_array(np.ascontiguousarray(value), name)
            for name, value in constants.items()
            if value is not None
        ],
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _layer(session: Any, case: Case, inputs: Any, output: torch.dtype, floats: Any) -> Layer:
    n = case.weight.shape[0]

    def convert(x: Tensor) -> Any:
        x = inputs(x)
        y = torch.empty(x.shape[0], n, dtype=output)
        binding = session.io_binding()
        for bind, name, t in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
            bind(name, "cpu", 0, NUMPY[t.dtype], tuple(t.shape), t.data_ptr())
        return binding, x, y

    def run(bound: Any) -> Tensor:
        session.run_with_iobinding(bound[0])
        return bound[2]

    return Layer(run, convert, floats)


def _same(x: Tensor) -> Tensor:
    return x


def _float32(case: Case, rows: int) -> Layer:
    constants = {"w": case.weight.numpy(), "b": case.bias.numpy()}
    session = _session("Gemm", constants, case, (FLOAT, FLOAT), transB=1)
    return _layer(session, case, _same, torch.float32, _same)


def _dynamic(case: Case, rows: int) -> Layer:
    constants = {
        "w": case.integers.t().numpy(),
        "scale": case.scale.numpy(),
        "zero": None,
        "b": case.bias.numpy(),
    }
    session = _session("DynamicQuantizeMatMul", constants, case, (FLOAT, FLOAT))
    return _layer(session, case, _same, torch.float32, _same)


def _static(case: Case, rows: int, integers: bool) -> Layer:
    constants: dict[str, Any] = {
        "x_scale": np.float32(INPUT_SCALE),
        "x_zero": np.uint8(INPUT_ZERO),
        "w": case.integers.t().numpy(),
        "w_scale": case.scale.numpy(),
        "w_zero": np.zeros(len(case.scale), np.int8),
        "b": (case.bias / (case.scale * INPUT_SCALE)).round().int().numpy(),
    }
    if integers:
        constants |= {"y_scale": np.float32(case.output_scale), "y_zero": np.uint8(OUTPUT_ZERO)}
    session = _session("QGemm", constants, case, (UINT8, UINT8 if integers else FLOAT))
    if integers:
        return _layer(session, case, integer_input, torch.uint8, integer_output(case))
    return _layer(session, case, integer_input, torch.float32, _same)


def _nbits(case: Case, rows: int, level: int) -> Layer:
    """``MatMulNBits``: with level 4 activations are quantized by blocks, with 0 they are not.

    1, 2 and 3 take the way of 0 where inputs are float32.
    """
    n, k = case.weight.shape
    pairs = (case.codes[:, 1::2] << 4 | case.codes[:, ::2]).reshape(n, k // GROUP, GROUP // 2)
    constants: dict[str, Any] = {
        "w": pairs.contiguous().numpy(),
        "scale": case.group_scale.float().reshape(-1).numpy(),
        "zero": None,  # 8
        "index": None,
        "b": case.bias.numpy(),
    }
    sizes = {"K": k, "N": n, "bits": 4, "block_size": GROUP, "accuracy_level": level}
    session = _session("MatMulNBits", constants, case, (FLOAT, FLOAT), **sizes)
    return _layer(session, case, _same, torch.float32, _same)


PEERS = [
    Peer("ONNX Runtime", "float32", _float32),
    Peer("ONNX Runtime", "int8 static u8→u8", partial(_static, integers=True)),
    Peer("ONNX Runtime", "int8 static u8→f32", partial(_static, integers=False)),
    Peer("ONNX Runtime", "int8 dynamic", _dynamic),
    Peer("ONNX Runtime", "int4 dynamic", partial(_nbits, level=4)),
    Peer("ONNX Runtime", "int4 weight-only f32", partial(_nbits, level=0)),
]
