"""How much memory quantizing takes, with the model in memory and from its folder. Linux only.

A Llama with random weights is written in shards, deleted afterwards, and quantized by child
processes in two ways:

- in memory: all weights are read, then ``zeropoint.quantize`` and ``zeropoint.save``;
- from the folder: ``zeropoint.quantize_folder``.

Memory is the peak of what the kernel counts as anonymous (``RssAnon`` in ``/proc/PID/status``, read
every few milliseconds), less what the child has once it has imported all it needs. That is what
must be there. Pages of mapped files are left out: the kernel takes them back when it wants to.

Run: ``python benchmarks/memory_quantize.py`` (some ten minutes, and 3 GB of disk in ``--folder``).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import zeropoint

MIB = 2**20
VOCABULARY = 8192
RECIPES = ("int8-dynamic", "int4:gptq")
"""A recipe, and the method after a colon. Those here need data."""


def write_model(folder: Path, blocks: int, size: int) -> int:
    """A folder as ``save_pretrained`` writes it, a block a shard; its bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size,
        intermediate_size=5 * size // 2,
        num_hidden_layers=blocks,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        block = re.search(r"layers\.(\d+)\.", name)
        shards.setdefault("rest" if block is None else f"{int(block[1]):03}", []).append(name)
    generator = torch.Generator().manual_seed(0)
    where = {}
    for shard, names in shards.items():
        tensors = {}
        for name in names:
            fan_in = shapes[name][-1] if len(shapes[name]) == 2 else 0
            one = torch.ones(shapes[name])
            tensors[name] = one.normal_(0, fan_in**-0.5, generator=generator) if fan_in else one
        file = f"model-{shard}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def batches(count: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, VOCABULARY, (4, tokens), generator=generator)}
        for _ in range(count)
    ]


def quantize(folder: Path, out: Path, way: str, recipe: str, data: list | None) -> None:
    """What a child process does."""
    name, _, method = recipe.partition(":")
    made = zeropoint.get_recipe(name).with_method(tuple(method.split()))
    if way == "folder":
        zeropoint.quantize_folder(folder, out, made, calibration=data, resume=False)
        return
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_cache=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # read, where it was mapped
    zeropoint.quantize(model, made, calibration=data, inplace=True)
    zeropoint.save(model, out)


def anonymous(process: int | str) -> int:
    """Bytes."""
    text = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0  # a process that has just ended has none


def child(arguments: argparse.Namespace) -> None:
    import transformers
    from transformers.models.llama import modeling_llama

    import zeropoint.integrations.transformers  # noqa: F401

    assert modeling_llama
    transformers.logging.disable_progress_bar()
    torch.nn.Linear(64, 64)(torch.zeros(64, 64))  # threads
    gc.collect()
    print(anonymous("self"), flush=True)
    data = None
    if ":" in arguments.recipe:
        data = batches(arguments.batches, arguments.tokens)
    quantize(Path(arguments.model), Path(arguments.out), arguments.child, arguments.recipe, data)


def measure(
    folder: Path, way: str, recipe: str, count: int, tokens: int, **environment: str
) -> tuple[int, float]:
    """Bytes at the peak, and seconds, with more environment variables for the child."""
    out = folder.parent / f"{way}.safetensors"
    command = [sys.executable, __file__, "--child", way, "--model", folder, "--out", out]
    command += ["--recipe", recipe, "--batches", count, "--tokens", tokens]
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        assert process.stdout is not None
        before = int(process.stdout.readline() or 0)
        start, peak = time.perf_counter(), 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.003)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"the child process ended with {process.returncode}")
    return peak - before, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where models are written")
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--size", type=int, default=1024, help="of the hidden states")
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES))
    parser.add_argument("--batches", type=int, default=8, help="of 4 texts each")
    parser.add_argument("--tokens", type=int, default=128, help="of a text")
    parser.add_argument("--child", choices=["memory", "folder"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.recipe = arguments.recipe[0]
        child(arguments)
        return
    table = Table(title="MiB of anonymous memory, at the peak")
    for heading in ("blocks", "float32 model", "recipe", "in memory", "from the folder"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for blocks in arguments.blocks:
        work = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            size = write_model(work / "model", blocks, arguments.size)
            for recipe in arguments.recipe:
                row = [str(blocks), f"{size // MIB}", recipe.replace(":", ", ")]
                for way in ("memory", "folder"):
                    found = measure(
                        work / "model", way, recipe, arguments.batches, arguments.tokens
                    )
                    row.append(f"{found[0] // MIB}")
                    print(f"{blocks} blocks, {recipe}, {way}: {found[1]:.0f} s", file=sys.stderr)
                files = [(work / f"{way}.safetensors").read_bytes() for way in ("memory", "folder")]
                assert files[0] == files[1], "the results differ"
                table.add_row(*row)
        finally:
            shutil.rmtree(work)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
