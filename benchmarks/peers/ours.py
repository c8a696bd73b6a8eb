"""zeropoint, as a user calls it: the functional form on packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

import zeropoint
from zeropoint import QTensor, functional

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
)

NAME = "zeropoint"


def missing() -> str | None:
    return None


def _float32(case: Case, rows: int) -> Layer:
    packed = zeropoint.prepack(case.weight, case.bias)
    return Layer(lambda x: functional.linear(x, packed))


def _bfloat16(case: Case, rows: int) -> Layer:
    packed = zeropoint.prepack(case.weight.bfloat16(), case.bias.bfloat16().float())
    return Layer(lambda x: functional.linear(x, packed), lambda x: x.bfloat16())


def _weight(case: Case) -> QTensor:
    return QTensor(case.integers, case.scale, torch.zeros_like(case.scale, dtype=torch.int32), 0)


def _quantized(x: Tensor) -> QTensor:
    return QTensor(integer_input(x), INPUT_SCALE, INPUT_ZERO)


def _static_u8(case: Case, rows: int) -> Layer:
    weight, bias, scale = _weight(case), case.bias, case.output_scale
    return Layer(
        lambda x: functional.linear(x, weight, bias, scale, OUTPUT_ZERO),
        _quantized,
        lambda y: y.dequantize(),
    )


def _static_f32(case: Case, rows: int) -> Layer:
    weight, bias = _weight(case), case.bias
    return Layer(lambda x: functional.linear_static(x, weight, bias), _quantized)


def _static_float(case: Case, rows: int) -> Layer:
    weight, bias = _weight(case), case.bias
    return Layer(lambda x: functional.linear_static(x, weight, bias, INPUT_SCALE, INPUT_ZERO))


def _dynamic(case: Case, rows: int) -> Layer:
    weight, bias = _weight(case), case.bias
    return Layer(lambda x: functional.linear_dynamic(x, weight, bias))


def _weight_only(case: Case, rows: int) -> Layer:
    weight, bias = _weight(case), case.bias
    return Layer(lambda x: functional.linear_weight_only(x, weight, bias))


def _weight_only_bf16(case: Case, rows: int) -> Layer:
    weight, bias = _weight(case), case.bias
    return Layer(lambda x: functional.linear_weight_only(x, weight, bias), lambda x: x.bfloat16())


def _groups(case: Case) -> QTensor:
    zero_point = torch.full(case.group_scale.shape, CODE_ZERO)
    return QTensor(case.codes, case.group_scale, zero_point, bits=4, group_size=GROUP)


def _dynamic4(case: Case, rows: int) -> Layer:
    weight, bias = _groups(case), case.bias
    return Layer(lambda x: functional.linear_dynamic(x, weight, bias))


def _weight_only4(case: Case, rows: int) -> Layer:
    weight, bias = _groups(case), case.bias
    return Layer(lambda x: functional.linear_weight_only(x, weight, bias))


def _weight_only4_bf16(case: Case, rows: int) -> Layer:
    weight, bias = _groups(case), case.bias
    return Layer(lambda x: functional.linear_weight_only(x, weight, bias), lambda x: x.bfloat16())


PEERS = [
    Peer(NAME, "float32", _float32),
    Peer(NAME, "bfloat16", _bfloat16),
    Peer(NAME, "int8 static u8→u8", _static_u8),
    Peer(NAME, "int8 static u8→f32", _static_f32),
    Peer(NAME, "int8 static f32→f32", _static_float),
    Peer(NAME, "int8 dynamic", _dynamic),
    Peer(NAME, "int8 weight-only f32", _weight_only),
    Peer(NAME, "int8 weight-only bf16", _weight_only_bf16),
    Peer(NAME, "int4 dynamic", _dynamic4),
    Peer(NAME, "int4 weight-only f32", _weight_only4),
    Peer(NAME, "int4 weight-only bf16", _weight_only4_bf16),
]
