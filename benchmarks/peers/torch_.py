"""torch's own layers: float, the quantized operators on each engine, and the ATen operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    CODE_ZERO,
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


def missing() -> str | None:
    return None


def _to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype)


def _plain(case: Case, rows: int, dtype: torch.dtype) -> Layer:
    weight, bias = case.weight.to(dtype), case.bias.to(dtype)
    return Layer(lambda x: F.linear(x, weight, bias), _to(dtype))


def _onednn(case: Case, rows: int, dtype: torch.dtype) -> Layer:
    """oneDNN with weights packed for the number of rows."""
    weight = torch.ops.mkldnn._reorder_linear_weight(case.weight.to(dtype), rows)
    bias, run = case.bias.to(dtype), torch.ops.mkldnn._linear_pointwise.default
    return Layer(lambda x: run(x, weight, bias, "none", [], ""), _to(dtype))


def _mkl(case: Case, rows: int) -> Layer:
    """MKL with packed weights; it wants the plain ones too."""
    weight, bias, run = case.weight, case.bias, torch.ops.mkl._mkl_linear
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return Layer(lambda x: run(x, packed, weight, bias, rows))


def _pack(case: Case, engine: str) -> object:
    """A packing of its own: one that static and dynamic operators share crashes in oneDNN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        torch.backends.quantized.engine = engine
        zeros = torch.zeros(len(case.scale), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(
            case.integers, case.scale.double(), zeros, 0
        )
        return torch.ops.quantized.linear_prepack(weight, case.bias)


def _static(case: Case, rows: int, engine: str) -> Layer:
    packed, run, scale = _pack(case, engine), torch.ops.quantized.linear, case.output_scale
    return Layer(
        lambda x: run(x, packed, scale, OUTPUT_ZERO),
        lambda x: torch._make_per_tensor_quantized_tensor(
            integer_input(x), INPUT_SCALE, INPUT_ZERO
        ),
        lambda y: y.dequantize(),
    )


def _dynamic(case: Case, rows: int, engine: str) -> Layer:
    packed, run = _pack(case, engine), torch.ops.quantized.linear_dynamic
    return Layer(lambda x: run(x, packed, False))


def _pointwise(case: Case, rows: int, dtype: torch.dtype) -> Layer:
    packed = torch.ops.onednn.qlinear_prepack(case.integers, [rows, case.integers.shape[1]])
    run, bias, w_scale = torch.ops.onednn.qlinear_pointwise.default, case.bias, case.scale
    w_zero = torch.zeros(len(w_scale), dtype=torch.int32)
    integers = dtype is torch.uint8
    scale, zero = (case.output_scale, OUTPUT_ZERO) if integers else (1.0, 0)
    return Layer(
        lambda x: run(
            x, INPUT_SCALE, INPUT_ZERO, packed, w_scale, w_zero, bias, scale, zero, dtype,
            "none", [], "",
        ),
        integer_input,
        integer_output(case) if integers else lambda y: y,
    )  # fmt: skip


def _int8pack(case: Case, rows: int, dtype: torch.dtype) -> Layer:
    integers, scale, bias = case.integers, case.scale.to(dtype), case.bias.to(dtype)
    run = torch.ops.aten._weight_int8pack_mm
    return Layer(lambda x: run(x, integers, scale).add_(bias), _to(dtype))


def _int4pack(case: Case, rows: int, dtype: torch.dtype) -> Layer:
    aten, scale = torch.ops.aten, case.group_scale.float()
    packed = aten._convert_weight_to_int4pack_for_cpu(case.codes.int(), 1)
    # It takes real zero as an offset of its own: code 8 is real zero there.
    pairs = torch.stack([scale, (8 - CODE_ZERO) * scale], -1).transpose(0, 1)
    pairs, bias = pairs.contiguous().to(dtype), case.bias.to(dtype)
    run = aten._weight_int4pack_mm_for_cpu
    return Layer(lambda x: run(x, packed, GROUP, pairs).add_(bias), _to(dtype))


def _dyn_quant(case: Case, rows: int) -> Layer:
    aten, (n, k) = torch.ops.aten, case.weight.shape
    pairs = (case.codes[:, 1::2] << 4 | case.codes[:, ::2]).contiguous()
    packed = aten._dyn_quant_pack_4bit_weight(pairs, case.group_scale, case.bias, GROUP, k, n)
    run = aten._dyn_quant_matmul_4bit
    return Layer(lambda x: run(x, packed, GROUP, k, n))


PEERS = [
    Peer("torch", "float32", partial(_plain, dtype=torch.float32)),
    Peer("torch oneDNN packed", "float32", partial(_onednn, dtype=torch.float32), per_rows=True),
    Peer("torch MKL packed", "float32", _mkl, per_rows=True),
    Peer("torch", "bfloat16", partial(_plain, dtype=torch.bfloat16)),
    Peer("torch oneDNN packed", "bfloat16", partial(_onednn, dtype=torch.bfloat16), per_rows=True),
    *(
        peer
        for engine in ("fbgemm", "onednn")
        for peer in (
            Peer(f"torch {engine}", "int8 static u8→u8", partial(_static, engine=engine)),
            Peer(f"torch {engine}", "int8 dynamic", partial(_dynamic, engine=engine)),
        )
    ),
    *(
        Peer("torch qlinear_pointwise", precision, partial(_pointwise, dtype=dtype), per_rows=True)
        for precision, dtype in (
            ("int8 static u8→u8", torch.uint8),
            ("int8 static u8→f32", torch.float32),
        )
    ),
    Peer("torch int8pack_mm", "int8 weight-only f32", partial(_int8pack, dtype=torch.float32)),
    Peer("torch int8pack_mm", "int8 weight-only bf16", partial(_int8pack, dtype=torch.bfloat16)),
    # Plain loops on x86: the kernels behind these two are for ARM, and for bfloat16.
    Peer("torch dyn_quant_matmul_4bit", "int4 dynamic", _dyn_quant),
    Peer("torch int4pack_mm", "int4 weight-only f32", partial(_int4pack, dtype=torch.float32)),
    Peer("torch int4pack_mm", "int4 weight-only bf16", partial(_int4pack, dtype=torch.bfloat16)),
]
