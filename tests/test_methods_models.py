"""What methods bring on a real model."""

import pytest
import torch

import models
import zeropoint


@pytest.mark.model
def test_gptq_beats_rounding_to_nearest_on_minilm():
    encoder, tokenizer = models.load_minilm(), models.load_tokenizer()
    sentences = models.english_sentences(96)
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
