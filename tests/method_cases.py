"""Recipes with methods, and data on which methods matter, that several tests share."""

import torch

from zeropoint import WEIGHT_INT4, LayerRecipe, PerGroup, QuantSpec
from zeropoint.algorithms import InputStatistics

INT2 = QuantSpec(bits=2, signed=False, symmetric=False, granularity=PerGroup(8))
TOGETHER = [
    (),
    ("clip",),
    ("hqq",),
    ("hadamard",),
    ("smooth",),
    ("awq",),
    ("gptq",),
    ("bias-correction",),
    ("smooth", "gptq"),
    ("awq", "clip", "gptq"),
    ("smooth", "hadamard", "hqq", "gptq", "bias-correction"),
    ("awq", "hadamard", "bias-correction"),
]


def recipe(*method, mode="weight-only", weight=WEIGHT_INT4):
    return LayerRecipe(mode, weight, method=method)


def uneven(n=4, features=16):
    """Batches whose channels hang together, two of them far larger than the rest."""
    g = torch.Generator().manual_seed(1)
    mixing = torch.randn(features, features, generator=g)
    mixing[:, 3] *= 20
    mixing[:, 5] *= 8
    return [torch.randn(64, features, generator=g) @ mixing for _ in range(n)]


def seen(x, features, gram=True):
    inputs = InputStatistics(features, gram)
    for part in x:
        inputs.observe(part)
    return inputs
