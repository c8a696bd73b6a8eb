"""SmoothQuant: move the difficulty of large activations into the weights.

Source: Xiao, Lin, Seznec, Wu, Demouth and Han 2022, "SmoothQuant: Accurate and Efficient
Post-Training Quantization for Large Language Models", equation 4
(https://arxiv.org/abs/2211.10438).
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 0.5
"""How much of the difficulty moves, α in the paper: half, its choice for most models."""


def smooth(weight: Tensor, largest: Tensor, strength: float = STRENGTH) -> Tensor:
    """The factor ``1/s`` of each input channel, ``s = max|x|^α / max|w|^(1−α)``.

    The layer computes ``(x · 1/s) (W · s)ᵀ``: channels with large activations and small weights
    become smaller, and their weights larger. A channel that is zero in all data or in all weights
    keeps the factor 1.

    Args:
        weight: ``(out, in)``, finite.
        largest: the largest magnitude of each input channel, ``(in,)``, at least 0.
        strength: α, in [0, 1]: 0 evens out the weights, 1 the activations.

    Returns:
        float32 ``(in,)``, positive and finite.

    Raises:
        ValueError: ``strength`` out of range.

    >>> smooth(torch.tensor([[1.0, 1.0]]), torch.tensor([1.0, 100.0]))
    tensor([1.0000, 0.1000])
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be within [0, 1], got {strength!r}")
    x = largest.to(torch.float64)
    w = weight.detach().to(torch.float64).abs().amax(0)
    factor = (w ** (1 - strength) / x**strength).to(torch.float32)
    usable = (x > 0) & (w > 0) & factor.isfinite() & (factor >= torch.finfo(torch.float32).tiny)
    return torch.where(usable, factor, 1.0)
