"""What each method makes of 4-bit weights on real models: quality with its interval, and bytes.

Run: ``python benchmarks/bench_methods.py minilm smollm2``. Calibration and test text are different
parts of Python's documentation. The output is Markdown, best first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from torch import Tensor, nn

import language
import models
import zeropoint
from zeropoint.running import model_bytes
from zeropoint.statistics import Estimate, estimate, paired

METHODS: tuple[tuple[str, ...], ...] = (
    (),
    ("clip",),
    ("hqq",),
    ("hadamard",),
    ("smooth",),
    ("awq",),
    ("gptq",),
    ("gptq", "bias-correction"),
    ("clip", "gptq"),
    ("awq", "gptq"),
    ("hadamard", "gptq"),
    ("smooth", "hadamard", "gptq"),
)


@dataclass(frozen=True)
class Subject:
    """A model, data to calibrate with, and a score of each test sample."""

    model: nn.Module
    calibration: list[Any]
    scores: Callable[[nn.Module], Tensor]
    measure: str
    better: int
    """1 where higher scores are better, −1 where lower ones are."""
    shown: Callable[[float], float]
    """The mean score as it is reported."""


def minilm(samples: int) -> Subject:
    """Cosines between the sentence embeddings of the float model and of another."""
    model, tokenizer = models.load_minilm(), models.load_tokenizer()
    sentences = models.english_sentences(2 * samples)
    test, calibration = (
        models.token_batches(tokenizer, part) for part in (sentences[::2], sentences[1::2])
    )
    reference = models.embed(model, test).double()

    def cosines(other: nn.Module) -> Tensor:
        return nn.functional.cosine_similarity(reference, models.embed(other, test).double())

    return Subject(model, calibration, cosines, "mean cosine", 1, float)


def smollm2(samples: int) -> Subject:
    """Losses on rows of 512 tokens, shown as perplexity."""
    model, tokenizer = language.load_smollm2()
    rows = language.token_rows(tokenizer)
    rows = rows[torch.linspace(0, len(rows) - 1, 2 * samples).round().long()]
    test, calibration = (language.batches(part) for part in (rows[::2], rows[1::2]))
    return Subject(
        model,
        calibration,
        lambda other: language.losses(other, test),
        "perplexity",
        -1,
        lambda loss: float(torch.tensor(loss, dtype=torch.float64).exp()),
    )


SUBJECTS = {"minilm": (minilm, 512), "smollm2": (smollm2, 16)}


@dataclass(frozen=True)
class Row:
    """One method's line."""

    name: str
    score: Estimate
    against: str
    bytes: int
    seconds: float


def measure(subject: Subject, recipe: zeropoint.LayerRecipe, methods: Any) -> list[Row]:
    """The float model, and what each method makes of it."""
    scores = {"float32": subject.scores(subject.model)}
    rows = [Row("float32", estimate(scores["float32"]), "", model_bytes(subject.model), 0.0)]
    nearest = None
    for method in methods:
        made = zeropoint.LayerRecipe(recipe.mode, recipe.weight, method=method)
        data = subject.calibration if made.needs_calibration else None
        begun = time.perf_counter()
        quantized = zeropoint.quantize(subject.model, made, calibration=data)
        seconds = time.perf_counter() - begun
        found = subject.scores(quantized)
        nearest = found if not method else nearest
        against = "" if nearest is None or not method else change(subject, nearest, found)
        name = ", ".join(method) or "round to nearest"
        rows.append(Row(name, estimate(found), against, model_bytes(quantized), seconds))
        print(f"{name}: {subject.shown(rows[-1].score.value):.4f}", file=sys.stderr, flush=True)
    first, *rest = rows
    return [first, *sorted(rest, key=lambda row: -subject.better * row.score.value)]


def change(subject: Subject, before: Tensor, after: Tensor) -> str:
    """Whether the samples tell the method from rounding to nearest."""
    found = paired(before, after)
    if found.p_value > 0.05:
        return "no difference shown"
    return "better" if subject.better * found.change.value > 0 else "worse"


def table(subject: Subject, rows: list[Row]) -> str:
    """Markdown."""
    head = (
        f"| method | {subject.measure} | 95 % interval | against round to nearest | MB | seconds |"
    )
    lines = [head, "| --- | ---: | ---: | --- | ---: | ---: |"]
    for row in rows:
        value, low, high = (
            f"{subject.shown(x):.4f}" for x in (row.score.value, row.score.low, row.score.high)
        )
        lines.append(
            f"| {row.name} | {value} | {low} … {high} | {row.against} | {row.bytes / 1e6:.1f} | "
            f"{row.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the models that are asked for, and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=SUBJECTS)
    parser.add_argument("--mode", default="weight-only", choices=["weight-only", "dynamic"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--samples", type=int, help="test samples, and as many to calibrate with")
    parser.add_argument("--methods", nargs="*", help="such as: clip awq,gptq; by default all")
    arguments = parser.parse_args()
    methods: Any = METHODS
    if arguments.methods is not None:
        methods = [(), *(tuple(m.split(",")) for m in arguments.methods)]
    groups = zeropoint.PerGroup(arguments.group)
    spec = replace(zeropoint.WEIGHT_INT4, bits=arguments.bits, granularity=groups)
    recipe = zeropoint.LayerRecipe(arguments.mode, spec)
    for name in arguments.models:
        make, samples = SUBJECTS[name]
        subject = make(arguments.samples or samples)
        rows = measure(subject, recipe, methods)
        print(f"\n{name}, {recipe}, n = {rows[0].score.n}\n\n{table(subject, rows)}", flush=True)


if __name__ == "__main__":
    main()
