"""Which point of a front is chosen, and which is certain: decided here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .numbers import Budget, Point


def within(point: Point, budget: Budget) -> bool:
    """Whether a point keeps the budgets of size and time."""
    seconds = point.seconds if point.measured_seconds is None else point.measured_seconds
    return (budget.max_bytes is None or point.bytes <= budget.max_bytes) and (
        budget.max_latency is None or (seconds is not None and seconds <= budget.max_latency)
    )


def certain(points: Sequence[Point], budget: Budget) -> int | None:
    """The boldest point that is certain to keep ``max_drop``.

    Args:
        points: from bold to careful. Tested is from careful to bold, up to the first whose interval
            on held-out data reaches beyond the budget, so that the risk of a wrong claim stays that
            of one test however many points there are (fixed-sequence testing).

    Returns:
        Its index; ``None`` where even the most careful one fails, or no drop is limited.
    """
    if budget.max_drop is None:
        return None
    found = None
    for i in reversed(range(len(points))):
        if not points[i].measured.high <= budget.max_drop:
            break
        found = i
    return found


def choose(
    points: Sequence[Point], budget: Budget, boldest: int | None = 0
) -> tuple[int | None, int]:
    """The point to take.

    Where the drop is limited: the cheapest that keeps all budgets on search data, and on held-out
    data too. Otherwise, of those that keep the budgets of size and time, the one that drops least
    on search data; and of those that cannot be told from it there, since its interval holds their
    drop, the most careful.

    Args:
        points: by ascending cost.
        budget: what was asked for.
        boldest: index of the first point that may be taken; ``None``: none may.

    Returns:
        Its index, ``None`` where there is none or nothing was asked for; and how many cheaper ones
        held on search data, but not on held-out data.
    """
    if budget == Budget() or boldest is None:
        return None, 0
    fits = [i for i in range(boldest, len(points)) if within(points[i], budget)]
    if budget.max_drop is None:
        drops = {i: d for i in fits if not math.isnan((d := points[i].search_drop).value)}
        if not drops:
            return None, 0
        least = min(drops.values(), key=lambda d: d.value)
        # Of a single number nothing is known: its interval would hold everything.
        reach = least.high if math.isfinite(least.high) else least.value
        return max(i for i, d in drops.items() if d.value <= reach), 0
    hopeful = [i for i in fits if points[i].search_drop.value <= budget.max_drop]
    for skipped, i in enumerate(hopeful):
        if points[i].measured.value <= budget.max_drop:
            return i, skipped
    return None, len(hopeful)
