"""What this CPU could do at best: its arithmetic on registers alone, and its reading of memory.

A layer of ``K × N`` weights on ``M`` rows takes ``2 M K N`` operations and reads its weights once.
It cannot be faster than the slower of the two (the roofline model: Williams, Waterman, Patterson
2009, https://doi.org/10.1145/1498765.1498785)::

    seconds >= max(2 M K N / peak, weight bytes / bandwidth)

Peaks are those of the instruction in which the kernels spend their time; bandwidths are measured
on a block of the weights' own size, so that it lies in the same level of cache.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import kernels

KINDS = {"int8": 3, "float32": 0, "bfloat16": 1}
"""Kinds of arithmetic → the core's number of the type."""
SIZES = tuple(1 << shift for shift in range(14, 31))
"""Bytes of memory to read, all threads together: 16 KiB to 1 GiB."""
_REPEATS = 5
_WORK = {"int8": 1 << 22, "float32": 1 << 18, "bfloat16": 1 << 20}
"""Multiply-adds, or so, of the first, short run."""


@dataclass(frozen=True)
class Peak:
    """Arithmetic of one instruction set: ``gops`` counts a multiply-add as two operations."""

    isa: str
    kind: str
    threads: int
    gops: float


@dataclass(frozen=True)
class Read:
    """Reading ``nbytes`` again and again, each thread its part, in 10⁹ bytes a second."""

    nbytes: int
    threads: int
    gbs: float


@dataclass(frozen=True)
class Bound:
    """The least time a layer can take, and what sets it."""

    seconds: float
    by: str
    """``"compute"``, or the level that the weights come from: ``"L1"``, ... ``"DRAM"``."""
    gops: float
    """The operations of the layer in that time."""


@dataclass(frozen=True)
class Limits:
    """What was measured."""

    peaks: tuple[Peak, ...]
    reads: tuple[Read, ...]
    caches: dict[str, int]
    """Level → bytes of it that one core can use: ``"L1"``, ``"L2"``, ``"L3"``."""
    shared: tuple[str, ...]
    """The levels that cores share."""

    def peak(self, kind: str, threads: int, isa: str | None = None) -> float:
        """GOPS of ``isa``, or of the best instruction set for this kind of arithmetic.

        bfloat16 products may as well be computed in float32, so the faster of the two counts.

        Raises:
            LookupError: it was not measured.
        """
        found = [
            p.gops
            for p in self.peaks
            if p.kind in ((kind, "float32") if kind == "bfloat16" else (kind,))
            and p.threads == threads
            and isa in (None, p.isa)
        ]
        if not found:
            raise LookupError(f"no peak of {kind} was measured for isa {isa}, {threads} threads")
        return max(found)

    def bandwidth(self, nbytes: int, threads: int) -> float:
        """GB/s for weights of this size: as measured for the nearest size that is not larger."""
        found = sorted((r.nbytes, r.gbs) for r in self.reads if r.threads == threads)
        if not found:
            raise LookupError(f"no reading was measured for {threads} threads")
        smaller = [gbs for size, gbs in found if size <= nbytes]
        # A larger block is never read faster; where it seems so, the smaller was disturbed.
        larger = [gbs for size, gbs in found if size > nbytes]
        return max([smaller[-1] if smaller else found[0][1], *larger])

    def level(self, nbytes: int, threads: int) -> str:
        """The smallest cache that holds so many bytes, divided among the threads, or DRAM."""
        for name, size in self.caches.items():
            if nbytes <= size * (1 if name in self.shared else threads):
                return name
        return "DRAM"

    def bound(
        self, operations: float, nbytes: int, kind: str, threads: int, isa: str | None = None
    ) -> Bound:
        """The least time for so many operations on so many bytes of weights."""
        compute = operations / (self.peak(kind, threads, isa) * 1e9)
        memory = nbytes / (self.bandwidth(nbytes, threads) * 1e9)
        by = "compute" if compute >= memory else self.level(nbytes, threads)
        seconds = max(compute, memory)
        return Bound(seconds, by, operations / seconds / 1e9)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Limits:
        """The inverse of :meth:`to_dict`."""
        return cls(
            tuple(Peak(**p) for p in content["peaks"]),
            tuple(Read(**r) for r in content["reads"]),
            dict(content["caches"]),
            tuple(content["shared"]),
        )


def available() -> bool:
    """Whether limits can be measured here: the core is loaded."""
    return kernels.core is not None


def measure(
    threads: Iterable[int] | None = None,
    isas: Iterable[str] | None = None,
    sizes: Iterable[int] | None = None,
    *,
    seconds: float = 0.02,
    progress: bool = True,
) -> Limits:
    """Measure. Nothing else should run meanwhile; the best of several runs counts.

    Args:
        threads: thread counts; by default 1 and torch's. Each thread is bound to a CPU of its own
            as far as there are as many.
        isas: some of :func:`zeropoint.kernels.available_isas`; by default all of them.
        sizes: bytes of memory to read; by default :data:`SIZES`, as far as a quarter of the
            machine's memory goes.
        seconds: for each single run, of which there are 5 for each number or a few more.
        progress: show a progress bar on a terminal, if it takes long.

    Raises:
        RuntimeError: the C++ core is missing.
        ValueError: a number that is not positive, or an instruction set that is not available.
    """
    if not available():
        raise RuntimeError(f"limits need the C++ core, which is missing: {kernels.core_error()}")
    counts, names, blocks = _choices(threads, isas, sizes)
    for label, numbers in (("threads", counts), ("sizes", blocks), ("seconds", [seconds])):
        if not numbers or min(numbers) <= 0:
            raise ValueError(f"{label} must be positive numbers, got {numbers}")
    known = _core_isas()
    for name in names:
        if name not in known:
            raise ValueError(f"isa must be one of {', '.join(known)} here, got {name!r}")
    peaks, reads = [], []
    bar = tqdm(
        total=len(counts) * (len(names) * len(KINDS) + len(blocks)),
        desc="limits",
        disable=not (progress and sys.stderr.isatty()),
        delay=2,
        leave=False,
    )
    for count in counts:
        for name in names:
            for kind in KINDS:
                rate = _peak(name, kind, count, seconds)
                bar.update()
                if rate:
                    peaks.append(Peak(name, kind, count, rate / 1e9))
    if blocks:
        block = torch.ones(max(blocks) // 4 + 2048, dtype=torch.int32)
        for count in counts:
            for size in blocks:
                reads.append(Read(size, count, _read(known[0], block, size, count, seconds) / 1e9))
                bar.update()
    bar.close()
    caches, shared = _caches()
    return Limits(tuple(peaks), tuple(reads), caches, shared)


def _choices(threads: Any, isas: Any, sizes: Any) -> tuple[list[int], list[str], list[int]]:
    counts = [1, torch.get_num_threads()] if threads is None else list(threads)
    names = list(_core_isas()) if isas is None else list(isas)
    blocks = [s for s in SIZES if s <= _memory() // 4] if sizes is None else list(sizes)
    return sorted(set(counts)), list(dict.fromkeys(names)), sorted(set(blocks))


def _core_isas() -> tuple[str, ...]:
    return tuple(name for name in kernels.available_isas() if name != kernels.REFERENCE)


def _peak(isa: str, kind: str, threads: int, seconds: float) -> float:
    """Operations a second; 0 where the CPU has no such instruction."""
    core: Any = kernels.core
    run, code = core.limit_compute, KINDS[kind]
    work = run(isa, code, 1)
    if not work:
        return 0.0
    return 2 * _best(
        lambda _, rounds: run(isa, code, rounds), _WORK[kind] // work, threads, seconds
    )


def _read(isa: str, block: torch.Tensor, nbytes: int, threads: int, seconds: float) -> float:
    """Bytes a second, with or without prefetch instructions, whichever is faster."""
    core: Any = kernels.core
    part = max(nbytes // threads // 4096 * 4096, 4096)

    def run(prefetch: bool) -> float:
        return _best(
            lambda thread, rounds: core.limit_read(
                isa, block.data_ptr() + thread * part, part, rounds, prefetch
            ),
            (1 << 20) // part,
            threads,
            seconds,
        )

    return max(run(False), run(True))


def _best(run: Callable[[int, int], int], rounds: int, threads: int, seconds: float) -> float:
    """The highest rate of work of all threads together, over some runs of about ``seconds``."""
    rounds = max(rounds, 1)
    work, took = _together(run, rounds, threads)
    while took < seconds / 4 and rounds < 1 << 40:  # the first runs also bring up the clock
        rounds = int(rounds * min(max(seconds / 2 / took, 2), 64))
        work, took = _together(run, rounds, threads)
    best = work / took
    for _ in range(_REPEATS - 1):
        if took < seconds * 4:  # one run of a slow memory may have been enough
            rounds = max(int(rounds * seconds / took), 1)
        work, took = _together(run, rounds, threads)
        best = max(best, work / took)
    return best


def _together(run: Callable[[int, int], int], rounds: int, threads: int) -> tuple[int, float]:
    """The work of all threads, and the seconds from the first's start to the last's end."""
    if threads == 1:
        start = time.perf_counter()
        work = run(0, rounds)
        return work, time.perf_counter() - start
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gate = threading.Barrier(threads)
    done: list[tuple[int, float, float]] = []

    def one(index: int) -> None:
        if len(cpus) >= threads:
            with suppress(OSError):
                os.sched_setaffinity(0, {cpus[index]})  # of this thread alone
        gate.wait()
        start = time.perf_counter()
        work = run(index, rounds)
        done.append((work, start, time.perf_counter()))

    team = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    work = sum(w for w, _, _ in done)
    return work, max(end for _, _, end in done) - min(start for _, start, _ in done)


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def _caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> Any:
    """Bytes of the data caches by level, and which levels cores share; empty where unknown."""
    caches: dict[str, int] = {}
    shared = []
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
            cpus = (index / "shared_cpu_list").read_text().strip()
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind == "Instruction" or match is None:
            continue
        caches[f"L{level}"] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
        if level != "1" and re.search(r"[,-]", cpus):
            shared.append(f"L{level}")
    return caches, tuple(shared)


def table(limits: Limits) -> list[Any]:
    """Two tables for ``rich``: arithmetic by instruction set, reading by size."""
    from rich.table import Table

    counts = sorted({p.threads for p in limits.peaks} | {r.threads for r in limits.reads})
    compute = Table(box=None, pad_edge=False, header_style="bold")
    compute.add_column("GOPS")
    for count in counts:
        for kind in KINDS:
            compute.add_column(f"{kind}, {_threads(count)}", justify="right")
    for isa in dict.fromkeys(p.isa for p in limits.peaks):
        cells = [isa]
        for count in counts:
            for kind in KINDS:
                found = [
                    p.gops for p in limits.peaks if (p.isa, p.kind, p.threads) == (isa, kind, count)
                ]
                cells.append(f"{found[0]:,.0f}" if found else "–")
        compute.add_row(*cells)
    read = Table(box=None, pad_edge=False, header_style="bold")
    read.add_column("GB/s, reading", justify="right")
    for count in counts:
        read.add_column(_threads(count), justify="right")
        read.add_column("from")
    for size in sorted({r.nbytes for r in limits.reads}):
        cells = [_size(size)]
        for count in counts:
            rate = next(
                (r.gbs for r in limits.reads if (r.nbytes, r.threads) == (size, count)), None
            )
            cells += ["–" if rate is None else f"{rate:,.1f}", limits.level(size, count)]
        read.add_row(*cells)
    return [compute, read]


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count != 1)


def _size(nbytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):g} {unit}"
    return f"{nbytes / 1024:g} KiB"
