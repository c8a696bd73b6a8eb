"""What ``zeropoint.search`` finds, beside the best single recipe of the same size, on real models.

Run: ``python benchmarks/bench_search.py``; it takes minutes. The output is the Markdown of
``docs/search.md``. Models: a network trained on scikit-learn's digits, and all-MiniLM-L6-v2. All
drops were measured on samples that decided nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from torch import Tensor, nn

import digits
import models
import zeropoint
from tools import machine
from zeropoint import Front, LayerRecipe, QuantSpec
from zeropoint.running import pick_output
from zeropoint.search import Point
from zeropoint.search.validate import Fidelity
from zeropoint.spec import PerChannel, PerGroup
from zeropoint.splits import split, split_indices
from zeropoint.statistics import Comparison, Estimate, paired

SEED = 0
DROPS = (0.001, 0.01, 0.05)
"""Each is asked of one front, which was searched for the one in the middle."""


def grid() -> list[str | LayerRecipe]:
    """Weights of 8 bits and fewer, by channel and in groups with bfloat16 scales; activations are
    rounded to 8 bits row by row."""
    by_channel = [QuantSpec(bits, False, False, PerChannel(0)) for bits in (4, 5, 6, 7)]
    in_groups = [
        QuantSpec(bits, False, False, PerGroup(size), torch.bfloat16)
        for bits in (2, 3, 4)
        for size in (32, 128)
    ]
    return ["int8-dynamic", *(LayerRecipe("dynamic", spec) for spec in by_channel + in_groups)]


@dataclass(frozen=True)
class Case:
    """A model, its data, and how its samples are scored.

    Args:
        scores: a model → scores of the held-out samples.
    """

    name: str
    model: nn.Module
    data: Sequence[Any]
    metric: Callable[[nn.Module], Any] | None
    scores: Callable[[nn.Module], np.ndarray]


def digits_case(accuracy: bool) -> Case:
    """Digits: 720 images that the network was not trained on, scored by accuracy or by cosine."""
    data = digits.load_digits(SEED)
    model = digits.train(*data.train, seed=SEED)
    images = torch.cat([data.calibration[0], data.test[0]])
    labels = torch.cat([data.calibration[1], data.test[1]])
    batches = list(images.split(64))
    if not accuracy:
        return Case("Digits, cosine", model, batches, None, _fidelity(model, batches))

    def right(m: nn.Module) -> Tensor:
        return m(images).argmax(1) == labels

    def held_out(m: nn.Module) -> np.ndarray:
        with torch.inference_mode():
            return right(m).double().numpy()[split_indices(len(images), seed=SEED)["evaluation"]]

    right.__name__ = "accuracy"
    return Case("Digits, accuracy", model, batches, right, held_out)


def minilm_case(sentences: int) -> Case:
    """MiniLM on English sentences, scored by the cosine of their embeddings with the float ones."""
    model = models.load_minilm()
    batches = models.token_batches(
        models.load_tokenizer(), models.english_sentences(sentences), batch_size=16
    )
    return Case("MiniLM, cosine", model, batches, None, _fidelity(model, batches))


def _fidelity(model: nn.Module, batches: Sequence[Any]) -> Callable[[nn.Module], np.ndarray]:
    judge = Fidelity(model, split(batches, seed=SEED).evaluation, pick_output)
    judge.keep()
    return judge


@dataclass(frozen=True)
class Duel:
    """A recipe for all layers, and the mixture that is no larger, on the same held-out samples."""

    uniform: Point
    mixture: Point
    comparison: Comparison


def duels(case: Case, front: Front) -> list[Duel]:
    """Each single recipe against the mixture that ``max_bytes`` of its size chooses on search
    data."""
    found = []
    for uniform in front.uniform:
        mixture = front.within(max_bytes=uniform.bytes).chosen
        if mixture is None or mixture.recipe == uniform.recipe:
            continue
        scored = [
            case.scores(
                zeropoint.quantize(
                    case.model,
                    p.recipe,
                    calibration=front.calibration if _needs_data(p) else None,
                )
            )
            for p in (uniform, mixture)
        ]
        if not np.array_equal(*scored):  # groups of 128 are groups of 64 where there are 64 inputs
            found.append(Duel(uniform, mixture, paired(*scored, seed=SEED)))
    return found


def best_at_each_size(found: Sequence[Duel]) -> list[Duel]:
    """Those whose single recipe no smaller one is better than."""
    best: list[Duel] = []
    for duel in sorted(found, key=lambda d: (d.uniform.bytes, d.uniform.search_drop.value)):
        if not best or duel.uniform.search_drop.value < best[-1].uniform.search_drop.value:
            best.append(duel)
    return best


def _needs_data(p: Point) -> bool:
    return any(r is not None and r.needs_calibration for _, r in p.recipe.overrides)


def search(case: Case, **arguments: Any) -> Front:
    """The front of a case."""
    return zeropoint.search(
        case.model, case.data, case.metric, choices=grid(), seed=SEED, **arguments
    )


def report(case: Case, drops: Sequence[float]) -> list[str]:
    """The Markdown of a case."""
    lines = [f"### {case.name}", ""]
    lines += ["| asked: a drop of at most | bytes | × smaller | expected | on held-out data | |"]
    lines += ["|---|---|---|---|---|---|"]
    whole = search(case, max_drop=drops[len(drops) // 2])
    for limit in drops:
        front = whole.within(max_drop=limit)
        p = front.chosen
        if p is None:
            lines.append(f"| {limit:g} | – | | | {front.verdict} | |")
            continue
        sure = front.certain_index is not None and front.chosen_index is not None
        certain = sure and front.certain_index <= front.chosen_index  # type: ignore[operator]
        lines.append(
            f"| {limit:g} | {p.bytes:,} | {front.float_bytes / p.bytes:.2f} | "
            f"{p.estimated_drop:.2g} | {interval(p.measured)} | "
            f"{'certain' if certain else 'not certain'} |"
        )
    c = whole.check
    samples = ", ".join(f"{n} {name}" for name, n in whole.samples.items())
    lines += [
        "",
        f"Samples: {samples}. Float: {whole.float_bytes:,} bytes. Estimated against measured "
        f"damages of {len(c.pairs)} (layer, choice) pairs: rank correlation {c.spearman:.3f}, "
        f"measured / estimated {c.ratio:.2f} (median).",
        "",
    ]
    if case.metric is not None:  # so few samples do not tell one recipe's accuracy from another's
        return lines
    lines += [
        "| the best single recipe | bytes | drops | mixture: bytes | drops | less, by | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for d in best_at_each_size(duels(case, whole)):
        label = next(iter(d.uniform.layers))
        u, m, change = d.uniform.measured, d.mixture.measured, d.comparison.change
        p_value = d.comparison.p_value
        lines.append(
            f"| {label} | {d.uniform.bytes:,} | {u.value:.3g} | {d.mixture.bytes:,} | "
            f"{m.value:.3g} | {interval(change)} | "
            f"{'< 0.001' if p_value < 1e-3 else f'{p_value:.2g}'} |"
        )
    return [*lines, ""]


def interval(x: Estimate) -> str:
    """``0.0094 (0.0090 … 0.0099)``."""
    return f"{x.value:.3g} ({x.low:.3g} … {x.high:.3g})".replace("-", "−")


def main() -> None:
    """Search, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=512, help="for MiniLM; 0 leaves it out")
    arguments = parser.parse_args()
    print(machine(), "\n")
    cases = [digits_case(accuracy=True), digits_case(accuracy=False)]
    if arguments.sentences:
        cases.append(minilm_case(arguments.sentences))
    for case in cases:
        drops = (0.01, 0.03) if case.metric else DROPS
        print("\n".join(report(case, drops)), flush=True)


if __name__ == "__main__":
    main()
