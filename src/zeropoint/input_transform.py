"""What a layer may do to its input before the product: a factor a channel, then a rotation.

A Linear layer computes ``y = x Wᵀ``. For any factor ``f`` without zeros and any invertible ``R``,
``y = ((x · f) R) (W / f · R⁻ᵀ)ᵀ`` is the same function. Algorithms that make weights or
activations easier to quantize choose ``f`` and ``R`` and store the changed weight; the layer holds
``f`` and applies both. ``R`` is the Walsh–Hadamard matrix of a power of two, once for each run of
so many channels; it needs no memory and no multiplications. It is symmetric and its square is the
identity times its size, so that ``R⁻ᵀ = R / size``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_rotation(name: str, size: int, features: int) -> None:
    """Refuse a size that is no power of two or does not divide ``features``.

    Raises:
        TypeError, ValueError: such a size.
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name} must be an int, got {type(size).__name__}")
    if size < 1 or size & (size - 1) or features % size:
        raise ValueError(
            f"{name} must be a power of two that divides the {features} features, got {size}"
        )


def walsh_hadamard(x: Tensor, size: int) -> Tensor:
    """The Walsh–Hadamard transform of each run of ``size`` entries along the last axis.

    Not scaled: applied twice it is ``size`` times ``x``. In natural order, that of Sylvester's
    matrix ``H₁ = [1]``, ``H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]]``, computed by the butterflies ``(a, b) →
    (a + b, a − b)`` over distances 1, 2, 4, …, each result rounded once to ``x``'s dtype. So the
    bits do not depend on the machine.

    Args:
        x: floating point, ``(…, features)``.
        size: a power of two that divides ``features``; 1 returns ``x``.

    Raises:
        TypeError, ValueError: a ``size`` that does not fit.

    >>> walsh_hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]), 4)
    tensor([10., -2., -4.,  0.])
    """
    check_rotation("size", size, x.shape[-1])
    shape, distance = x.shape, 1
    while distance < size:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), -2)
        distance *= 2
    return x.reshape(shape)


def transform_input(x: Tensor, factor: Tensor, size: int = 1) -> Tensor:
    """``x · factor``, then :func:`walsh_hadamard`: in float32, rounded to ``x``'s dtype at the end.

    Args:
        x: floating point, ``(…, features)``.
        factor: float32 ``(features,)``.
        size: as :func:`walsh_hadamard`; 1 for the factor alone.
    """
    return walsh_hadamard(x.to(torch.float32) * factor, size).to(x.dtype)
