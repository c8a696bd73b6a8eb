"""Faults to plant into float models, so that a diagnosis has something to find."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zeropoint.running import call


@torch.no_grad()
def inputs_of(model: nn.Module, layer: nn.Module, data: list[Any]) -> Tensor:
    """All rows that reach a layer."""
    rows: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _m, args: rows.append(args[0].reshape(-1, args[0].shape[-1]).clone())
    )
    try:
        for batch in data:
            call(model, batch)
    finally:
        hook.remove()
    return torch.cat(rows)


@torch.no_grad()
def plant_outliers(
    before: nn.Module,
    layers: list[nn.Linear],
    channels: Tensor,
    factor: float,
) -> None:
    """Make some channels between a module and the Linear layers that read it ``factor`` times
    larger, and the layers' columns as many times smaller: the float function stays what it is.

    Args:
        before: a Linear layer or a normalization, whose rows (or entries) and bias are scaled.
            Between it and ``layers`` there is nothing, or a ReLU.
        layers: all that read its output.
    """
    for parameter in (before.weight, before.bias):
        if isinstance(parameter, Tensor):
            parameter[channels] *= factor
    for layer in layers:
        layer.weight[:, channels] /= factor


def loudest(x: Tensor, count: int) -> Tensor:
    """The channels with the largest magnitudes."""
    return x.abs().amax(0).argsort(descending=True)[:count]
