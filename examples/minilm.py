"""A pretrained sentence encoder, quantized: what it costs, what it brings, saved and loaded again.

Run: ``python examples/minilm.py --out out``; it takes a minute or two, most of it timing.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import models
import zeropoint
from tools import console, spread, time_in_turn

FLOAT, OURS = "float32", "zeropoint int8-dynamic"
OURS_BFLOAT16 = "zeropoint int8 + bfloat16"
SIZES = ((1, 32), (32, 128))
"""Sentences × tokens whose latency is measured."""


def contenders() -> dict[str, nn.Module]:
    """MiniLM in float32, bfloat16, by torch's ``quantize_dynamic``, and by ours: with all that is
    no Linear layer (attention, normalization, embeddings) in float32, and in bfloat16."""
    model = models.load_minilm()
    quantized = zeropoint.quantize(model, "int8-dynamic")
    return {
        FLOAT: model,
        "bfloat16": models.bfloat16(model),
        "torch quantize_dynamic": models.torch_quantize_dynamic(model),
        OURS: quantized,
        OURS_BFLOAT16: models.bfloat16(quantized),
    }


def digest(embeddings: Tensor) -> str:
    """SHA-256 of the embeddings' bytes: equal for equal bits only."""
    return hashlib.sha256(embeddings.numpy().tobytes()).hexdigest()


def digest_of_checkpoint(path: Path, sentences: int) -> str:
    """Fill an untrained MiniLM from a checkpoint, embed sentences, and give their digest."""
    model = zeropoint.load(path, models.untrained_minilm())
    batches = models.token_batches(models.load_tokenizer(), models.english_sentences(sentences))
    return digest(models.embed(model.eval(), batches))


def print_fidelity(
    out: Console,
    contenders: dict[str, nn.Module],
    embeddings: dict[str, Tensor],
    file_bytes: dict[str, int],
) -> None:
    """How well each model preserves the float model's embeddings, and the size of its file."""
    table = Table(title=f"all-MiniLM-L6-v2 on {len(embeddings[FLOAT])} English sentences")
    table.add_column("model")
    for heading in ("mean cosine", "worst", "Spearman", "same neighbour", "file"):
        table.add_column(heading, justify="right")
    for name in contenders:
        kept = models.fidelity(embeddings[FLOAT], embeddings[name])
        table.add_row(
            name,
            f"{kept.mean_cosine:.4f}",
            f"{kept.worst_cosine:.4f}",
            f"{kept.spearman:.4f}",
            f"{100 * kept.neighbours:.1f} %",
            f"{file_bytes[name] / 1e6:.1f} MB",
        )
    out.print(table)
    out.print(
        "Cosine: of each embedding to float32's. Spearman: of the similarities of all pairs.\n"
        "Same neighbour: sentences whose most similar other sentence is unchanged.\n"
        "int8 + bfloat16: Linear layers int8-dynamic, all others bfloat16.\n"
    )


def sized_batches(tokenizer: Any) -> dict[str, dict[str, Tensor]]:
    """An input of each of :data:`SIZES`, by its name."""
    return {f"{r} × {t} tokens": models.full_batch(tokenizer, r, t) for r, t in SIZES}


def latencies(
    contenders: dict[str, nn.Module], batch: dict[str, Tensor], rounds: int
) -> dict[str, list[float]]:
    """Seconds of single calls of each model, all in turn."""
    with torch.inference_mode():
        return time_in_turn({name: partial(m, **batch) for name, m in contenders.items()}, rounds)


def print_latency(
    out: Console,
    contenders: dict[str, nn.Module],
    sized: dict[str, dict[str, Tensor]],
    rounds: int,
) -> None:
    """Median latency of each model, and how many times ours is as fast."""
    threads = torch.get_num_threads()
    table = Table(title=f"Latency (medians, models in turn, threads: {threads})")
    table.add_column("model")
    columns = []
    for size, batch in sized.items():
        table.add_column(size, justify="right")
        table.add_column("÷ ours", justify="right")
        with out.status(f"Timing {size}"):
            columns.append(latencies(contenders, batch, rounds))
    for name in contenders:
        cells = []
        for times in columns:
            median = spread(times[name])[1]
            cells += [f"{1e3 * median:.1f} ms", f"{median / spread(times[OURS])[1]:.2f}"]
        table.add_row(name, *cells)
    out.print(table)


def save_all(contenders: dict[str, nn.Module], checkpoint: Path) -> dict[str, int]:
    """Write ours to ``checkpoint``, and give the size in bytes of each contender's file."""
    from safetensors.torch import save_model

    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in contenders.items():
            path = checkpoint if name == OURS else Path(folder) / "model"
            if name.startswith("zeropoint"):
                zeropoint.save(model, path)
            elif name.startswith("torch"):  # its packed weights fit into no safetensors file
                models.save_torch(model, path)
            else:
                save_model(model, str(path))
            sizes[name] = path.stat().st_size
    return sizes


def main(folder: Path, rounds: int, sentences: int, out: Console | None = None) -> None:
    """Quantize, measure, save, load again, print."""
    out = out or console()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "minilm-int8.safetensors"
    all_models = contenders()
    tokenizer = models.load_tokenizer()
    batches = models.token_batches(tokenizer, models.english_sentences(sentences))
    sized = sized_batches(tokenizer)
    with out.status("Embedding"):
        embeddings = {name: models.embed(model, batches) for name, model in all_models.items()}
    print_fidelity(out, all_models, embeddings, save_all(all_models, checkpoint))
    print_latency(out, all_models, sized, rounds)

    def spearman(model: nn.Module) -> float:
        return models.fidelity(embeddings[FLOAT], models.embed(model, batches)).spearman

    with out.status("Comparing layer by layer"):
        report = zeropoint.compare(
            all_models[FLOAT],
            all_models[OURS],
            batches[:4],
            metric=spearman,
            timing=sized,
            repeats=rounds,
        )
    report.to_html(folder / "minilm.html")
    report.to_json(folder / "minilm.json")

    with out.status("Loading the checkpoint in a new process"):
        loaded = subprocess.run(
            [sys.executable, __file__, "--digest", str(checkpoint), "--sentences", str(sentences)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()
    here = digest(embeddings[OURS])
    out.print(f"\nEmbeddings here:                  SHA-256 {here[:32]}…")
    out.print(f"loaded back in a new process:     SHA-256 {loaded[:32]}…")
    if here != loaded:
        raise SystemExit(f"{checkpoint} gives other embeddings than the model it was saved from")
    out.print("The same bit for bit.")
    out.print("\nWritten:")
    for name in (checkpoint.name, "minilm.html", "minilm.json"):
        out.print(f"  {folder / name}", soft_wrap=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing")
    parser.add_argument("--sentences", type=int, default=512, help="how many are embedded")
    parser.add_argument(
        "--digest", type=Path, metavar="FILE", help="only print the digest of a checkpoint's output"
    )
    arguments = parser.parse_args()
    if arguments.digest:
        print(digest_of_checkpoint(arguments.digest, arguments.sentences))
    else:
        main(arguments.out, arguments.rounds, arguments.sentences)
