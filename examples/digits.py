"""A small network of zeropoint's Linear layers: trained, quantized dynamically and statically.

The data are the 1,797 handwritten digits that scikit-learn brings along. Run: ``python
examples/digits.py``; it takes seconds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import zeropoint
from tools import console, spread, time_in_turn
from zeropoint.report import model_bytes


class Digits(NamedTuple):
    """Images, float32 ``(n, 64)`` within [0, 1], and labels, int64 ``(n,)``, in three sets."""

    train: tuple[Tensor, Tensor]
    calibration: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(seed: int = 0) -> Digits:
    """Training (60 %), calibration (10 %) and test set (30 %), stratified by digit."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32)
    rest, test, rest_labels, test_labels = train_test_split(
        images, labels, test_size=0.3, stratify=labels, random_state=seed
    )
    train, calibration, train_labels, calibration_labels = train_test_split(
        rest, rest_labels, test_size=1 / 7, stratify=rest_labels, random_state=seed
    )
    return Digits(
        (torch.from_numpy(train), torch.from_numpy(train_labels)),
        (torch.from_numpy(calibration), torch.from_numpy(calibration_labels)),
        (torch.from_numpy(test), torch.from_numpy(test_labels)),
    )


def train(images: Tensor, labels: Tensor, epochs: int = 40, seed: int = 0) -> nn.Sequential:
    """A trained network of three Linear layers, in evaluation mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        zeropoint.Linear(64, 256),
        nn.ReLU(),
        zeropoint.Linear(256, 128),
        nn.ReLU(),
        zeropoint.Linear(128, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """How many of the images the model names rightly."""
    return int((model(images).argmax(1) == labels).sum())


def quantized_models(model: nn.Module, calibration: Tensor) -> dict[str, nn.Module]:
    """The model quantized dynamically and statically; the original stays as it is."""
    return {
        "int8-dynamic": zeropoint.quantize(model, "int8-dynamic"),
        "int8-static": zeropoint.quantize(
            model, "int8-static", calibration=calibration.split(64), progress=False
        ),
    }


def main(out: Console | None = None) -> None:
    """Train, quantize, measure, print."""
    out = out or console()
    data = load_digits()
    images, labels = data.test
    model = train(*data.train)
    models = {"float32": model, **quantized_models(model, data.calibration[0])}

    with torch.inference_mode():
        one = time_in_turn({name: lambda m=m: m(images[:1]) for name, m in models.items()})
        all_ = time_in_turn({name: lambda m=m: m(images) for name, m in models.items()})

    table = Table(title=f"Digits: 64 → 256 → 128 → 10, {len(images)} test images")
    table.add_column("model")
    for heading in ("accuracy", "wrong", "size", "1 image", f"{len(images)} images"):
        table.add_column(heading, justify="right")
    for name, m in models.items():
        right = correct(m, images, labels)
        table.add_row(
            name,
            f"{100 * right / len(images):.2f} %",
            str(len(images) - right),
            f"{model_bytes(m) / 1e3:.1f} KB",
            f"{1e6 * spread(one[name])[1]:.1f} µs",
            f"{1e6 * spread(all_[name])[1]:.0f} µs",
        )
    out.print(table)
    out.print(f"Static scales come from the {len(data.calibration[0])} images set aside for them.")


if __name__ == "__main__":
    main()
