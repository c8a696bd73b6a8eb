"""AWQ: enlarge the weights that meet large activations before rounding them, then clip.

Source: Lin, Tang, Tang, Yang, Dang, Gan and Han 2023, "AWQ: Activation-aware Weight Quantization
for LLM Compression and Acceleration" (https://arxiv.org/abs/2306.00978), section 3.2, and the
search for clipping of its code (https://github.com/mit-han-lab/llm-awq, ``auto_scale.py``,
``auto_clip.py``). What differs:

* Output errors are not measured on a sample of inputs, but computed over all of them from
  ``H = E[xᵀ x]``: ``E‖x (Ŵ − W)ᵀ‖² = tr((Ŵ − W) H (Ŵ − W)ᵀ)``.
* Each layer gets a factor of its own and applies it itself. The paper gives layers with one input
  a common factor, which the operation before them absorbs.
* All layers are clipped. The paper's code leaves out queries and keys, whose product it does not
  look at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import PerTensor, QuantSpec
from .grid import Grid, group_size, minmax_grid, search_grid

STEPS = 20
"""Exponents tried, as in the paper's code: 0, 1/20, … 19/20."""

_LEAST = 1e-4  # a scaling below it is raised to it, as in the paper's code


def awq(
    weight: Tensor, spec: QuantSpec, magnitudes: Tensor, gram: Tensor, steps: int = STEPS
) -> tuple[Tensor, float]:
    """The factor ``1/s`` of each input channel, ``s = E|x|^α``, and the exponent α.

    The layer computes ``(x · 1/s) (W · s)ᵀ``. Weights that meet large activations are enlarged
    within their group, and so rounded finer. α is the one in [0, 1) with the least error of the
    layer's output when ``W · s`` is rounded to nearest; ``s`` is divided by the geometric mean of
    its extremes.

    Args:
        weight: ``(out, in)``, finite, not empty.
        spec: per tensor, per channel along axis 0, or per group.
        magnitudes: mean magnitude of each input channel, ``(in,)``, at least 0.
        gram: ``E[xᵀ x]`` of the layer's inputs, ``(in, in)``, any positive multiple.
        steps: how many exponents to try, at least 1.

    Returns:
        The factor, float32 ``(in,)``, positive and finite, and α. α = 0 is the factor 1.

    Raises:
        ValueError: ``steps`` out of range.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    weight, gram = weight.detach().to(torch.float32), gram.to(torch.float32)
    best, exponent, least = torch.ones(weight.shape[1]), 0.0, torch.inf
    for step in range(steps):
        alpha = step / steps
        s = (magnitudes.to(torch.float64) ** alpha).clamp(min=_LEAST)
        s = (s / (s.max() * s.min()).sqrt()).to(torch.float32)
        scaled = weight * s
        error = (minmax_grid(scaled, spec).nearest(scaled) - scaled) / s
        loss = output_error(error, gram)
        if loss < least:
            best, exponent, least = 1 / s, alpha, loss
    return best, exponent


def output_error(error: Tensor, gram: Tensor) -> float:
    """``tr(E H Eᵀ)``: the squared error of a layer's output, summed over its channels.

    Args:
        error: of the weight, ``(out, in)``.
        gram: ``H``, ``(in, in)``.
    """
    return float(((error @ gram) * error).sum(dtype=torch.float64))


def clip_to_inputs(weight: Tensor, spec: QuantSpec, gram: Tensor) -> Grid:
    """The grids, one for each group, with the least error of the group's part of the output.

    As :func:`zeropoint.algorithms.clip.clip`, but an error ``e`` of a group's weights costs
    ``e H eᵀ``, with the group's block of ``H``, where that takes the sum of squares. Both ends of a
    range shrink together only.

    Args:
        weight: ``(out, in)``, finite, not empty.
        spec: per channel along axis 0 or per group. Per tensor, errors cost the sum of squares
            weighted by ``H``'s diagonal.
        gram: ``E[xᵀ x]`` of the inputs of this weight, ``(in, in)``.
    """
    columns, gram = weight.shape[1], gram.to(torch.float32)
    if isinstance(spec.granularity, PerTensor):
        diagonal = gram.diagonal()

        def weighted(error: Tensor) -> Tensor:
            squares = error.reshape(-1, columns).square_()
            return (squares @ diagonal).sum().reshape(1, 1)

        return search_grid(weight, spec, weighted, one_sided=False)
    size = group_size(spec, columns)
    missing = -columns % size
    groups = (columns + missing) // size
    # Blocks on the diagonal, (groups, size, size); a short last group is filled up with zeros.
    padded = torch.nn.functional.pad(gram, (0, missing, 0, missing))
    at = torch.arange(groups)
    blocks = padded.reshape(groups, size, groups, size)[at, :, at]

    def cost(error: Tensor) -> Tensor:
        by_group = error.transpose(0, 1)  # (groups, rows, size)
        return ((by_group @ blocks) * by_group).sum(2).T

    return search_grid(weight, spec, cost, one_sided=False)
