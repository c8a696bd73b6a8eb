"""What methods bring on a real model."""

import pytest
import torch

import bench_methods
import models
import zeropoint


@pytest.mark.model
def test_gptq_beats_rounding_to_nearest_on_minilm():
    encoder, tokenizer = models.load_minilm(), models.load_tokenizer()
    sentences = models.english_sentences(192)
    test, data = (models.token_batches(tokenizer, s) for s in (sentences[::3], sentences[1::3]))
    data += models.token_batches(tokenizer, sentences[2::3])
    reference = models.embed(encoder, test)

    def cosine(method):
        recipe = zeropoint.get_recipe("int4").with_method(method)
        quantized = zeropoint.quantize(encoder, recipe, calibration=data if method else None)
        found = models.embed(quantized, test)
        return float(torch.nn.functional.cosine_similarity(reference, found).mean())

    nearest, better = cosine(()), cosine("gptq")
    assert better > 0.985
    assert 1 - better < 0.5 * (1 - nearest)


def test_bench_prints_what_it_found_best_first():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    x = torch.randn(64, 32) @ torch.randn(32, 32)

    def scores(other):
        with torch.no_grad():
            return torch.nn.functional.cosine_similarity(model(x), other(x)).double()

    subject = bench_methods.Subject(model, [x], scores, "mean cosine", 1, float)
    recipe = zeropoint.LayerRecipe("dynamic", zeropoint.WEIGHT_INT4)
    rows = bench_methods.measure(subject, recipe, [(), ("gptq",)])
    assert [row.name for row in rows] == ["float32", "gptq", "round to nearest"]
    assert rows[1].against == "better"
    assert rows[0].bytes > 2 * rows[1].bytes == 2 * rows[2].bytes
    lines = bench_methods.table(subject, rows).splitlines()
    assert len(lines) == 5
    assert all(line.count("|") == 7 for line in lines)
    assert "| gptq | 0.9" in lines[3]
