"""The real models that methods are compared on: their data, their scores and what is timed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

import language
import models

Call = Callable[[], Any]
Model = Callable[..., Any]
"""An ``nn.Module``, or what is called like one."""

PROMPT, BEFORE, WRITTEN = 512, 64, 32
"""Tokens of the prompt that is timed; before what is written; written, one at a time."""


@dataclass(frozen=True)
class Case:
    """Something that is timed.

    Args:
        name: as the table's column is called.
        tokens: of one call; 0 where the latency of a call is shown instead.
    """

    name: str
    tokens: int


@dataclass(frozen=True)
class Subject:
    """A model, data to calibrate with, a score of each test sample, and calls to time."""

    name: str
    model: nn.Module
    calibration: list[Any]
    test: list[Any]
    scores: Callable[[Model], Tensor]
    measure: str
    better: int
    """1 where higher scores are better, −1 where lower ones are."""
    shown: Callable[[float], float]
    """The mean score as it is reported."""
    cases: tuple[Case, ...]
    calls: Callable[[Model], dict[str, Call]]
    """A call of each case, by its name."""


def spread_out(count: int, test: int, calibration: int) -> tuple[list[int], list[int]]:
    """Indices of so many samples of each kind, evenly spread and in turn, none in both.

    >>> spread_out(10, 3, 2)
    ([0, 4, 9], [2, 7])

    Raises:
        ValueError: there are fewer than ``test + calibration``.
    """
    wanted = test + calibration
    if wanted > count:
        raise ValueError(f"test + calibration must be at most {count} samples, got {wanted}")
    every = [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]
    kept = {i * wanted // calibration + wanted // calibration // 2 for i in range(calibration)}
    return (
        [index for i, index in enumerate(every) if i not in kept],
        [index for i, index in enumerate(every) if i in kept],
    )


def minilm(test: int, calibration: int) -> Subject:
    """Cosines between the sentence embeddings of the float model and of another."""
    model, tokenizer = models.load_minilm(), models.load_tokenizer()
    sentences = models.english_sentences(test + calibration)
    tested, calibrated = (
        models.token_batches(tokenizer, [sentences[i] for i in part])
        for part in spread_out(len(sentences), test, calibration)
    )
    reference = models.embed(model, tested).double()
    many, one = models.full_batch(tokenizer, 32, 128), models.full_batch(tokenizer, 1, 32)

    def cosines(other: Model) -> Tensor:
        return nn.functional.cosine_similarity(reference, models.embed(other, tested).double())

    return Subject(
        "minilm",
        model,
        calibrated,
        tested,
        cosines,
        "mean cosine",
        1,
        float,
        (Case("32 × 128 tokens", 32 * 128), Case("1 × 32 tokens", 0)),
        lambda other: {
            "32 × 128 tokens": partial(other, **many),
            "1 × 32 tokens": partial(other, **one),
        },
    )


def smollm2(test: int, calibration: int) -> Subject:
    """Losses on rows of 512 tokens, shown as perplexity."""
    model, tokenizer = language.load_smollm2()
    rows = language.token_rows(tokenizer)
    tested, calibrated = (
        language.batches(rows[part]) for part in spread_out(len(rows), test, calibration)
    )
    first = tested[0]["input_ids"][:1]
    return Subject(
        "smollm2",
        model,
        calibrated,
        tested,
        lambda other: language.losses(other, tested),  # type: ignore[arg-type]
        "perplexity",
        -1,
        math.exp,
        (Case("prompt", PROMPT), Case("generation", WRITTEN)),
        lambda other: {
            "prompt": partial(read, other, first[:, :PROMPT]),
            "generation": Writer(other, first[:, :BEFORE]),
        },
    )


def read(model: Model, prompt: Tensor) -> Tensor:
    """The logits behind a prompt, int64 ``(1, tokens)``, and a cache to go on with."""
    return model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits


class Writer:
    """Writes :data:`WRITTEN` tokens behind a prompt, greedily, one at a time with the cache.

    The prompt is read once: a call is the writing alone, after which the cache is as it was.
    """

    def __init__(self, model: Model, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.cache: Any = None

    def __call__(self) -> list[int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the cache's name changes in 5.40
            if self.cache is None:
                out = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1)
                self.cache, self.first = out.past_key_values, out.logits[:, -1].argmax(-1)
            token, written = self.first[:, None], []
            for _ in range(WRITTEN):
                out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                written.append(int(token))
        self.cache.crop(-WRITTEN)
        return written


SUBJECTS: dict[str, tuple[Callable[[int, int], Subject], int, int]] = {
    "minilm": (minilm, 256, 256),
    "smollm2": (smollm2, 32, 16),
}
"""By name: what makes it, and how many samples it is tested and calibrated with."""
