"""Time several calls in turn, so that what disturbs one of them disturbs all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

TURN = 2e-4
"""Seconds that a turn lasts at least, by repeating the call: the clock and the loop cost tens of
nanoseconds."""
MIN_ROUNDS = 5
MAX_ROUNDS = 2000


def interleave(
    calls: Mapping[str, Callable[[], Any]], seconds: float, *, max_rounds: int = MAX_ROUNDS
) -> dict[str, list[float]]:
    """Warm up, then let each call have its turn again and again.

    Args:
        calls: name → what to time.
        seconds: to spend after the warm-up, about; five rounds are timed whatever it says.
        max_rounds: how many are enough.

    Returns:
        Name → microseconds a call, one number a round.

    >>> times = interleave({"sum": lambda: sum(range(100))}, seconds=0.01)
    >>> len(times["sum"]) >= MIN_ROUNDS
    True
    """
    inner: dict[str, int] = {}
    for name, call in calls.items():
        call()
        inner[name] = 1
        while _turn(call, inner[name]) < TURN and inner[name] < 4096:
            inner[name] *= 2
    seen: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while names and (
            rounds < MIN_ROUNDS or (time.perf_counter() - start < seconds and rounds < max_rounds)
        ):
            for name in names:
                seen[name].append(_turn(calls[name], inner[name]) / inner[name] * 1e6)
            # Nobody always follows the same neighbour, whose data it finds in the caches.
            names = names[1:] + names[:1] if rounds % 2 else names[::-1]
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return seen


def _turn(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start
