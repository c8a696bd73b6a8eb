"""llama.cpp on the same weights in its own formats, which it makes of the published file itself.

Sizes are those of the files: the embedding table, which is the output layer too, is quantized in
all of them but F32. ``benchmarks/peers/llamacpp_.py`` says how it is compiled.
"""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import language
import peers.llamacpp_
from method_subjects import BEFORE, PROMPT, WRITTEN, Call, Subject
from zeropoint.doctor import version

from .common import Contender, ModelPeer

missing = peers.llamacpp_.missing
_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
"""Takes what llama.cpp logs, a line for each tensor."""


def gguf_file(kind: str, folder: Path) -> Path:
    """The model in a type of llama.cpp's; Q4_1 is the published file, others are made of it.

    Raises:
        RuntimeError: llama.cpp could not.
    """
    import llama_cpp

    source = language.smollm2_folder() / language.SMOLLM2_FILE
    file = folder / f"llama.cpp-{version('llama-cpp-python')}-{kind}.gguf"
    if kind == "Q4_1" or file.exists():
        return source if kind == "Q4_1" else file
    llama_cpp.llama_log_set(_QUIET, None)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(
        llama_cpp, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}"
    )
    options.allow_requantize = True
    part = file.with_suffix(".part")
    ends = (str(source).encode(), str(part).encode())
    if llama_cpp.llama_model_quantize(*ends, ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantize {source.name} to {kind}")
    part.replace(file)
    return file


def _model(file: Path, threads: int, **options: Any) -> Any:
    from llama_cpp import Llama

    return Llama(
        str(file),
        n_ctx=PROMPT + WRITTEN,
        n_batch=PROMPT,
        n_ubatch=PROMPT,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        verbose=False,
        **options,
    )


def losses(model: Any, inputs: list[dict[str, Any]]) -> Tensor:
    """As :func:`language.losses`, of a model that keeps all its logits."""
    found = []
    for row in torch.cat([batch["input_ids"] for batch in inputs]):
        model.reset()
        model.eval(row.tolist())
        logits = torch.from_numpy(model.scores[: len(row) - 1])
        found.append(nn.functional.cross_entropy(logits, row[1:], reduction="none").double().mean())
    return torch.stack(found)


class Reader:
    """Reads a prompt."""

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self.model, self.prompt = model, prompt

    def __call__(self) -> None:
        self.model.reset()
        self.model.eval(self.prompt)


class Writer:
    """Writes greedily, one token at a time; the prompt is read once, by the first call."""

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self.model, self.prompt = model, prompt
        self.first: int | None = None

    def _next(self) -> int:
        from llama_cpp import llama_get_logits_ith

        logits = llama_get_logits_ith(self.model._ctx.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),)).argmax())

    def __call__(self) -> list[int]:
        if self.first is None:
            Reader(self.model, self.prompt)()
            self.first = self._next()
        self.model.n_tokens = len(self.prompt)  # what follows is forgotten
        token, written = self.first, []
        for _ in range(WRITTEN):
            self.model.eval([token])
            token = self._next()
            written.append(token)
        return written


def _prepare(subject: Subject, folder: Path, kind: str) -> Contender:
    file = gguf_file(kind, folder)

    def calls(threads: int) -> dict[str, Call]:
        ids = subject.test[0]["input_ids"][0].tolist()
        return {
            "prompt": Reader(_model(file, threads), ids[:PROMPT]),
            "generation": Writer(_model(file, threads), ids[:BEFORE]),
        }

    def scores() -> Tensor:
        return losses(_model(file, torch.get_num_threads(), logits_all=True), subject.test)

    return Contender(file.stat().st_size, scores, calls)


PEERS = [
    ModelPeer(
        f"llama.cpp {kind}",
        "smollm2",
        version("llama-cpp-python") or "",
        partial(_prepare, kind=kind),
    )
    for kind in ("F32", "Q8_0", "Q4_0", "Q4_1", "Q4_K_M")
]
