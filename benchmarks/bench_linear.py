"""Time one Linear layer by every library that is installed, in every precision and shape.

All take turns in one process, in changing order; each result is compared with float32 before it is
timed; what counts are ratios of medians. The complete table, written to docs/::

    python benchmarks/bench_linear.py --docs
    python benchmarks/bench_linear.py --cold --docs   # weights out of the caches; same files

A run that was broken off goes on where it stopped. ``--quick`` times a few shapes only. Close other
programs first: rows that were disturbed are marked.

The others, as far as wanted: ``pip install --no-deps onnx onnxruntime openvino torchao zentorch``;
llama.cpp is compiled for the CPU it runs on, see peers/llamacpp_.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import linear_report
import peers
from linear_timing import DISTURBED, ROUNDS, Foreign, cold, in_turn, once, until_idle
from peers.common import INPUT_RANGE, one_line
from zeropoint import doctor, limits
from zeropoint.atomic import write_text

SHAPES = (
    (384, 384),
    (384, 1536),
    (1536, 384),
    (768, 768),
    (768, 3072),
    (3072, 768),
    (1024, 4096),
    (4096, 4096),
    (4096, 11008),
)
"""``(in_features, out_features)``."""
ROWS = (1, 4, 16, 32, 128, 512)
QUICK = {(768, 768): (1, 4, 128), (768, 3072): (16,), (4096, 4096): (1, 128)}
COLD_SHAPES, COLD_ROWS = SHAPES[-2:], (1, 4, 16)
THREADS = (1, 2)
VERSION = 1
BEHIND = 50.0
"""A peer that was so many times slower than the best for two numbers of rows is not tried with more
in long calls."""
DISTRIBUTIONS = (
    *("zeropoint", "torch", "numpy", "onnxruntime", "openvino", "torchao", "zentorch"),
    "llama-cpp-python",
)


@dataclass(frozen=True)
class Block:
    """What is prepared together: one shape at one thread count."""

    k: int
    n: int
    threads: int
    rows: tuple[int, ...]
    cold: bool

    @property
    def key(self) -> str:
        return f"{self.k}x{self.n}, {self.threads} threads{', cold' if self.cold else ''}"

    @property
    def work(self) -> int:
        return self.k * self.n * sum(self.rows)


def main() -> None:
    """Parse, time, write."""
    arguments = _arguments()
    torch.set_grad_enabled(False)
    result = _open(arguments)
    if not arguments.report_only:
        _run(arguments, result)
    if not result["rows"]:
        sys.exit("nothing was timed")
    text = linear_report.markdown(result)
    if arguments.docs:
        docs = Path(__file__).resolve().parents[1] / "docs"
        import roofline

        write_text(docs / "benchmarks.md", text)
        roofline.draw(result, docs / "roofline.svg")
        print(f"Wrote {docs / 'benchmarks.md'} and {docs / 'roofline.svg'}.")
    if arguments.markdown:
        write_text(arguments.markdown, text)
    if arguments.plot:
        import roofline

        roofline.draw(result, arguments.plot)
    print(linear_report.summary(result))
    print(linear_report.worst(result, 15))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few shapes only, in about a minute")
    add("--cold", action="store_true", help="weights out of the caches, largest shapes")
    add("--shapes", type=_shape, nargs="+", metavar="KxN", help="instead of the nine")
    add("--rows", type=int, nargs="+", metavar="M", help=f"instead of {ROWS}")
    add("--threads", type=int, nargs="+", default=list(THREADS), metavar="T")
    add("--precisions", nargs="+", choices=list(peers.PRECISIONS), metavar="PRECISION")
    add("--peers", nargs="+", choices=list(peers.MODULES), metavar="LIBRARY")
    add(
        "--slow", action="store_true", help="with torchao compiled, seconds for each number of rows"
    )
    add("--budget", type=float, metavar="SECONDS", help="for all, about; 640, or 80 with --quick")
    add("--longest", type=float, default=1.5, metavar="SECONDS", help="calls that are given up")
    add("--json", type=Path, metavar="FILE", help="results; by default out/bench_linear.json")
    add("--fresh", action="store_true", help="do not go on with an earlier file")
    add("--report-only", action="store_true", help="time nothing; write from the JSON")
    add("--markdown", type=Path, metavar="FILE", help="write the tables here")
    add("--plot", type=Path, metavar="FILE", help="draw the roofline here, as SVG")
    add("--docs", action="store_true", help="write docs/benchmarks.md and docs/roofline.svg")
    arguments = parser.parse_args()
    if arguments.json is None:
        name = "bench_linear_quick.json" if arguments.quick else "bench_linear.json"
        arguments.json = Path("out") / name
    if arguments.budget is None:
        arguments.budget = 80.0 if arguments.quick else 300.0 if arguments.cold else 640.0
    return arguments


def _shape(text: str) -> tuple[int, int]:
    k, n = map(int, text.lower().split("x"))
    return k, n


def blocks(arguments: argparse.Namespace) -> list[Block]:
    """The largest first: their time cannot be cut, and the rest shares what is left."""
    if arguments.quick:
        table: dict[tuple[int, int], tuple[int, ...]] = dict(QUICK)
    else:
        shapes, rows = (COLD_SHAPES, COLD_ROWS) if arguments.cold else (SHAPES, ROWS)
        table = dict.fromkeys(shapes, rows)
    if arguments.shapes:
        table = dict.fromkeys(arguments.shapes, ROWS)
    if arguments.rows:
        table = dict.fromkeys(table, tuple(sorted(arguments.rows)))
    found = [
        Block(k, n, threads, rows, arguments.cold)
        for (k, n), rows in table.items()
        for threads in arguments.threads
    ]
    return sorted(found, key=lambda b: -b.work)


def _machine() -> dict[str, Any]:
    facts = doctor.facts()
    return {
        "cpu": facts.cpu,
        "cpus": facts.usable_cpus,
        "features": facts.cpu_features,
        "isa": facts.active_isa,
        # So that results of one build are never taken for those of another.
        "core": hashlib.sha256(Path(facts.core_file).read_bytes()).hexdigest()[:12]
        if facts.core_file
        else None,
        "system": facts.system,
        "python": facts.versions["python"],
        "versions": {name: v for name in DISTRIBUTIONS if (v := doctor.version(name))},
    }


def _open(arguments: argparse.Namespace) -> dict[str, Any]:
    """The earlier file, where there is one of this machine."""
    machine = json.loads(json.dumps(_machine()))
    path: Path = arguments.json
    if path.exists() and not arguments.fresh:
        content: dict[str, Any] = json.loads(path.read_text())
        if content.get("version") != VERSION:
            sys.exit(f"{path} is of another version; --fresh overwrites it")
        if content["machine"] != machine and not arguments.report_only:
            sys.exit(
                f"{path} is of another machine, build or set of versions; --fresh overwrites it"
            )
        return content
    if arguments.report_only:
        sys.exit(f"there is no {path}")
    return {
        "version": VERSION,
        "machine": machine,
        "absent": {},
        "limits": None,
        "rows": [],
        "done": [],
    }


def _run(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    deadline = time.monotonic() + arguments.budget
    contenders, absent = peers.available(arguments.peers)
    for name, reason in absent.items():
        print(f"{name} takes no part: {reason}", file=sys.stderr)
    result["absent"] |= absent
    contenders = [
        p
        for p in contenders
        if (arguments.slow or not p.slow)
        and (not arguments.precisions or p.precision in arguments.precisions)
    ]
    todo = [b for b in blocks(arguments) if b.key not in result["done"]]
    counts = sorted(set(arguments.threads))
    _measure_limits(result, counts, blocks(arguments), min(0.01, arguments.budget / 4000))
    flush = _flusher(result) if arguments.cold else None
    cells = sum(len(b.rows) for b in todo)
    with tqdm(total=cells, disable=not sys.stderr.isatty(), delay=2) as bar:
        for block in todo:
            bar.set_description(block.key)
            for rows in _block(block, contenders, arguments, deadline, cells, flush):
                result["rows"] += rows
                bar.update()
            cells -= len(block.rows)
            result["done"].append(block.key)
            _save(arguments.json, result)


def _save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {k: v for k, v in result.items() if k != "rows"}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result["rows"])
    text = json.dumps(head, ensure_ascii=False)[:-1] + f', "rows": [\n{lines}\n]}}\n'
    write_text(path, text)


def _measure_limits(
    result: dict[str, Any], threads: list[int], wanted: list[Block], seconds: float
) -> None:
    """What this machine could do, where the file does not have it yet."""
    if not limits.available():
        return
    sizes = {int(b.k * b.n * p.weight_bytes) for b in wanted for p in peers.PRECISIONS.values()}
    sizes |= {1 << 16, 1 << 20, 1 << 24} | (
        {1 << 30} if wanted[0].cold or wanted[0].work > 1 << 26 else set()
    )
    have = limits.Limits((), (), {}, ())
    if result["limits"]:
        have = limits.Limits.from_dict(result["limits"])
    known = {(r.nbytes, r.threads) for r in have.reads}
    if all((size, count) in known for size in sizes for count in threads):
        return
    new = limits.measure(threads, None, sizes | {r.nbytes for r in have.reads}, seconds=seconds)
    result["limits"] = new.to_dict()


def _flusher(result: dict[str, Any]) -> Any:
    """Reads more than the caches hold, on the calling thread: everyone's threads sleep after it."""
    caches = (result["limits"] or {"caches": {}})["caches"]
    size = min(max(2 * max(caches.values(), default=0), 256 << 20), 1280 << 20)
    block = np.ones(size // 8, dtype=np.int64)
    return lambda: np.add.reduce(block)


def _block(
    block: Block,
    contenders: list[peers.Peer],
    arguments: argparse.Namespace,
    deadline: float,
    cells: int,
    flush: Any,
) -> Iterator[list[dict[str, Any]]]:
    """For each number of rows, a result for each precision. ``cells``: how many numbers of rows,
    of this block and the following, share the time that is left."""
    torch.set_num_threads(block.threads)
    generator = torch.Generator().manual_seed(block.k * 65537 + block.n)
    case = peers.Case(
        torch.randn(block.n, block.k, generator=generator) / block.k**0.5,
        torch.randn(block.n, generator=generator) / 10,
        block.threads,
    )
    prepared: dict[tuple[str, str], peers.Layer] = {}
    slowness: dict[tuple[str, str], float] = {}  # seconds a row
    behind: dict[tuple[str, str], int] = {}  # for how many numbers of rows in succession
    precisions = list(dict.fromkeys(p.precision for p in contenders))
    for done, m in enumerate(block.rows):
        # What preparation takes is not the fault of these rows: those that follow share it.
        share, spent = max(deadline - time.monotonic(), 0.0) / (cells - done), 0.0
        results: list[dict[str, Any]] = []
        x = torch.randn(m, block.k, generator=generator).clamp(-INPUT_RANGE, INPUT_RANGE)
        expected = F.linear(x, case.weight, case.bias)
        for index, precision in enumerate(precisions):
            group = [p for p in contenders if p.precision == precision]
            calls, estimates, entries, left = {}, {}, {}, {}
            for peer in group:
                key = (peer.name, precision)
                if slowness.get(key, 0.0) * m > arguments.longest:
                    left[peer.name] = f"slow: {slowness[key] * m:.1f} s a call, about"
                    continue
                if behind.get(key, 0) > 1 and slowness[key] * m > DISTURBED:
                    left[peer.name] = f"slow: more than {BEHIND:.0f} times the best with fewer rows"
                    continue
                ready = _ready(peer, case, m, x, expected, prepared)
                if isinstance(ready, str):
                    left[peer.name] = ready
                    continue
                call, error = ready
                took = once(call)
                if took < DISTURBED:  # a thread that had to wait for a CPU is not the call's fault
                    took = min(took, once(call), once(call))
                estimates[peer.name] = took
                slowness[key] = took / m
                calls[peer.name] = call
                entries[peer.name] = {"error": float(f"{error:.3g}")}
            slot = (share - spent) / (len(precisions) - index) / max(len(calls), 1)
            settle, rest = 0.001, until_idle if block.threads > 1 else lambda: None
            foreign, started = Foreign(), time.monotonic()
            if flush:
                times = cold(calls, estimates, 5, flush)
            else:
                seconds = min(max(slot - settle * ROUNDS, 0.01), 1.0)
                times = in_turn(
                    calls, estimates, seconds, settle=settle, rest=rest, threads=block.threads
                )
            spent += time.monotonic() - started
            others = foreign.share()
            trusted = 0.0 if linear_report.disturbed(others) else min(estimates.values(), default=0)
            for name, took in estimates.items():
                key = (name, precision)
                slowness[key] = took / m
                behind[key] = behind.get(key, 0) + 1 if 0 < BEHIND * trusted < took else 0
            for name, t in times.items():
                entries[name] = t.to_dict() | entries[name]
            results.append(
                {
                    "k": block.k,
                    "n": block.n,
                    "m": m,
                    "threads": block.threads,
                    "cold": block.cold,
                    "precision": precision,
                    "entries": entries,
                    "left": left,
                    **others,
                }
            )
        yield results


def _ready(
    peer: peers.Peer,
    case: peers.Case,
    rows: int,
    x: torch.Tensor,
    expected: torch.Tensor,
    prepared: dict[tuple[str, str], peers.Layer],
) -> tuple[Any, float] | str:
    """A call that gives the right result, and its error; or why there is none."""
    key = (peer.name, peer.precision)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if key not in prepared or peer.per_rows:
                prepared[key] = peer.prepare(case, rows)
            layer = prepared[key]
            given = layer.convert(x)
            got = layer.floats(layer.run(given))
    except Exception as error:  # whatever a library does here, the others go on
        return one_line(error)
    if got.shape != expected.shape:
        return f"wrong: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = float((got - expected).norm() / expected.norm())
    if not error <= peers.PRECISIONS[peer.precision].tolerance:
        return f"wrong: relative error {error:.2g}"
    run = layer.run
    return (lambda: run(given)), error


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # some libraries crash when their threads are taken down
