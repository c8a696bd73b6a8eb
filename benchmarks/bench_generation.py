"""How fast a language model reads a prompt and writes, in float, 8 and 4 bits; llama.cpp beside it.

Run: ``python benchmarks/bench_generation.py [--threads 1 2] [--docs]``. SmolLM2-135M: tokens of a
prompt of 512 a second, and tokens written one after the other behind a prompt of 64, with
transformers' cache. All take turns in one process, and what counts are ratios of medians. Methods
that leave a layer the same form (round to nearest, clip, hqq, gptq) are equally fast: one of each
form is timed, without calibration where that changes no time. torchao and llama.cpp take part where
they are installed (peers/llamacpp_.py says how).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from torch import Tensor, nn

import language
import zeropoint
from zeropoint.interleave import interleave
from zeropoint.running import model_bytes

PROMPT, BEFORE, WRITTEN = 512, 64, 16
DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- generation: begin -->", "<!-- generation: end -->"


def subjects(model: nn.Module, ids: Tensor) -> dict[str, nn.Module]:
    """The float model, and one of each form that recipes and methods leave."""
    short = [{"input_ids": ids[:1, :BEFORE], "use_cache": False}]
    int4 = zeropoint.WEIGHT_INT4
    made: dict[str, nn.Module] = {"torch float32": model}
    for name in ("int8-dynamic", "int8-weight-only", "int4", "int4-weight-only"):
        made[name] = zeropoint.quantize(model, name)
    for method in ("smooth", "hadamard"):
        recipe = zeropoint.LayerRecipe("dynamic", int4, method=(method,))
        data = short if recipe.needs_calibration else None
        shown = {"smooth": "int4, smooth or awq", "hadamard": "int4, hadamard"}[method]
        made[shown] = zeropoint.quantize(model, recipe, calibration=data)
    return made


def torchao_subjects() -> dict[str, nn.Module]:
    """The same model quantized by torchao, in eager mode; none where it is not installed."""
    try:
        from torchao import quantization as torchao
    except ImportError:
        return {}
    made = {}
    for name, config in (
        ("torchao int8 dynamic", torchao.Int8DynamicActivationInt8WeightConfig()),
        ("torchao int8 weight-only", torchao.Int8WeightOnlyConfig()),
    ):
        model, _ = language.load_smollm2()
        torchao.quantize_(model, config)
        made[name] = model
    return made


class Llama:
    """llama.cpp on a GGUF file, called like the others."""

    def __init__(self, file: Path, threads: int) -> None:
        from llama_cpp import Llama as Model

        counts = {"n_threads": threads, "n_threads_batch": threads}
        self.model = Model(str(file), n_ctx=1024, n_gpu_layers=0, verbose=False, **counts)
        self.bytes = file.stat().st_size

    def prompt(self, ids: list[int]) -> None:
        self.model.reset()
        self.model.eval(ids)

    def write(self, ids: list[int]) -> None:
        from llama_cpp import llama_get_logits_ith

        self.prompt(ids)
        size = self.model.n_vocab()
        for _ in range(WRITTEN):
            logits = llama_get_logits_ith(self.model._ctx.ctx, -1)
            values = torch.from_numpy(np.ctypeslib.as_array(logits, shape=(size,)))
            self.model.eval([int(values.argmax())])


@torch.inference_mode()
def write(model: nn.Module, ids: Tensor) -> list[int]:
    """Greedily written tokens behind ``ids`` (1, tokens), one at a time with the cache."""
    out = model(input_ids=ids, use_cache=True)
    written = []
    for _ in range(WRITTEN):
        token = out.logits[:, -1:].argmax(-1)
        written.append(int(token))
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return written


@torch.inference_mode()
def read(model: nn.Module, ids: Tensor) -> None:
    """The prompt, of which only the last token's logits are wanted."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


def measure(
    models: dict[str, nn.Module], files: dict[str, Path], ids: Tensor, threads: int, seconds: float
) -> dict[str, tuple[int, float, float]]:
    """Name → bytes, tokens a second of the prompt, tokens a second written."""
    torch.set_num_threads(threads)
    prompt, before = ids[:1, :PROMPT], ids[:1, :BEFORE]
    llamas = {name: Llama(file, threads) for name, file in files.items()}

    def calls(
        of_torch: Callable[[nn.Module, Tensor], Any], of_llama: str, tokens: Tensor
    ) -> dict[str, Callable[[], Any]]:
        made: dict[str, Callable[[], Any]] = {
            name: (lambda m=model: of_torch(m, tokens)) for name, model in models.items()
        }
        for name, llama in llamas.items():
            made[name] = lambda m=llama: getattr(m, of_llama)(tokens[0].tolist())
        return made

    reading = interleave(calls(read, "prompt", prompt), seconds)
    start = interleave(calls(read, "prompt", before), seconds / 4)
    writing = interleave(calls(write, "write", before), seconds)
    found = {}
    for name in [*models, *llamas]:
        size = llamas[name].bytes if name in llamas else model_bytes(models[name])
        if name.startswith("torchao"):
            size = 0  # its tensors do not tell what they hold
        # What the short prompt takes is not writing.
        spent = median(writing[name]) - median(start[name])
        found[name] = (size, PROMPT / median(reading[name]) * 1e6, WRITTEN / spent * 1e6)
    return found


def gguf_files(folder: Path) -> dict[str, Path]:
    """The model's weights in llama.cpp's types, made by itself of the published file; or none."""
    try:
        import llama_cpp
    except ImportError:
        return {}
    source = language.smollm2_folder() / language.SMOLLM2_FILE
    files = {}
    for kind in ("Q8_0", "Q4_0", "Q4_K_M"):
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        options.allow_requantize = True
        file = folder / f"{kind}.gguf"
        ends = (str(source).encode(), str(file).encode())
        if llama_cpp.llama_model_quantize(*ends, options):
            raise RuntimeError(f"llama.cpp could not quantize {source.name} to {kind}")
        files[f"llama.cpp {kind}"] = file
    return files


def table(found: dict[int, dict[str, tuple[int, float, float]]]) -> str:
    """Markdown: a line each model, for each number of threads its speeds and their ratios."""
    titles = ["model", "MB"]
    for threads in found:
        titles += [f"prompt, {threads} thr.", "× float32", f"written, {threads} thr.", "× float32"]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    first = next(iter(found.values()))
    for name, (size, _, _) in first.items():
        cells = [name, f"{size / 1e6:.1f}" if size else ""]
        for speeds in found.values():
            _, *float32 = speeds["torch float32"]
            for speed, base in zip(speeds[name][1:], float32, strict=True):
                cells += [f"{speed:.0f}", f"{speed / base:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_between(text: str, inside: str) -> str:
    """``text`` with what lies between the two marks replaced."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{inside}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Time all forms, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=40.0, help="for each table of times")
    parser.add_argument("--docs", action="store_true", help="write the table to docs/methods.md")
    arguments = parser.parse_args()
    model, tokenizer = language.load_smollm2()
    ids = language.token_rows(tokenizer, PROMPT)
    models = {**subjects(model, ids), **torchao_subjects()}
    with tempfile.TemporaryDirectory() as folder:
        files = gguf_files(Path(folder))
        found = {
            threads: measure(models, files, ids, threads, arguments.seconds)
            for threads in arguments.threads
        }
    made = table(found)
    print(made)
    if arguments.docs:
        DOCS.write_text(replace_between(DOCS.read_text("utf-8"), made), "utf-8")


if __name__ == "__main__":
    main()
