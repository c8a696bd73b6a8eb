"""torchao, eager and compiled with torch.compile, which takes seconds a layer.

Its weights of 4 bits take no part: on CPUs they are unpacked to floats in every call, or need
kernels that the wheels (0.18) do not bring.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import torch

from .common import Case, Layer, Peer


def missing() -> str | None:
    return None if importlib.util.find_spec("torchao") else "torchao is not installed"


def _layer(
    case: Case, rows: int, config: str, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> Layer:
    import torchao.quantization as ao

    n, k = case.weight.shape
    linear = torch.nn.utils.skip_init(torch.nn.Linear, k, n)
    with torch.no_grad():
        linear.weight.copy_(case.weight)
        linear.bias.copy_(case.bias)
    model = torch.nn.Sequential(linear).to(dtype).eval().requires_grad_(False)
    # A subclass of tensors cannot be made in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        ao.quantize_(model, getattr(ao, config)())
    if compiled:
        torch._dynamo.reset()
        return Layer(_frozen(model), lambda x: x.to(dtype))
    return Layer(model, lambda x: x.to(dtype))


def _frozen(model: torch.nn.Module) -> torch.nn.Module:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]


W8A8, W8 = "Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"
PEERS = [
    Peer("torchao", "int8 dynamic", partial(_layer, config=W8A8)),
    Peer("torchao", "int8 weight-only f32", partial(_layer, config=W8)),
    Peer(
        "torchao",
        "int8 weight-only bf16",
        partial(_layer, config=W8, dtype=torch.bfloat16),
    ),
    Peer(
        "torchao compiled",
        "int8 dynamic",
        partial(_layer, config=W8A8, compiled=True),
        per_rows=True,
        slow=True,
    ),
    Peer(
        "torchao compiled",
        "int8 weight-only f32",
        partial(_layer, config=W8, compiled=True),
        per_rows=True,
        slow=True,
    ),
    Peer(
        "torchao compiled",
        "int8 weight-only bf16",
        partial(_layer, config=W8, dtype=torch.bfloat16, compiled=True),
        per_rows=True,
        slow=True,
    ),
]
