"""The command line on a Hugging Face folder: a tiny BERT with a tokenizer, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zeropoint
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


def test_folder_into_a_folder_with_its_tokenizer(bert: Path) -> None:
    import transformers

    import zeropoint.integrations.transformers

    line = ["quantize", bert, "--to", "int4", "--method", "gptq", "--calibrate", "lines.txt"]
    text = ok(*line, "--out", "int4")
    assert "Wrote int4: " in text
    ok(*line, "--out", "int4.safetensors")
    model = transformers.AutoModel.from_pretrained("int4")
    expected = zeropoint.load("int4.safetensors", sources.load_model(str(bert)).model)
    tokens = transformers.AutoTokenizer.from_pretrained("int4")("the cat sat", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**tokens)[0], expected(**tokens)[0])
    assert "is no empty folder" in fails(*line, "--out", "int4")


def test_folder_of_a_language_model_whose_output_layer_is_tied(bert: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 11, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True
    )
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained("llama")
    line = ["quantize", "llama", "--to", "int4", "--method", "gptq", "--calibrate", "lines.txt"]
    text = ok(*line, "--out", "q.safetensors")
    assert "quantized 14 of 15" in text  # 2 × (4 attention + 3 feed-forward)
    assert "by gptq (output error −" in text
    text = ok(*line, "--embeddings", "int8", "--out", "tables.safetensors")
    assert "quantized 15 of 15 Linear layers and 1 of 1 embeddings" in text
    rows = [" ".join(row.split()) for row in text.splitlines()]
    assert "lm_head dynamic, weight int8 per channel" in rows
    assert "model.embed_tokens shares the weight of lm_head" in rows
    loaded = sources.load_model("llama")
    batch = loaded.tokenizer("the cat sat", return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = zeropoint.quantize(
        loaded.model,
        zeropoint.get_recipe("int4").with_method("gptq"),
        calibration=sources.load_data("lines.txt", loaded),
    )
    found = zeropoint.load("q.safetensors", loaded.model)
    assert torch.equal(found(**batch).logits, expected(**batch).logits)
    assert found.generate(**batch, max_new_tokens=4, min_new_tokens=4).shape == (1, 7)


def test_folder_begun_with_another_recipe(bert: Path) -> None:
    Path("q.safetensors.unfinished").mkdir()
    begun = Path("q.safetensors.unfinished", "begun.json")
    begun.write_text("{}")
    line = ["quantize", bert, "--to", "int8-dynamic", "--out", "q.safetensors"]
    assert "begin anew with resume=False (--restart)" in fails(*line)
    ok(*line, "--restart")
    assert not begun.exists()


@pytest.mark.model
def test_minilm_as_in_memory(folder: Path) -> None:
    from models import english_sentences, minilm_folder

    path = minilm_folder()
    Path("lines.txt").write_text("\n".join(english_sentences(24)))
    recipe = zeropoint.LayerRecipe("static", method=("smooth", "bias-correction"))
    Path("recipe.json").write_text(json.dumps(zeropoint.Recipe(recipe).to_dict()))
    ok("quantize", path, "--to", "recipe.json", "--calibrate", "lines.txt", "-o", "q.safetensors")
    loaded = sources.load_model(str(path))
    data = sources.load_data("lines.txt", loaded)
    quantized = zeropoint.quantize(loaded.model, recipe, calibration=data)
    zeropoint.save(quantized, "expected.safetensors")
    assert Path("q.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
