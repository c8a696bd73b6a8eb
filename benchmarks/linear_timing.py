"""How calls are timed in turn, and how much of the CPU others took meanwhile."""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Call = Callable[[], Any]

ROUNDS = 5
SAMPLE = 5e-5
"""Seconds of one sample at least: shorter calls are repeated, or the clock would count too much."""
LONG = 0.01
"""Calls as long as this bring the caches into their state themselves: no warm-up."""
GATHERING = 0.04
"""Seconds that threads may take to find a CPU each. On a virtual machine a CPU that sleeps can pass
for one that is taken, so two threads wake up on one; a call takes two ticks of the scheduler (8 ms)
then, until its load balancing looks."""
DISTURBED = 0.05
"""A call that seems to take less is tried again before it is believed."""
HOPELESS = 4.0
"""A peer so many times slower than the best gets one round only; where it may have been disturbed
three, or all if it uses several threads."""


@dataclass
class Times:
    """Seconds a call, one for each sample."""

    samples: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """In µs: median and quartiles."""
        if len(self.samples) > 1:
            low, middle, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        else:
            low = middle = high = self.samples[0]
        values = {"us": middle, "low": low, "high": high}
        return {k: float(f"{v * 1e6:.5g}") for k, v in values.items()} | {"n": len(self.samples)}


class Foreign:
    """The share of the CPUs, in CPUs, that other processes and other machines took since then.

    Of the CPUs that this process may use, by Linux's /proc/stat; elsewhere nothing is known.
    """

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> dict[str, float | None]:
        """``foreign`` and ``steal``, in CPUs."""
        if self.start is None:
            return {"foreign": None, "steal": None}
        now = self._now()
        assert now is not None
        wall, busy, own, steal = (b - a for a, b in zip(self.start, now, strict=True))
        wall = max(wall, 1e-9)
        return {
            "foreign": round(max(busy - own, 0.0) / wall, 3),
            "steal": round(max(steal, 0.0) / wall, 3),
        }

    @staticmethod
    def _now() -> tuple[float, float, float, float] | None:
        try:
            lines = Path("/proc/stat").read_text().splitlines()
            cpus = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        except (OSError, AttributeError):
            return None
        tick = os.sysconf("SC_CLK_TCK")
        busy = steal = 0.0
        for line in lines:
            name, *fields = line.split()
            if name in cpus:
                user, nice, system, _idle, _wait, irq, soft, stolen = map(float, fields[:8])
                busy += (user + nice + system + irq + soft) / tick
                steal += stolen / tick
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return time.monotonic(), busy, usage.ru_utime + usage.ru_stime, steal


def once(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def until_idle(longest: float = 0.06, nap: float = 0.002) -> None:
    """Sleep until no thread of this process runs any more.

    Worker threads spin for a while after a call, in hope of the next: 5 ms those of GNU OpenMP,
    30 ms those of ONNX Runtime. Whoever was timed meanwhile on all CPUs would share one of them.
    """
    end = time.monotonic() + longest
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(nap)
        if time.process_time() - before < nap / 4:
            return


def in_turn(
    calls: dict[str, Call],
    estimates: dict[str, float],
    seconds: float,
    *,
    settle: float,
    rest: Callable[[], None] = lambda: None,
    threads: int = 1,
) -> dict[str, Times]:
    """Time calls in rounds, each round in another order.

    Args:
        calls: by name.
        estimates: seconds of one call.
        seconds: for each of them, about; each is timed once or more in every round.
        settle: seconds of each burst that are not counted: weights come back to the caches.
        rest: called before each burst.
        threads: that calls use.
    """
    times = {name: Times() for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(ROUNDS):
            best = min(estimates.values(), default=0.0)
            for name in names:
                call, took, samples = calls[name], estimates[name], times[name].samples
                tries = 1 if took > DISTURBED else 3 if threads == 1 else ROUNDS
                if round_ >= tries and took > HOPELESS * best and took * ROUNDS > seconds / 4:
                    continue
                if round_ > 1 and took > seconds / ROUNDS * 2 and (round_ > 2 or took > seconds):
                    continue  # two or three samples of a long call must do
                rest()
                gathering = threads > 1 and took < DISTURBED
                if gathering or took < LONG:
                    _warm_up(call, settle, GATHERING if gathering else settle, 2 * took)
                end = time.perf_counter() + seconds / ROUNDS
                count = max(1, min(1000, int(SAMPLE / took)))
                repeat = range(count)
                while True:
                    start = time.perf_counter()
                    for _ in repeat:
                        call()
                    now = time.perf_counter()
                    samples.append((now - start) / count)
                    if now >= end:
                        break
                estimates[name] = min(samples)
            # Nobody always follows the same neighbour.
            names = names[1:] + names[:1] if round_ % 2 else names[::-1]
    finally:
        if collecting:
            gc.enable()
    return times


def _warm_up(call: Call, least: float, most: float, quick: float) -> None:
    """Call for so many seconds: ``least``, and on until a call is ``quick``, but not beyond
    ``most``."""
    start = now = time.perf_counter()
    while True:
        before = now
        call()
        now = time.perf_counter()
        if now - start >= most or (now - start >= least and now - before < quick):
            return


def cold(
    calls: dict[str, Call], estimates: dict[str, float], rounds: int, flush: Call
) -> dict[str, Times]:
    """Time single calls in turn, each after ``flush`` has driven all else out of the caches."""
    times = {name: Times() for name in calls}
    names = list(calls)
    for round_ in range(rounds):
        best = min(estimates.values(), default=0.0)
        for name in names:
            if round_ and estimates[name] > HOPELESS * best:
                continue
            flush()
            times[name].samples.append(once(calls[name]))
        names = names[1:] + names[:1] if round_ % 2 else names[::-1]
    return times
