"""The numbers of one layer alone, from the inputs that were kept of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import QuantizedLinear
from .inputs import Inputs
from .numbers import OUTLIERS_LISTED, ErrorSplit, OutlierChannel, Saturation, sqnr_db
from .variants import (
    Integers,
    changed_input,
    changed_weight,
    computed,
    layer_bytes,
    quantized_input,
    quantized_weight,
    unchanged_input,
)

OUTLIER_RATIO = 8.0
"""An input channel is an outlier from so many times the median channel's largest magnitude on: a
step that it stretches eightfold costs the other channels three of their eight bits."""


def outlier_channels(amax: Tensor | None) -> list[OutlierChannel]:
    """The channels that stand out, largest ratio first.

    Args:
        amax: largest magnitude of each channel, ``(in_features,)``.

    >>> [found] = outlier_channels(torch.tensor([1.0, 2.0, 1.0, 40.0, 0.0]))
    >>> found.index, round(found.ratio, 3)
    (3, 40.0)
    """
    if amax is None:
        return []
    live = amax[amax > 0]
    if not live.numel():
        return []
    ratios = (amax.to(torch.float64) / float(live.median())).cpu()
    order = torch.argsort(ratios, descending=True, stable=True)
    return [
        OutlierChannel(int(i), float(amax[i]), float(ratios[i]))
        for i in order[: int((ratios >= OUTLIER_RATIO).sum())]
    ]


def split_error(x: Tensor, quantized: Integers) -> ErrorSplit:
    """How the squared error of quantized values splits up into clipping and rounding.

    A value is clipped where it lies beyond the range by more than half a step: nearer, the end of
    the range is what rounding would have given it anyway.
    """
    x = x.to(torch.float32)
    error = (x - quantized.real).to(torch.float64).square()
    # A step's rounding in float32 may put a value a hair beyond; that is no clipping.
    reach = 0.5 * (1 + 1e-3) * quantized.step
    beyond = (x < quantized.low - reach) | (x > quantized.high + reach)
    total, clipped = float(error.sum()), float(error[beyond].sum())
    return ErrorSplit(clipped / total, 1 - clipped / total) if total > 0 else ErrorSplit(0.0, 0.0)


def saturated(x: Tensor, quantized: Integers) -> float:
    """Fraction of integers at an end of their range, where ``x`` is not zero."""
    at_end = (quantized.q == quantized.qmin) | (quantized.q == quantized.qmax)
    return float((at_end & (x != 0)).to(torch.float64).mean()) if x.numel() else 0.0


def ratio_db(y: Tensor, other: Tensor) -> float:
    """SQNR of ``other`` against ``y``, over elements that are finite in both."""
    # The differences in the values' own precision, the sums in float64: enough, and much faster.
    signal, noise = (
        float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in (y, y - other)
    )
    if not (math.isfinite(signal) and math.isfinite(noise)):
        finite = y.isfinite() & other.isfinite()
        if not bool(finite.any()):
            return math.nan
        y, other = (torch.where(finite, t, 0.0).to(torch.float64) for t in (y, other))
        signal, noise = float(y.square().sum()), float((y - other).square().sum())
    return sqnr_db(signal, noise)


def layer_numbers(linear: nn.Linear, layer: QuantizedLinear, inputs: Inputs) -> dict[str, Any]:
    """The fields of :class:`LayerDiagnosis` that tell of the layer alone.

    Args:
        linear: the float layer.
        layer: the same, quantized.
        inputs: what the float model feeds it with.
    """
    weight = linear.weight.detach().to(torch.float32)
    changed = changed_weight(layer, weight)
    integers = quantized_weight(layer)
    outliers = outlier_channels(inputs.amax)
    found: dict[str, Any] = {
        "calls": inputs.calls,
        "weight_sqnr_db": ratio_db(changed, integers.real),
        "outliers": tuple(outliers[:OUTLIERS_LISTED]),
        "outlier_count": len(outliers),
        "weight_error": split_error(changed, integers),
        "activation_error": None,
        "bytes": layer_bytes(layer),
        "float_bytes": linear.weight.numel() * linear.weight.element_size(),
    }
    rows = inputs.rows().to(device=weight.device, dtype=torch.float32)
    x = changed_input(layer, rows)
    seen = quantized_input(layer, x)
    ends = None
    names = ("weights_only_sqnr_db", "activations_only_sqnr_db", "both_sqnr_db")
    if len(x):
        bias = None if linear.bias is None else linear.bias.detach().to(torch.float32)
        y = F.linear(rows, weight, bias)
        found[names[0]] = ratio_db(y, F.linear(x, integers.real, layer.bias))
        found[names[1]] = math.inf
        if seen is not None:
            other = F.linear(unchanged_input(layer, seen.real), weight, bias)
            found[names[1]] = ratio_db(y, other)
        found[names[2]] = alone_db(linear, layer, inputs)
    else:
        found |= dict.fromkeys(names, math.nan)
    if seen is not None:
        found["activation_error"] = split_error(x, seen)
        ends = saturated(x, seen)
    found["saturation"] = Saturation(saturated(changed, integers), ends)
    return found


def alone_db(linear: nn.Linear, layer: QuantizedLinear, inputs: Inputs) -> float:
    """SQNR of the layer's output alone, with its bias."""
    x = inputs.rows().to(linear.weight.device)
    if not len(x):
        return math.nan
    return ratio_db(type(linear).forward(linear, x), computed(layer)(x))
