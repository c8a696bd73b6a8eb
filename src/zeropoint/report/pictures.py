"""The small pictures of a layer's section: histograms as bare SVG paths, a kilobyte each.

A page may hold hundreds of them, which a plotting library would take minutes and megabytes for.
Numbers beside a picture are text of the page, so that they keep their size on narrow screens.
Heights are logarithmic: a single weight far out can still be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import words
from .numbers import Grid, Histogram, Integers

WIDTH, HEIGHT = 640, 100
"""Of a picture of reals, in units of its own; the page stretches it."""

_DENSE = 2.5
"""Reals of a grid closer than this many units are drawn as one bar."""


@dataclass(frozen=True)
class Comb:
    """The reals of one grid, as a dashed line from ``start`` to ``end``.

    ``step`` is their distance in units; ``None`` where they are too close to be told apart.
    """

    label: str
    start: float
    end: float
    step: float | None
    words: str


@dataclass(frozen=True)
class Picture:
    """A histogram.

    Args:
        path: outline of the bars, for the ``d`` of an SVG path.
        width: of the picture, in the path's units; :data:`HEIGHT` is its height.
        low, high: what stands at the ends of the axis.
        zero: where real zero lies, in per cent of the width; ``None`` outside or unknown.
        combs: the grids below.
        caption: the picture in words.
    """

    path: str
    width: int
    low: str
    high: str
    zero: float | None
    combs: tuple[Comb, ...]
    caption: str


def reals(h: Histogram, what: str) -> Picture:
    """Of float values (``what`` in plural), over the grids they are rounded to."""
    low, high = h.edges[0], h.edges[-1]
    margin = 0.02 * (high - low)
    low, high = low - margin, high + margin

    def place(x: float) -> float:
        return (x - low) / (high - low) * WIDTH

    path = _outline([round(place(e)) for e in h.edges], h.counts)
    combs = tuple(_comb(g, low, high, place) for g in h.grids)
    return Picture(
        path,
        WIDTH,
        words.number(h.edges[0]),
        words.number(h.edges[-1]),
        _percent(0.0, low, high),
        combs,
        reals_in_words(h, what),
    )


def reals_in_words(h: Histogram, what: str) -> str:
    """How far the values reach, and where nearly all of them lie."""
    total, share = sum(h.counts), narrowest(h)
    text = (
        f"{total:,} {what} from {words.number(h.edges[0])} to {words.number(h.edges[-1])}; 99 % of "
        f"them within {100 * share:.0f} % of that range"
    )
    if not h.grids:
        return text + "."
    coarsest = h.grids[-1]
    values = coarsest.qmax - coarsest.qmin + 1
    shared = min(values, math.ceil(share * (h.edges[-1] - h.edges[0]) / coarsest.scale))
    of = "" if len(h.grids) == 1 else " of the coarsest grid"
    return f"{text}, on {shared} of the {values} values{of}."


def narrowest(h: Histogram) -> float:
    """The shortest run of bins that holds 99 % of the values, as a fraction of the range."""
    need, start, held = 0.99 * sum(h.counts), 0, 0
    width = best = h.edges[-1] - h.edges[0]
    for end, count in enumerate(h.counts):
        held += count
        while held - h.counts[start] >= need:
            held -= h.counts[start]
            start += 1
        if held >= need:
            best = min(best, h.edges[end + 1] - h.edges[start])
    return best / width if width else 1.0


def integers(x: Integers, zero_point: int | None = None) -> Picture:
    """Which integers the values became; ``zero_point`` where all of them share one."""
    n = len(x.counts)
    path = _outline(list(range(n + 1)), x.counts)
    low, high = x.qmin, x.qmin + n - 1
    zero = None if zero_point is None else 100 * (zero_point - low + 0.5) / n
    return Picture(path, n, words.number(low), words.number(high), zero, (), integers_in_words(x))


def integers_in_words(x: Integers) -> str:
    """How many integers are in use, and how much lies at the ends of the range."""
    total = sum(x.counts)
    ends = (x.counts[0] + x.counts[-1]) / total if total else 0.0
    share = "none" if ends == 0 else f"{100 * ends:.2g} %"
    return (
        f"{x.used} of the {len(x.counts)} integers are in use; {share} of the {total:,} values "
        "lie at the ends."
    )


def _percent(x: float, low: float, high: float) -> float | None:
    return round(100 * (x - low) / (high - low), 2) if low <= x <= high else None


def _outline(edges: list[int], counts: tuple[int, ...]) -> str:
    """Bars between ``edges`` as one closed path in relative steps; equal neighbours are one bar."""
    most = math.log1p(max(counts)) or 1.0
    parts, height, start = [f"M{edges[0]} {HEIGHT}"], 0, edges[0]
    for left, count in zip(edges, counts, strict=False):
        # what is there at all is at least a line
        tall = max(2, round((HEIGHT - 4) * math.log1p(count) / most)) if count else 0
        if tall != height:
            parts.append(
                f"h{left - start}v{height - tall}" if left > start else f"v{height - tall}"
            )
            height, start = tall, left
    return "".join(parts) + f"h{edges[-1] - start}V{HEIGHT}z"


def _comb(g: Grid, low: float, high: float, place: object) -> Comb:
    assert callable(place)
    first = max(g.qmin, math.ceil(low / g.scale) + g.zero_point)
    last = min(g.qmax, math.floor(high / g.scale) + g.zero_point)
    label = g.label.split(",")[0]
    text = f"{g.label}: a step of {words.number(g.scale)}"
    step = g.scale / (high - low) * WIDTH
    start, end = (place(g.scale * (q - g.zero_point)) for q in (first, last))
    start, end = max(0.0, start), min(float(WIDTH), max(start, end))
    return Comb(
        label, round(start, 2), round(end, 2), None if step < _DENSE else round(step, 3), text
    )
