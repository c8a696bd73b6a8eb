"""The integers of a weight as ONNX's operators want them; plain tensors, no package but torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import codec
from ..spec import integer_range
from ..tensor import QTensor

_LEAST_BLOCK, _BLOCK, _LARGEST_BLOCK = 16, 128, 256
"""Of MatMulNBits: powers of two. The middle one is for rows with one scale."""


@dataclass(frozen=True)
class Codes:
    """A weight ``(out, in)``: ``real = scale · (codes − zero_point)``.

    Attributes:
        codes: uint8 below ``2**bits``, ``(out, in)``.
        scale: float32, bfloat16 or float16 ``(out, groups)``.
        zero_point: int32 ``(out, groups)``, in the range of the codes.
        bits: 2 to 8.
        group_size: inputs that share a scale, at most ``in``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_size: int

    @classmethod
    def of(cls, weight: QTensor) -> Codes:
        """Those of a weight per tensor, per channel along axis 0, or per group."""
        rows, columns = weight.shape
        lowest = integer_range(weight.bits, weight.dtype == torch.int8)[0]
        codes = (weight.int_repr().to(torch.int16) - lowest).to(torch.uint8)
        zero_point = weight.zero_point.to(torch.int32) - lowest
        size = max(columns, 1)
        if weight.group_size is not None:
            size = min(size, weight.group_size)
        scale, zero_point = (
            t if t.ndim == 2 else t.reshape(-1, 1).expand(rows, 1)
            for t in (weight.scale, zero_point)
        )
        return cls(codes, scale, zero_point, weight.bits, size)

    @property
    def width(self) -> int:
        """Bits of a code in the file: ONNX has 4 and 8."""
        return 4 if self.bits <= 4 else 8

    @property
    def per_channel(self) -> bool:
        return self.scale.shape[1] == 1

    @property
    def middle(self) -> int:
        """What is taken off to make codes signed."""
        return 1 << (self.bits - 1)

    @property
    def block_size(self) -> int | None:
        """Of a MatMulNBits: a power of two that divides the groups, ``None`` where there is no such
        from 16 on."""
        if not self.per_channel:
            block = min(self.group_size & -self.group_size, _LARGEST_BLOCK)
            return block if block >= _LEAST_BLOCK else None
        block = _LEAST_BLOCK
        while block < min(self.codes.shape[1], _BLOCK):
            block *= 2
        return block

    def real_integers(self) -> Tensor:
        """``codes − zero_point``, int32 ``(out, in)``."""
        zero_point = self.zero_point.repeat_interleave(self.group_size, 1)
        return self.codes.to(torch.int32) - zero_point[:, : self.codes.shape[1]]

    def signed(self) -> tuple[Tensor, Tensor]:
        """``(integers, zero_point)``, both lowered by :attr:`middle`, int8 ``(in, out)`` and
        ``(groups, out)``: the second factor of a MatMul. Below 8 bits no product of theirs with a
        byte, added to another, exceeds 16 bits, so that x86 without VNNI does not saturate."""
        integers = (self.codes.to(torch.int16) - self.middle).to(torch.int8)
        return integers.T.contiguous(), (self.zero_point - self.middle).to(torch.int8).T

    def blocks(self, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(data, scale, zero_point)`` of a MatMulNBits with blocks of ``size``: uint8 ``(out,
        blocks, size · width / 8)``, the first code in the low half of a byte; ``(out, blocks)``;
        and uint8 ``(out, ceil(blocks · width / 8))`` packed alike, ``None`` where all are
        in the middle of ``width`` bits, which is the operator's default."""
        rows, columns = self.codes.shape
        count = -(-columns // size)
        padded = torch.nn.functional.pad(self.codes, (0, count * size - columns))
        data = codec.pack(padded.reshape(rows, count, size), self.width)
        group = torch.arange(count) * size // self.group_size  # of a block
        zero_point = self.zero_point[:, group]
        packed = None
        if bool((zero_point != 1 << (self.width - 1)).any()):
            packed = codec.pack(zero_point.to(torch.uint8), self.width)
        return data, self.scale[:, group].contiguous(), packed

    def rows(self) -> Tensor:
        """The codes ``(out, ceil(in · width / 8))``, packed if they are of 4 bits."""
        return codec.pack(self.codes, self.width)
