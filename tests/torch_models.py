"""Models that torch.ao.quantization made, for the tests of what replaces it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zeropoint
from golden.make_torch_ao import FloatNet, Others, Traced

GOLDEN = Path(__file__).parent / "golden" / "torch_ao"
EXPECTED: dict[str, Any] = json.loads(GOLDEN.with_suffix(".json").read_text())
STATIC = [name for name, entry in EXPECTED.items() if entry.get("inputs")]
DYNAMIC = [name for name in EXPECTED if "dynamic" in name]
ENGINES = [e for e in ("x86", "fbgemm", "onednn", "qnnpack")
           if e in torch.backends.quantized.supported_engines]  # fmt: skip


def golden(name: str) -> Path:
    return GOLDEN / f"{name}.pt"


def architecture(name: str) -> nn.Module:
    """The float model that a golden file was made of."""
    if name.startswith("fx"):
        return Traced()
    return Others() if name.startswith("others") else FloatNet()


def load(path: Path, name: str) -> nn.Module:
    return zeropoint.load(path, architecture(name)).eval()


@contextmanager
def torchs_engine(name: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
