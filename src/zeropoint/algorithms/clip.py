"""Clipping: give up the largest weights of a group for finer steps of all others.

Round to nearest on the grids with the least mean squared error of the weights, found by search.
Sources: Sung et al. 2015, "Resiliency of Deep Neural Networks under Quantization"
(https://arxiv.org/abs/1511.06488); Nagel et al. 2021, "A White Paper on Neural Network
Quantization", section 3.1 (https://arxiv.org/abs/2106.08295).
"""

from __future__ import annotations

from torch import Tensor

from ..spec import QuantSpec
from .grid import Grid, search_grid


def clip(weight: Tensor, spec: QuantSpec) -> Grid:
    """The grids, one for each group of ``weight``, whose rounding has least squared error.

    Both ends of a group's range shrink together in steps of two percent, then, where the spec has
    zero points, each end alone. The error is never above that of the whole range.

    Args:
        weight: ``(out, in)``, finite, not empty.
        spec: per tensor, per channel along axis 0, or per group.

    >>> import torch
    >>> from zeropoint import PerChannel, QuantSpec
    >>> spec = QuantSpec(bits=4, granularity=PerChannel(0))
    >>> weight = torch.cat([torch.linspace(-1, 1, 40), torch.tensor([3.0])])[None]
    >>> bool(clip(weight, spec).scale[0, 0] < 3 / 7)  # the outlier is clipped
    True
    """
    return search_grid(weight, spec)
