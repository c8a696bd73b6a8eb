"""Hadamard rotation: spread what sits in few input channels evenly over many.

Sources: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"
(https://arxiv.org/abs/2404.00456); Tseng et al. 2024, "QuIP#: Even Better LLM Quantization with
Hadamard Incoherence and Lattice Codebooks" (https://arxiv.org/abs/2402.04396). An input times
random signs, rotated by a Walsh–Hadamard matrix, has nearly Gaussian entries whatever it was, so
that neither the activations nor the weights keep outliers. The rotation is undone in the weight; in
float the layer computes the same function. Unlike QuaRot, which rotates whole models and lets
rotations of neighbouring layers cancel, this rotates each layer's input on the fly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..input_transform import walsh_hadamard

SEED = 0
"""The signs are random, but the same for all layers of one width."""


def rotation(in_features: int, seed: int = SEED) -> tuple[Tensor, int]:
    """Factor and block size of a random rotation of the input.

    Args:
        in_features: number of input channels.
        seed: of the random signs.

    Returns:
        ``(factor, block)``: float32 ``(in_features,)``, random signs divided by √block, so that
        lengths are kept; and the largest power of two that divides ``in_features``. An odd number
        of channels has the block 1: signs alone, which rotate nothing.

    >>> factor, block = rotation(12)
    >>> block, factor.abs().unique()
    (4, tensor([0.5000]))
    """
    block = max(1, in_features & -in_features)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (in_features,), generator=generator) * 2 - 1
    return (signs / block**0.5).to(torch.float32), block


def rotate_weight(weight: Tensor, factor: Tensor, block: int) -> Tensor:
    """The weight for inputs that :func:`zeropoint.input_transform.transform_input` has changed.

    ``W / factor · H / block``, which undoes the factor and the rotation.

    Args:
        weight: ``(out, in)``, finite.
        factor: ``(in,)``, without zeros.
        block: a power of two that divides ``in``.

    Returns:
        ``(out, in)`` in ``weight``'s dtype, rounded from float64.

    >>> from zeropoint.input_transform import transform_input
    >>> factor, block = rotation(8)
    >>> w, x = torch.randn(3, 8), torch.randn(5, 8)
    >>> y = transform_input(x, factor, block) @ rotate_weight(w, factor, block).T
    >>> torch.allclose(y, x @ w.T, atol=1e-5)
    True
    """
    w = weight.detach().to(torch.float64) / factor.to(torch.float64)
    return (walsh_hadamard(w, block) / block).to(weight.dtype)
