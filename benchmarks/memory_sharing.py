"""How much memory worker processes have for themselves, and how much they share. Linux only.

A model of a few large Linear layers is used by several worker processes at once. Each row of the
table is one way to get it there. Memory is what the kernel counts for one worker while all are
alive (``/proc/self/smaps_rollup``), less what a worker has that did the same with a tiny model:

- private: pages that only this worker maps, so that every further worker costs as much again;
- shared: pages that others map too: the parent's from before ``fork``, or the page cache's.

Run: ``python benchmarks/memory_sharing.py`` (some ten seconds).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

import zeropoint

MIB = 2**20
ROLLUP = Path("/proc/self/smaps_rollup")


def build(layers: int, size: int) -> nn.Module:
    """Random weights, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential()
    for _ in range(layers):
        linear = nn.utils.skip_init(nn.Linear, size, size, bias=False)
        linear.weight.requires_grad_(False).normal_(0, size**-0.5, generator=generator)
        model.append(linear)
    return model.eval()


def skeleton(layers: int, size: int) -> nn.Module:
    """A quantized model whose buffers hold nothing yet."""
    return nn.Sequential(
        *(zeropoint.QuantizedLinear(size, size, bias=False, device="meta") for _ in range(layers))
    ).eval()


def use(model: nn.Module | None, size: int) -> None:
    if model is not None:
        with torch.inference_mode():
            model(torch.ones(4, size))


def memory() -> dict[str, float]:
    """MiB of this process that it has for itself, and that it shares."""
    gc.collect()
    # What was freed goes back to the kernel, so that it is not counted as held.
    ctypes.CDLL(None).malloc_trim(0)
    kib = {}
    for line in ROLLUP.read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        kib[name.rstrip(":")] = int(value)
    return {
        "private": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024,
        "shared": (kib["Shared_Clean"] + kib["Shared_Dirty"]) / 1024,
    }


def measure(workers: int, work: Callable[[], object]) -> dict[str, float]:
    """Fork workers that ``work`` and then report at the same time; their mean."""
    children = []
    for _ in range(workers):
        up, down = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                held = work()
                os.write(up[1], b"!")
                os.read(down[0], 1)  # until all are ready
                os.write(up[1], json.dumps(memory()).encode())
                os.read(down[0], 1)  # until all have reported
                del held
                status = 0
            finally:
                os._exit(status)
        children.append((pid, up, down))
    reports = []
    for step in (1, 65536):
        for _, up, _ in children:
            got = os.read(up[0], step)
            if not got or (step == 1 and got != b"!"):
                raise RuntimeError("a worker failed")
            if step > 1:
                reports.append(json.loads(got))
        for _, _, down in children:
            os.write(down[1], b"!")
    for pid, up, down in children:
        os.waitpid(pid, 0)
        for end in (*up, *down):
            os.close(end)
    return {kind: sum(r[kind] for r in reports) / workers for kind in reports[0]}


def model_as(form: str, layers: int, size: int) -> nn.Module:
    model = build(layers, size)
    if form == "packed float32":
        return zeropoint.prepack_model(model, inplace=True)
    return zeropoint.quantize(model, "int8-dynamic", inplace=True) if form == "int8" else model


def forked_before_use(form: str, workers: int, layers: int, size: int) -> dict[str, float]:
    model = model_as(form, layers, size)

    def work() -> nn.Module:
        use(model, size)
        return model

    return measure(workers, work)


def forked_after_use(form: str, workers: int, layers: int, size: int) -> dict[str, float]:
    model = model_as(form, layers, size)
    use(model, size)

    def work() -> nn.Module:
        use(model, size)
        return model

    return measure(workers, work)


def each_on_its_own(form: str, workers: int, layers: int, size: int) -> dict[str, float]:
    def work() -> nn.Module:
        model = model_as(form, layers, size)
        use(model, size)
        return model

    return measure(workers, work)


def mapped(form: str, workers: int, layers: int, size: int) -> dict[str, float]:
    """Each worker maps the file and takes its tensors as they lie there."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.safetensors"
        save_file(model_as(form, layers, size).state_dict(), path)

        def work() -> nn.Module:
            model = skeleton(layers, size)
            model.load_state_dict(load_file(path), assign=True)
            use(model, size)
            return model

        return measure(workers, work)


CASES: dict[str, tuple[str, str, Callable[..., dict[str, float]]]] = {
    "float": ("torch float32", "used, then forked", forked_after_use),
    "packed": ("packed float32", "packed, then forked", forked_after_use),
    "packed-own": ("packed float32", "each worker packs", each_on_its_own),
    "int8": ("int8", "used once, then forked", forked_after_use),
    "int8-unused": ("int8", "forked, each packs at its first use", forked_before_use),
    "int8-own": ("int8", "each worker quantizes", each_on_its_own),
    "int8-mapped": ("int8", "each worker maps the file", mapped),
}


def run_case(case: str, workers: int, layers: int, size: int) -> dict[str, float]:
    """One row, in this process, which must be fresh: what it held before would count as shared."""
    torch.set_num_threads(1)  # torch's threads do not survive fork
    form, _, function = CASES[case]
    empty = function(form, workers, layers, 64)  # the same with next to no weights
    full = function(form, workers, layers, size)
    return {kind: max(0.0, full[kind] - empty[kind]) for kind in full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--size", type=int, default=2048, help="inputs and outputs of a layer")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if not ROLLUP.exists():
        parser.exit(1, f"{ROLLUP} is missing: this measurement needs Linux 4.14 or newer\n")
    if a.case:
        print(json.dumps(run_case(a.case, a.workers, a.layers, a.size)))
        return
    weights = a.layers * a.size * a.size
    results = []
    for case, (form, how, _) in CASES.items():
        command = [sys.executable, __file__, "--case", case]
        command += ["--workers", a.workers, "--layers", a.layers, "--size", a.size]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            parser.exit(1, f"{case}: {done.stderr}\n")
        results.append({"form": form, "how": how, **json.loads(done.stdout)})
    table = Table(
        title=f"MiB of one of {a.workers} workers; {a.layers} layers of {a.size} × {a.size} are\n"
        f"{weights * 4 / MIB:.0f} MiB in float32, {weights / MIB:.0f} MiB in int8",
        box=None,
        title_justify="left",
    )
    table.add_column("form")
    table.add_column("how it got there")
    table.add_column("private", justify="right")
    table.add_column("shared", justify="right")
    for r in results:
        table.add_row(r["form"], r["how"], f"{r['private']:.0f}", f"{r['shared']:.0f}")
    Console(width=100).print(table)
    if a.json:
        a.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
