"""AMD's zentorch. Its prepacked dynamic operator is wrong at K = 4096 in some versions, which the
check before the timing finds."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch

from .common import (
    CODE_ZERO,
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
    return None if importlib.util.find_spec("zentorch") else "zentorch is not installed"


def _ops() -> Any:
    import zentorch  # noqa: F401

    return torch.ops.zentorch


def _bfloat16(case: Case, rows: int) -> Layer:
    ops = _ops()
    weight = ops.zentorch_weight_prepack_for_linear(case.weight.bfloat16())
    bias, run = case.bias.bfloat16(), ops.zentorch_linear_unary
    return Layer(lambda x: run(x, weight, bias, is_weight_prepacked=True), lambda x: x.bfloat16())


def _dynamic(case: Case, rows: int) -> Layer:
    ops = _ops()
    weight = ops.zentorch_weight_prepack_for_dynamic_qlinear(case.integers.clone(), False)
    scale, bias, run = case.scale, case.bias, ops.zentorch_dynamic_qlinear
    return Layer(lambda x: run(x, weight, scale, bias, is_weight_prepacked=True))


def _static(case: Case, rows: int, dtype: torch.dtype) -> Layer:
    run, weight = _ops().zentorch_qlinear, case.integers.clone()
    scale, bias = case.scale, case.bias
    x_scale, x_zero = torch.tensor([INPUT_SCALE]), torch.tensor([INPUT_ZERO], dtype=torch.int32)
    w_zero = torch.zeros(len(scale), dtype=torch.int32)
    integers = dtype is torch.uint8
    y_scale = torch.tensor([case.output_scale]) if integers else None
    y_zero = torch.tensor([OUTPUT_ZERO], dtype=torch.int32) if integers else None
    return Layer(
        lambda x: run(x, weight, x_scale, x_zero, scale, w_zero, bias, y_scale, y_zero, dtype),
        integer_input,
        integer_output(case) if integers else lambda y: y,
    )


def _int4(case: Case, rows: int) -> Layer:
    """It takes bfloat16 inputs only."""
    ops = _ops()
    packed = ops.zentorch_woq_repack_weight(case.codes.to(torch.int8) - CODE_ZERO).t()
    scale, bias = case.group_scale.t().contiguous(), case.bias.bfloat16()
    run = ops.zentorch_woq_linear
    return Layer(lambda x: run(x, packed, scale, None, bias), lambda x: x.bfloat16())


PEERS = [
    Peer("zentorch", "bfloat16", _bfloat16),
    Peer("zentorch", "int8 static u8→u8", partial(_static, dtype=torch.uint8)),
    Peer("zentorch", "int8 static u8→f32", partial(_static, dtype=torch.float32)),
    Peer("zentorch", "int8 dynamic", _dynamic),
    Peer("zentorch", "int4 weight-only bf16", _int4),
]
