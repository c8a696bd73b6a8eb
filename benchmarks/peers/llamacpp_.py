"""llama.cpp: ggml's product of quantized weights and float32 inputs, plus a bias.

Each of its buffer types is a peer: weights as a file holds them, interleaved for the instruction
set (which llama.cpp prefers), and in tiles for AMX (which it prefers to those). Inputs are
quantized to 8 bits in every call, in blocks of 32 (of 256 for Q4_K).

It is compiled for the CPU it is installed on, beside libraries that use AMX too by::

    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS=-include$PWD/benchmarks/peers/llamacpp_amx.h" \\
        pip install --no-binary llama-cpp-python llama-cpp-python
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ggml
from .common import Case, Layer, Peer


def missing() -> str | None:
    return ggml.unusable(ggml.PLAIN) if ggml.installed() else "llama-cpp-python is not installed"


def _layer(case: Case, rows: int, kind: str, buffer: str) -> Layer:
    reason = ggml.unusable(buffer)
    if reason is not None:
        raise ValueError(reason)
    n, k = case.weight.shape
    key = f"llama.cpp {kind}"
    if key not in case.shared:
        case.shared[key] = ggml.quantize(case.weight.numpy(), kind)
    weight, bias = ggml.Weight(case.shared[key], kind, (n, k), buffer), case.bias

    def convert(x: Tensor) -> Any:
        y = torch.empty(x.shape[0], n)
        places = x.data_ptr(), bias.data_ptr(), y.data_ptr()
        return ggml.Product(weight, len(x), *places, case.threads), x, y

    def run(bound: Any) -> Tensor:
        bound[0]()
        return bound[2]

    return Layer(run, convert)


BUFFERS = {"": ggml.PLAIN, " repacked": ggml.REPACKED, " AMX": ggml.AMX}
PEERS = [
    Peer(f"llama.cpp {kind}{how}", precision, partial(_layer, kind=kind, buffer=buffer))
    for kind, precision in (
        ("Q4_0", "int4 dynamic"),
        ("Q4_K", "int4 dynamic"),
        ("Q8_0", "int8 dynamic"),
    )
    for how, buffer in BUFFERS.items()
]
