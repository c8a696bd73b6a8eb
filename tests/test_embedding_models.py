"""Embedding tables of a real model: what they save, and what they cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import models
import zeropoint
from zeropoint import WEIGHT_INT8, LayerRecipe, QuantizedEmbedding, Recipe


@pytest.mark.model
def test_minilm_is_23_megabytes_and_keeps_its_embeddings(tmp_path: Path) -> None:
    encoder = models.load_minilm()
    quantized = zeropoint.quantize(encoder, Recipe(LayerRecipe("dynamic"), embeddings=WEIGHT_INT8))
    assert not any(isinstance(m, nn.Embedding | nn.Linear) for m in quantized.modules())
    assert sum(isinstance(m, QuantizedEmbedding) for m in quantized.modules()) == 3
    path = tmp_path / "minilm.safetensors"
    zeropoint.save(quantized, path)
    assert 23.0e6 < path.stat().st_size < 23.5e6

    sentences = models.english_sentences(96)
    batches = models.token_batches(models.load_tokenizer(), sentences)
    embedded = models.embed(quantized, batches)
    kept = models.fidelity(models.embed(encoder, batches), embedded)
    assert kept.mean_cosine >= 0.998
    assert kept.worst_cosine >= 0.994
    loaded = zeropoint.load(path, models.untrained_minilm())
    assert (models.embed(loaded, batches) == embedded).all()
