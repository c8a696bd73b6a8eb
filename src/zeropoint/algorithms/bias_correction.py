"""Bias correction: what quantization shifts on average is put right in the bias.

Sources: Nagel, van Baalen, Blankevoort and Welling 2019, "Data-Free Quantization Through Weight
Equalization and Bias Correction", section 4.2 (https://arxiv.org/abs/1906.04721); Finkelstein,
Almog and Grobman 2019, "Fighting Quantization Bias With Bias" (https://arxiv.org/abs/1906.03193).
"""

from __future__ import annotations

import torch
from torch import Tensor


def correct_bias(bias: Tensor, weight: Tensor, quantized: Tensor, mean: Tensor) -> Tensor:
    """The bias for which the mean of the layer's output is that of the float layer.

    ``b + (W − Ŵ) E[x]``, with the mean input taken from data.

    Args:
        bias: ``(out,)``.
        weight: the float weight, ``(out, in)``.
        quantized: the reals its integers stand for, ``(out, in)``.
        mean: of each input channel, ``(in,)``.

    Returns:
        float32 ``(out,)``.

    >>> w, quantized = torch.tensor([[0.4, 0.7]]), torch.tensor([[0.5, 0.5]])
    >>> correct_bias(torch.zeros(1), w, quantized, torch.tensor([1.0, 1.0]))
    tensor([0.1000])
    """
    error = weight.detach().to(torch.float64) - quantized.to(torch.float64)
    return (bias.detach().to(torch.float64) + error @ mean.to(torch.float64)).to(torch.float32)
