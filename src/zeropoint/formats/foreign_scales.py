"""Scales as other formats have them, zero and negative ones too, as a QTensor has them."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..layout import expand_groups
from ..tensor import QTensor
from .container import CheckpointError


def to_qtensor(
    path: str | os.PathLike[str],
    layer: str,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int | None,
) -> QTensor:
    """``scale · (codes − zero_point)``, exactly, with every scale positive.

    A scale of zero becomes 1, and its codes the zero point. A negative one is turned round, and
    with it codes and zero point: ``s·(q − z) = −s·((m − q) − (m − z))``, where ``m`` is the largest
    code.

    Args:
        path, layer: for errors.
        codes: uint8 ``(out, in)`` below ``2**bits``.
        scale, zero_point: ``(out, groups)``, float and int32; with ``group_size`` ``None`` one
            group, which becomes a scale an output channel.
        bits, group_size: as :class:`zeropoint.QTensor`.

    Raises:
        CheckpointError: scales that are not finite or whose reciprocal is not; zero points out of
            range; shapes that do not fit.
    """
    size = codes.shape[1] if group_size is None else group_size
    top = (1 << bits) - 1
    if bool((scale <= 0).any()):
        none, negative = scale == 0, scale < 0
        scale = torch.where(none, torch.ones_like(scale), scale.abs())
        zero_point = torch.where(negative, top - zero_point, zero_point)
        wide = [expand_groups(t, size, codes.shape[1]) for t in (none, negative, zero_point)]
        turned = torch.where(wide[1], top - codes.to(torch.int32), codes.to(torch.int32))
        codes = torch.where(wide[0], wide[2], turned).to(torch.uint8)
    try:
        if group_size is None:
            if scale.shape[1] != 1:
                raise ValueError(f"one scale an output channel expected, got {tuple(scale.shape)}")
            per_channel = scale[:, 0].to(torch.float32), zero_point[:, 0]
            return QTensor(codes, *per_channel, axis=0, bits=bits)
        return QTensor(codes, scale, zero_point, bits=bits, group_size=group_size)
    except (TypeError, ValueError) as error:
        raise CheckpointError(path, str(error), layer) from None
