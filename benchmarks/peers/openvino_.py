"""OpenVINO: one model of one layer, inputs bound beforehand. Its inputs and outputs are float32."""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .common import CODE_ZERO, GROUP, INPUT_SCALE, INPUT_ZERO, Case, Layer, Peer


def missing() -> str | None:
    return None if importlib.util.find_spec("openvino") else "openvino is not installed"


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _int4(case: Case) -> Any:
    """The pattern that OpenVINO knows compressed weights by, signed, without a zero point.

    With one as floats it would not quantize the activations, and take twice as long.
    """
    import openvino
    from openvino import opset13 as op

    n, k = case.weight.shape
    codes = case.codes - CODE_ZERO & 15  # two's complement
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous().numpy().reshape(-1)
    # A constant shares the memory of its tensor, which lives as long as the case.
    pairs = case.shared.setdefault("openvino int4", pairs)
    shape = openvino.Shape([n, k // GROUP, GROUP])
    integers = op.constant(openvino.Tensor(pairs, shape, openvino.Type.i4))
    scale = op.constant(case.group_scale[..., None].half().numpy())
    groups = op.multiply(op.convert(integers, np.float16), scale)
    size = op.constant(np.array([n, k], np.int64))
    return op.convert(op.reshape(groups, size, False), np.float32)


def _layer(
    case: Case, rows: int, weights: str, *, static: bool = False, hint: str = "f32", group: int = 0
) -> Layer:
    import openvino
    from openvino import opset13 as op

    k = case.weight.shape[1]
    x = op.parameter([-1, k], np.float32, name="x")
    if weights == "float":
        weight = op.constant(case.weight.numpy())
    elif weights == "int4":
        weight = _int4(case)
    else:
        weight = op.multiply(
            op.convert(op.constant(case.integers.numpy()), np.float32),
            op.constant(case.scale[:, None].numpy()),
        )
    inputs = x
    if static:
        low, high = -INPUT_ZERO * INPUT_SCALE, (255 - INPUT_ZERO) * INPUT_SCALE
        bounds = [op.constant(np.float32(v)) for v in (low, high, low, high)]
        inputs = op.fake_quantize(x, *bounds, 256)
    y = op.add(op.matmul(inputs, weight, False, True), op.constant(case.bias[None].numpy()))
    compiled = _core().compile_model(
        openvino.Model([y], [x], "layer"),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": case.threads,
            "INFERENCE_PRECISION_HINT": hint,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
        },
    )
    request = compiled.create_infer_request()

    def convert(x: Tensor) -> Any:
        tensor = openvino.Tensor(x.numpy(), shared_memory=True)
        request.set_input_tensor(tensor)
        return tensor, x

    def run(_: Any) -> Any:
        request.infer()
        return request

    def floats(done: Any) -> Tensor:
        return torch.from_numpy(done.get_output_tensor().data.copy())

    return Layer(run, convert, floats)


PEERS = [
    Peer("OpenVINO", "float32", partial(_layer, weights="float")),
    Peer("OpenVINO, f32 io", "bfloat16", partial(_layer, weights="float", hint="bf16")),
    Peer("OpenVINO", "int8 static f32→f32", partial(_layer, weights="int8", static=True)),
    Peer("OpenVINO groups of 128", "int8 dynamic", partial(_layer, weights="int8", group=128)),
    Peer("OpenVINO", "int8 weight-only f32", partial(_layer, weights="int8")),
    Peer("OpenVINO, f32 io", "int8 weight-only bf16", partial(_layer, weights="int8", hint="bf16")),
    Peer("OpenVINO", "int4 dynamic", partial(_layer, weights="int4", group=GROUP)),
    Peer("OpenVINO", "int4 weight-only f32", partial(_layer, weights="int4")),
    Peer("OpenVINO, f32 io", "int4 weight-only bf16", partial(_layer, weights="int4", hint="bf16")),
]
