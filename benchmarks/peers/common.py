"""What every adapter gets and gives: a layer to prepare, and a way to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

INPUT_RANGE = 4.0
"""Activations are clamped to this: the range that static quantization was calibrated on."""
INPUT_SCALE, INPUT_ZERO = 2 * INPUT_RANGE / 255, 128
OUTPUT_ZERO = 128
GROUP, CODE_ZERO = 32, 8
"""Weights of 4 bits: how many share a scale, and the zero point of all."""


@dataclass(frozen=True)
class Precision:
    """A contest: what goes in and comes out, and how near to float32 the result must be."""

    kind: str
    """The arithmetic, as :mod:`zeropoint.limits` names it."""
    weight_bytes: float
    """A weight, its share of scales included."""
    input_bytes: int
    output_bytes: int
    tolerance: float
    """Of ‖y − y₃₂‖ / ‖y₃₂‖."""


PRECISIONS = {
    "float32": Precision("float32", 4, 4, 4, 1e-4),
    "bfloat16": Precision("bfloat16", 2, 2, 2, 2e-2),
    "int8 static u8→u8": Precision("int8", 1, 1, 1, 5e-2),
    "int8 static u8→f32": Precision("int8", 1, 1, 4, 5e-2),
    "int8 static f32→f32": Precision("int8", 1, 4, 4, 5e-2),
    "int8 dynamic": Precision("int8", 1, 4, 4, 3e-2),
    "int8 weight-only f32": Precision("float32", 1, 4, 4, 3e-2),
    "int8 weight-only bf16": Precision("bfloat16", 1, 2, 2, 3e-2),
    "int4 dynamic": Precision("int8", 0.5625, 4, 4, 0.14),
    "int4 weight-only f32": Precision("float32", 0.5625, 4, 4, 0.14),
    "int4 weight-only bf16": Precision("bfloat16", 0.5625, 2, 2, 0.14),
}


@dataclass
class Case:
    """A layer's weights, and their integers, which all int8 adapters share."""

    weight: Tensor
    """``(N, K)`` float32."""
    bias: Tensor
    threads: int
    shared: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def scale(self) -> Tensor:
        """``(N,)``: symmetric, per output."""
        return self.weight.abs().amax(1) / 127

    @cached_property
    def integers(self) -> Tensor:
        """``(N, K)`` int8."""
        return (self.weight / self.scale[:, None]).round().clamp(-127, 127).to(torch.int8)

    @cached_property
    def group_scale(self) -> Tensor:
        """``(N, K / GROUP)`` bfloat16, of :attr:`codes`."""
        groups = self.weight.reshape(len(self.weight), -1, GROUP)
        return (groups.abs().amax(2) / 7).bfloat16()

    @cached_property
    def codes(self) -> Tensor:
        """``(N, K)`` uint8: integers of 4 bits about ``CODE_ZERO``, which all adapters share."""
        groups = self.weight.reshape(len(self.weight), -1, GROUP)
        codes = (groups / self.group_scale.float()[..., None]).round() + CODE_ZERO
        return codes.clamp(0, 15).to(torch.uint8).reshape(self.weight.shape)

    @cached_property
    def output_scale(self) -> float:
        """Of integer outputs: 4.5 standard deviations for activations of variance 1."""
        return float(4.5 * (self.weight.norm(dim=1).max() + self.bias.abs().max()) / 127)


def integer_input(x: Tensor) -> Tensor:
    """Static quantization of the activations to uint8."""
    return ((x / INPUT_SCALE).round() + INPUT_ZERO).clamp(0, 255).to(torch.uint8)


def integer_output(case: Case) -> Callable[[Tensor], Tensor]:
    """From uint8 outputs back to floats."""
    return lambda y: (y.float() - OUTPUT_ZERO) * case.output_scale


@dataclass(frozen=True)
class Layer:
    """A prepared layer. Only ``run`` is timed."""

    run: Callable[[Any], Any]
    convert: Callable[[Tensor], Any] = lambda x: x
    """From float32 activations to what ``run`` takes."""
    floats: Callable[[Any], Tensor] = lambda y: y.float()
    """From what ``run`` gives to float32, for the check."""


@dataclass(frozen=True)
class Peer:
    """One way of computing a layer. Each call of ``prepare`` packs weights of its own."""

    name: str
    precision: str
    prepare: Callable[[Case, int], Layer]
    """From the layer and the rows a call will have."""
    per_rows: bool = False
    """Whether the packing depends on the number of rows."""
    slow: bool = False
    """Takes long to prepare; left out unless asked for."""


def one_line(error: BaseException) -> str:
    """What went wrong, short enough for a table."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:160]
