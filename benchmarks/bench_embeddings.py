"""What embedding tables of integers save and cost: all-MiniLM-L6-v2 on 512 English sentences.

Run: ``python benchmarks/bench_embeddings.py``. The output is Markdown. Sizes are those of the
checkpoints; cosines are between each sentence's embedding and the float model's.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from torch import nn

import models
import zeropoint
from zeropoint.recipes import TABLES

CHOICES: tuple[tuple[str, str | None], ...] = (
    ("float", None),
    ("int8-dynamic", None),
    ("float", "int8"),
    ("float", "int4"),
    ("int8-dynamic", "int8"),
    ("int8-dynamic", "int4"),
    ("int4", None),
    ("int4", "int8"),
    ("int4", "int4"),
)
"""Recipe of the Linear layers, and name of the tables' spec."""


def quantized(model: nn.Module, recipe: str, tables: str | None) -> nn.Module:
    """A copy of the model by one of :data:`CHOICES`."""
    layers = zeropoint.Recipe(None) if recipe == "float" else zeropoint.get_recipe(recipe)
    spec = None if tables is None else TABLES[tables]
    return zeropoint.quantize(model, replace(layers, embeddings=spec))


def file_bytes(model: nn.Module) -> int:
    """Length of its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        zeropoint.save(model, path)
        return path.stat().st_size


def main() -> None:
    model, tokenizer = models.load_minilm(), models.load_tokenizer()
    batches = models.token_batches(tokenizer, models.english_sentences())
    reference = models.embed(model, batches)
    print("| Linear layers | embeddings | file, MB | mean cosine | worst | Spearman |")
    print("|---|---|---|---|---|---|", flush=True)
    for recipe, tables in CHOICES:
        candidate = quantized(model, recipe, tables)
        kept = models.fidelity(reference, models.embed(candidate, batches))
        print(
            f"| {recipe} | {tables or 'float'} | {file_bytes(candidate) / 1e6:.1f} | "
            f"{kept.mean_cosine:.5f} | {kept.worst_cosine:.5f} | {kept.spearman:.5f} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
