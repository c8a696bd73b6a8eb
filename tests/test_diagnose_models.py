"""Faults planted into real models are found, named, ranked first and repaired."""

from __future__ import annotations

import copy
import pydoc_data.topics
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import digits
import models
import zeropoint
from faults import inputs_of, loudest, plant_outliers
from zeropoint import Diagnosis, LayerRecipe, MinMaxObserver, QuantSpec, Recipe, diagnose, quantize
from zeropoint.calibrate import OBSERVERS
from zeropoint.diagnose.variants import chosen


def repaired(model: nn.Module, found: Diagnosis, calibration: list[Any]) -> nn.Module:
    """The model by the suggestions, quantized by ``quantize`` itself."""
    layers = chosen(model, found.suggestions).chosen.values()
    needed = any(layer.needs_calibration for layer in layers)
    return quantize(model, found.suggestions, calibration=calibration if needed else None)


# Digits


@pytest.fixture(scope="module")
def trained() -> tuple[digits.Digits, nn.Sequential]:
    data = digits.load_digits()
    return data, digits.train(*data.train)


def accuracy_of(data: digits.Digits) -> Any:
    images, labels = data.test

    def accuracy(model: nn.Module) -> Tensor:
        return (model(images).argmax(1) == labels).float()

    return accuracy


def test_digits_outlier_channels(trained: tuple[digits.Digits, nn.Sequential]) -> None:
    data, healthy = trained
    model, accuracy = copy.deepcopy(healthy), accuracy_of(data)
    batches = list(data.test[0].split(64))
    channels = loudest(inputs_of(model, model[4], batches), 6)
    plant_outliers(model[2], [model[4]], channels, 1000.0)
    with torch.no_grad():
        assert torch.allclose(model(batches[0]), healthy(batches[0]), atol=1e-4)
    found = diagnose(model, batches, accuracy)
    assert [c.layer for c in found.causes] == ["4"]
    [cause] = found.causes
    assert cause.kind == "outlier-channels"
    sick = found.layer("4")
    assert {x.index for x in sick.outliers} == set(channels.tolist())
    assert min(x.ratio for x in sick.outliers) > 100
    assert sick.activations_only_sqnr_db < sick.weights_only_sqnr_db
    assert found.worst(1) == [sick]
    assert found.metric is not None
    assert found.metric.quantized < found.metric.float_model - 0.3
    assert found.metric.loss is not None
    assert found.metric.loss.significant
    after = float(accuracy(repaired(model, found, batches)).double().mean())
    assert after == found.metric.repaired
    assert after >= found.metric.float_model - 0.005


def test_digits_ruined_range(trained: tuple[digits.Digits, nn.Sequential]) -> None:
    data, model = trained
    batches, accuracy = list(data.test[0].split(64)), accuracy_of(data)
    calibration = [batch.clone() for batch in data.calibration[0].split(64)]
    calibration[0][5, 3] = 400.0  # one broken pixel in one of 180 images
    recipe = Recipe(LayerRecipe("static", observer="minmax"))
    found = diagnose(model, batches, accuracy, recipe=recipe, calibration=calibration)
    assert found.causes[0].layer == "0"
    assert found.causes[0].kind == "bad-range"
    assert "one chosen on this data" in found.causes[0].evidence
    assert found.metric is not None
    assert found.metric.quantized < found.metric.float_model - 0.05
    after = float(accuracy(repaired(model, found, calibration)).double().mean())
    assert after == found.metric.repaired
    assert after >= found.metric.float_model - 0.005


# MiniLM


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    return models.load_minilm()


@pytest.fixture(scope="module")
def sentences() -> list[Any]:
    return models.token_batches(models.load_tokenizer(), models.english_sentences(16))


def cosine_to(expected: Tensor, batches: list[Any]) -> Any:
    def cosine(model: nn.Module) -> Tensor:
        return F.cosine_similarity(expected, models.embed(model, batches))

    return cosine


LAYER = "transformer.encoder.layer.2"


@pytest.mark.model
def test_minilm_outlier_channels(encoder: nn.Module, sentences: list[Any]) -> None:
    model = copy.deepcopy(encoder)
    metric = cosine_to(models.embed(model, sentences), sentences)
    modules = dict(model.named_modules())
    # The value projection feeds attention, whose weighted means keep each channel's scale.
    value, out = (modules[f"{LAYER}.attention.{name}"] for name in ("self.value", "output.dense"))
    channels = loudest(inputs_of(model, out, sentences[:1]), 4)
    plant_outliers(value, [out], channels, 300.0)
    assert float(metric(model).min()) > 0.9999
    found = diagnose(model, sentences, metric, samples=2, metric_layers=0)
    assert [c.layer for c in found.causes] == [f"{LAYER}.attention.output.dense"]
    assert found.causes[0].kind == "outlier-channels"
    assert set(channels.tolist()) <= {x.index for x in found.layer(found.causes[0].layer).outliers}
    assert found.metric is not None
    assert found.metric.repaired is not None
    healthy = float(metric(quantize(encoder, "int8-dynamic")).mean())
    assert found.metric.quantized < healthy - 0.003
    after = float(metric(repaired(model, found, sentences)).mean())
    assert after == pytest.approx(found.metric.repaired, abs=1e-6)
    assert after > healthy - 0.0005


class Ruined(MinMaxObserver):
    """Takes a range a hundred times too wide."""

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        return 100 * self.lo, 100 * self.hi


@pytest.mark.model
def test_minilm_ruined_range(
    encoder: nn.Module, sentences: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = cosine_to(models.embed(encoder, sentences), sentences)
    monkeypatch.setitem(OBSERVERS, "ruined", Ruined)
    ruined, name = LayerRecipe("static", observer="ruined"), f"{LAYER}.intermediate.dense"
    recipe = Recipe(LayerRecipe("dynamic"), ((name, ruined),))
    found = diagnose(encoder, sentences, metric, recipe=recipe, samples=2, metric_layers=0)
    assert [c.layer for c in found.causes] == [name]
    assert found.causes[0].kind == "bad-range"
    assert found.metric is not None
    assert found.metric.quantized < 0.98
    after = float(metric(repaired(encoder, found, sentences)).mean())
    assert after == pytest.approx(found.metric.repaired, abs=1e-6)
    assert after > 0.998


@pytest.mark.model
def test_minilm_costs_less_than_twenty_evaluations(encoder: nn.Module) -> None:
    sentences = models.token_batches(models.load_tokenizer(), models.english_sentences(32))
    found = diagnose(encoder, sentences)
    assert len(found.layers) == 37
    assert found.evaluations < 20  # what it takes in time, docs/diagnose.md says
    assert found.cost == pytest.approx(found.seconds / found.evaluation_seconds)
    assert found.causes == ()  # int8-dynamic spares this model


# A language model, trained for seconds on Python's documentation


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.norm2(x)).relu())


class LanguageModel(nn.Module):
    """Characters to logits of the next one; the head is tied to the embedding."""

    def __init__(self, characters: int, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@pytest.fixture(scope="module")
def language() -> tuple[LanguageModel, Tensor]:
    text = re.sub(r"[^a-z ]+", " ", " ".join(pydoc_data.topics.topics.values()).lower())
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[c] for c in text[:200_000]])
    torch.manual_seed(0)
    model = LanguageModel(len(known))
    with torch.no_grad():
        model.embed.weight.mul_(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        at = torch.randint(len(ids) - 20_065, (32, 1)) + torch.arange(65)
        loss = F.cross_entropy(model(ids[at[:, :-1]]).flatten(0, 1), ids[at[:, 1:]].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = ids[-20_000:][: 64 * 65].reshape(64, 65)
    return model.eval(), held_out


def losses_of(text: Tensor) -> Any:
    """Cross-entropy of each text, nats a character."""

    @torch.no_grad()
    def loss(model: nn.Module) -> Tensor:
        found = F.cross_entropy(model(text[:, :-1]).transpose(1, 2), text[:, 1:], reduction="none")
        return found.mean(1)

    return loss


def test_language_model_learned_something(language: tuple[LanguageModel, Tensor]) -> None:
    model, text = language
    with torch.no_grad():
        assert float(losses_of(text)(model).mean()) < 2.3  # by letters' frequencies: about 2.9


def test_language_model_outlier_channels(language: tuple[LanguageModel, Tensor]) -> None:
    healthy, text = language
    model, loss = copy.deepcopy(healthy), losses_of(text)
    data = list(text[:, :-1].split(16))
    block = model.blocks[0]
    channels = loudest(inputs_of(model, block.qkv, data), 5)
    plant_outliers(block.norm1, [block.qkv], channels, 300.0)
    found = diagnose(model, data, loss)
    assert [c.layer for c in found.causes] == ["blocks.0.qkv"]
    assert found.causes[0].kind == "outlier-channels"
    assert "head" in found.left  # tied to the embedding
    assert found.metric is not None
    assert found.metric.quantized > found.metric.float_model + 0.05
    after = float(loss(repaired(model, found, data)).mean())
    assert after == pytest.approx(found.metric.repaired, abs=1e-5)
    assert after < found.metric.float_model + 0.01


def test_language_model_ruined_range(
    language: tuple[LanguageModel, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = language
    loss = losses_of(text)
    data = list(text[:, :-1].split(16))
    monkeypatch.setitem(OBSERVERS, "ruined", Ruined)
    ruined = LayerRecipe("static", observer="ruined")
    recipe = Recipe(LayerRecipe("static"), (("blocks.0.down", ruined),))
    found = diagnose(model, data, loss, recipe=recipe)
    assert found.causes[0].layer == "blocks.0.down"
    assert found.causes[0].kind == "bad-range"
    assert found.causes[0].cure == replace(ruined, observer=found.causes[0].cure.observer)
    after = float(loss(repaired(model, found, data)).mean())
    assert found.metric is not None
    assert after < found.metric.quantized
    assert after < found.metric.float_model + 0.01


def test_public_names() -> None:
    assert zeropoint.diagnose is diagnose
