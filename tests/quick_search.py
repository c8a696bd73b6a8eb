"""A small network, data, and a quick search, for the tests of searching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zeropoint import Linear
from zeropoint.search import Front, Point, search

INT8 = ("int8-weight-only", "int8-dynamic", "int8-static")
FOUR = ("int4-weight-only", "int4")
QUICK: dict[str, Any] = {"points": 4, "checks": 6, "choices": INT8}


def mlp(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [Linear(16, width), nn.ReLU(), Linear(width, width), nn.ReLU(), Linear(width, 8)]
    return nn.Sequential(*layers).eval()


def batches(n: int = 400, features: int = 16) -> list[Tensor]:
    return list(torch.randn(n, features, generator=torch.Generator().manual_seed(1)).split(50))


def quick(model: nn.Module, data: list, *args: Any, **arguments: Any) -> Front:
    return search(model, data, *args, progress=False, **{**QUICK, **arguments})


def needed_by(p: Point, found: Front) -> Any:
    """Calibration data, where the point has static layers."""
    static = any(r and r.mode == "static" for _, r in p.recipe.overrides)
    return found.calibration if static else None
