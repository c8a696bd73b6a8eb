"""Models, data and a measure that tests of quantization share."""

import math

import torch
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def batches(n=4, features=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, features, generator=generator) for _ in range(n)]


def sqnr(exact, approximate):
    exact, approximate = exact.detach(), approximate.detach()
    return 10 * math.log10(exact.square().mean() / (exact - approximate).square().mean())


def calibration_for(recipe, data):
    return data if recipe == "int8-static" else None


def tied_linears():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model
