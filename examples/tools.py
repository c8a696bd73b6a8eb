"""What the demo and the benchmarks share: timing in turn, the machine's name, a console."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles

import torch
from rich.console import Console

from zeropoint import doctor


def console() -> Console:
    """The terminal at its own width; a file or a pipe at 100 columns."""
    out = Console()
    return out if out.is_terminal else Console(width=100)


def machine() -> str:
    """A line that every table of times stands under, and one for each thing that spoils them."""
    facts = doctor.facts()
    threads = f"{facts.threads} thread" + "s" * (facts.threads != 1)
    line = (
        f"{facts.cpu}, {threads}, kernel {facts.active_isa}, torch {torch.__version__}, "
        f"Python {facts.versions['python']}"
    )
    spoilers = [f"{a.level}: {a.text}" for a in doctor.advice(facts) if a.level != "note"]
    return "\n".join([line, *spoilers])


def time_in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int = 15, burst: float = 0.05
) -> dict[str, list[float]]:
    """Seconds of single calls, by name.

    In each round every contender has a burst: one call that is not counted, which brings its
    weights back into the caches, then as many as fit into ``burst`` seconds, one at least. The
    next round begins with another contender. So whatever else the machine does, and however its
    clock changes, meets them all alike: compare medians, or better their ratios.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for call in calls.values():  # packs weights, starts threads, fills allocators
        call()
        call()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            call = calls[name]
            begun = time.perf_counter()
            call()
            end = begun + burst
            while True:
                before = time.perf_counter()
                call()
                after = time.perf_counter()
                times[name].append(after - before)
                if after >= end:
                    break
    return times


def spread(times: list[float]) -> tuple[float, float, float]:
    """Tenth percentile, median and ninetieth percentile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    tenths = quantiles(times, n=10, method="inclusive")
    return tenths[0], median(times), tenths[-1]
