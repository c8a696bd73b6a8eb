"""The command line on a Hugging Face folder: a tiny BERT with a tokenizer, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import fails, in_folder, ok
from zeropoint import sources

__all__ = ["in_folder"]  # a fixture: used by being here


@pytest.fixture
def bert(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", *["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran"]]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained("bert")
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(1)
    transformers.BertModel(config).save_pretrained("bert")
    Path("lines.txt").write_text("the cat sat\na dog ran on the mat\n" * 20)
    return folder / "bert"


def test_folder_static_calibrated_on_lines_of_text(bert: Path) -> None:
    line = ["quantize", bert, "--to", "int8-static", "--out", "q.safetensors"]
    text = ok(*line, "--calibrate", "lines.txt", "--batch-size", 8)
    assert "quantized 13 of 13" in text  # 2 × (4 attention + 2 feed-forward) + the pooler
    text = ok("compare", bert, "q.safetensors", "--data", "lines.txt", "--json", "r.json")
    assert "encoder.layer.0" in text
    report = json.loads(Path("r.json").read_text())
    assert report["outputs"]["cosine_mean"] > 0.99


def test_folder_keeps_its_weights_dtype_and_architecture(bert: Path) -> None:
    import transformers

    loaded = sources.load_model(str(bert))
    assert type(loaded.model) is transformers.BertModel
    assert loaded.warnings == ()
    config = json.loads((bert / "config.json").read_text())
    weights = load_file(bert / "model.safetensors")
    assert all(
        torch.equal(t, weights[n]) for n, t in loaded.model.state_dict().items() if n in weights
    )
    # A head without weights: told, and the same each time.
    config["architectures"] = ["BertForSequenceClassification"]
    (bert / "config.json").write_text(json.dumps(config))
    first, second = (sources.load_model(str(bert)) for _ in range(2))
    assert type(first.model) is transformers.BertForSequenceClassification
    assert "classifier.weight" in first.warnings[0]
    assert torch.equal(first.model.classifier.weight, second.model.classifier.weight)


def test_folder_with_named_tensors(bert: Path) -> None:
    save_file(
        {"input_ids": torch.randint(0, 9, (6, 5)), "attention_mask": torch.ones(6, 5).long()},
        "ids.safetensors",
    )
    ok("quantize", bert, "--to", "int8-dynamic", "--out", "q.safetensors")
    ok("compare", bert, "q.safetensors", "--data", "ids.safetensors", "--batch-size", 4)


def test_folder_with_broken_weights_is_one_line(bert: Path) -> None:
    (bert / "model.safetensors").write_bytes(b"not a safetensors file")
    fails("quantize", bert, "--to", "int8-dynamic", "--out", "q.safetensors")
