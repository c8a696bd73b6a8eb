"""Which observer keeps most of a static layer's output? The table behind ``DEFAULT_OBSERVER``.

Each observer sees 8 batches of 256 rows; then 4096 fresh rows are quantized by its scale and zero
point and multiplied by random float weights. Cells: SQNR of the layer's output in dB.

Run: ``python benchmarks/bench_observers.py`` (seconds).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from zeropoint import ACTIVATION_UINT8, quantize_per_tensor
from zeropoint.observers import OBSERVERS

FEATURES, OUT = 512, 256


def outlier_channels(x: Tensor) -> Tensor:
    """Four channels 25 times the others, as in the residual stream of transformers."""
    scale = torch.ones(FEATURES)
    scale[::128] = 25
    return x * scale


def massive(x: Tensor) -> Tensor:
    """One value in 100,000 is 300 times the standard deviation."""
    return torch.where(torch.rand(x.shape) < 1e-5, 300.0, x)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n, FEATURES),
    "Laplace": lambda n: torch.distributions.Laplace(0.0, 1.0).sample((n, FEATURES)),
    "Student's t, 4": lambda n: torch.distributions.StudentT(4.0).sample((n, FEATURES)),
    "ReLU": lambda n: torch.randn(n, FEATURES).relu(),
    "GELU": lambda n: F.gelu(1.5 * torch.randn(n, FEATURES)),
    "gated SiLU": lambda n: F.silu(2 * torch.randn(n, FEATURES)) * torch.randn(n, FEATURES),
    "softmax": lambda n: torch.softmax(3 * torch.randn(n, FEATURES), -1),
    "outlier channels": lambda n: outlier_channels(torch.randn(n, FEATURES)),
    "rare massive values": lambda n: massive(torch.randn(n, FEATURES)),
}


def sqnr(exact: Tensor, approximate: Tensor) -> float:
    """Signal to quantization noise in dB."""
    noise = (exact - approximate).square().mean()
    return 10 * math.log10(float(exact.square().mean() / noise))


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(FEATURES, OUT) / math.sqrt(FEATURES)
    results: dict[str, list[float]] = {name: [] for name in OBSERVERS}
    table = Table(title="SQNR of a static layer's output, dB")
    for heading in ("activations", *OBSERVERS):
        table.add_column(heading, justify="left" if heading == "activations" else "right")
    for kind, sample in KINDS.items():
        batches, test = [sample(256) for _ in range(8)], sample(4096)
        exact = test @ weight
        for name, observer_class in OBSERVERS.items():
            observer = observer_class()
            for batch in batches:
                observer.observe(batch)
            q = quantize_per_tensor(test, *observer.qparams(ACTIVATION_UINT8), torch.uint8)
            results[name].append(sqnr(exact, q.dequantize() @ weight))
        row = [results[name][-1] for name in OBSERVERS]
        best = max(row)
        table.add_row(kind, *(f"{v:.1f}{' *' if v == best else '  '}" for v in row))
    table.add_section()
    best_of = [max(column) for column in zip(*results.values(), strict=True)]
    table.add_row("mean", *(f"{sum(v) / len(v):.1f}  " for v in results.values()))
    behind = [
        max(b - v for b, v in zip(best_of, values, strict=True)) for values in results.values()
    ]
    table.add_row("most behind the best", *(f"{v:.1f}  " for v in behind))
    Console().print(table)


if __name__ == "__main__":
    main()
