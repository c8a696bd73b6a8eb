"""Small float models and their quantized twins, for the tests of reports."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import Tensor, nn

from zeropoint import Linear, QuantizedLinear, Report, compare


def quantized(model: nn.Module, mode: Any = "dynamic", keep: tuple[str, ...] = ()) -> nn.Module:
    """A copy with its Linear layers replaced, those named in ``keep`` excepted."""
    model = copy.deepcopy(model)
    if isinstance(model, nn.Linear):
        return QuantizedLinear.from_linear(model, mode)
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(child, nn.Linear) and path not in keep:
                setattr(module, child_name, QuantizedLinear.from_linear(child, mode))
    return model


def fast(*args: Any, **kwargs: Any) -> Report:
    """``compare`` without timing."""
    return compare(*args, **{"repeats": 0, **kwargs})


def sqnr(y: Tensor, other: Tensor) -> float:
    y, other = y.double(), other.double()
    return 10 * math.log10(float((y**2).sum()) / float(((y - other) ** 2).sum()))


def chain() -> nn.Sequential:
    return nn.Sequential(Linear(12, 24), nn.ReLU(inplace=True), Linear(24, 6))


class Function(nn.Module):
    """A model that returns what a function makes of one Linear layer's output."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer = Linear(8, 4)
        self.function = function

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        y = self.layer(x)
        return self.function(y if scale is None else y * scale)
