"""A front in the terminal, by rich, and its verdict in words."""

from __future__ import annotations

import math
from glob import escape as literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..statistics import Estimate, samples_needed
from ..terminal import seconds, size
from ..terminal import table as styled
from .numbers import FLOAT, Front, Point


class View:
    """Verdict, front, uniform allocations, layers of the chosen point, one below the other."""

    def __init__(self, front: Front) -> None:
        self.front = front

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        f = self.front
        yield Text(verdict(f) + "\n", style="bold")
        if f.points:
            yield _points(f)
        if f.chosen is not None:
            yield _layers(f, f.chosen)
        if f.left:
            table = styled("Left in float")
            table.add_column("layer", overflow="fold")
            table.add_column("why")
            for name, reason in f.left.items():
                table.add_row(escape(name or "(model)"), escape(reason))
            yield table
        yield Text(_how(f), style="dim")


def verdict(f: Front) -> str:
    """What was asked, what came, and how sure it is."""
    asked = _asked(f)
    if not asked:
        return f"{_count(len(f.points), 'allocation')} of {f.model}; no budget was given."
    if not f.points:
        return f"No allocation keeps {asked}."
    p = f.chosen
    if p is None:
        return f"No point keeps {asked}. {_nearest(f)}".rstrip()
    text = (
        f"{f.model} keeps {asked} at {size(p.bytes)}, {_times(f.float_bytes / p.bytes)} smaller"
        + (f", {seconds(_time(p))} a call" if _time(p) is not None else "")
        + f": {f.metric} drops by {_interval(p.measured)}, {_samples(p.measured)}."
    )
    if f.skipped:
        text += (
            f" {_count(f.skipped, 'bolder point')} held on search data only, and "
            f"{'was' if f.skipped == 1 else 'were'} left."
        )
    if f.budget.max_drop is not None and p.measured.n > 1:
        text += " " + _certainty(f, p)
    return text


def _asked(f: Front) -> str:
    b, parts = f.budget, []
    if b.max_drop is not None:
        parts.append(f"a drop of at most {b.max_drop:g}")
    if b.max_bytes is not None:
        parts.append(f"at most {size(b.max_bytes)}")
    if b.max_latency is not None:
        parts.append(f"at most {seconds(b.max_latency)} a call")
    return " and ".join(parts)


def _nearest(f: Front) -> str:
    careful = f.points[-1]
    smallest = min(f.points, key=lambda p: p.bytes)
    text = (
        f"The most careful one has {size(careful.bytes)} and drops by "
        f"{_interval(careful.measured)}, the smallest {size(smallest.bytes)} and "
        f"{_interval(smallest.measured)}."
    )
    timed = [t for p in f.points if (t := _time(p)) is not None]
    if timed and f.budget.max_latency is not None:
        text += f" The fastest takes {seconds(min(timed))} a call."
    return text


def _certainty(f: Front, p: Point) -> str:
    budget = f.budget.max_drop
    assert budget is not None
    if f.certain_index is not None and f.certain_index <= f.points.index(p):
        return f"That is certain at {f.level:.0%}."
    n = p.measured.n
    text = f"At {f.level:.0%} that is not certain with {_count(n, 'sample')}"
    needed = _needed(p.measured, budget, f.level)
    if needed is not None and needed > n:
        text += f"; about {needed:,} would settle it"
    if f.certain is not None and f.certain.layers.keys() != {FLOAT}:
        c = f.certain
        text += f"; certain is {size(c.bytes)}, whose drop is {_interval(c.measured)}"
    return text + "."


def _needed(x: Estimate, budget: float, level: float) -> int | None:
    """Samples by which a drop as measured would be seen to lie below the budget."""
    from scipy.stats import norm

    reach = (x.high - x.low) / 2
    if not math.isfinite(reach) or x.value >= budget:
        return None
    variance = x.n * (reach / float(norm.ppf((1 + level) / 2))) ** 2
    return samples_needed(variance, budget - x.value, level=level)


def _points(f: Front) -> Table:
    table = styled(f"{f.model}, {f.metric}")
    table.add_column("", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    timed = f.float_seconds is not None
    if timed:
        table.add_column("a call", justify="right", no_wrap=True)
    for name in ("expected", "search", "held out"):
        table.add_column(name, justify="right", no_wrap=name != "held out")
    table.add_column("layers", overflow="fold")
    for i, p in enumerate(f.points):
        mark = "▶" if i == f.chosen_index else "✓" if i == f.certain_index else ""
        table.add_row(mark, *_row(p, timed), style="bold" if mark == "▶" else None)
    if f.uniform:
        table.add_section()
        for p in f.uniform:
            table.add_row("=", *_row(p, timed))
    marks = "▶ chosen, ✓ certain" if f.certain is not None else "▶ chosen"
    table.caption = (
        "Drops of the metric: as expected, on search data, on held-out data (low … high). "
        f"{marks}, = the same for all layers."
    )
    return table


def _row(p: Point, timed: bool) -> list[str]:
    cells = [size(p.bytes)]
    if timed:
        cells.append(seconds(_time(p)))
    cells += [_short(p.estimated_drop), _short(p.search_drop.value), _interval(p.measured)]
    return [*cells, escape(", ".join(f"{n} {label}" for label, n in p.layers.items()))]


def _layers(f: Front, p: Point) -> Table:
    table = styled("The chosen point, layer by layer")
    for name in ("layer", "gets", "damage", "bytes"):
        table.add_column(
            name, justify="right" if name in ("damage", "bytes") else "left", overflow="fold"
        )
    recipes = dict(p.recipe.overrides)
    for g in f.groups:
        recipe = recipes.get(literal(g.layers[0]))
        c = next(c for c in g.choices if c.recipe == recipe)
        names = ", ".join(name or "(model)" for name in g.layers)
        table.add_row(escape(names), c.label, _short(c.damage), size(c.bytes))
    return table


def _how(f: Front) -> str:
    c = f.check
    counts = ", ".join(f"{n:,} {name}" for name, n in f.samples.items())
    text = f"Samples: {counts}. "
    if c.pairs:
        rank = "–" if math.isnan(c.spearman) else f"{c.spearman:.2f}"
        text += (
            f"Estimated against measured damages of {_count(len(c.pairs), 'pair')}: rank "
            f"correlation {rank}, measured / estimated {_short(c.ratio)} (median)"
            + ("; all were measured, then. " if c.used == "measured" else ". ")
        )
    return text + (
        f"{_count(f.evaluations, 'run')} of a model over a part of the data, {f.elapsed:.0f} s, "
        f"seed {f.seed}."
    )


def _time(p: Point) -> float | None:
    return p.seconds if p.measured_seconds is None else p.measured_seconds


def _interval(x: Estimate) -> str:
    if not (math.isfinite(x.low) and math.isfinite(x.high)):
        return f"{_short(x.value)} (?)"
    return f"{_short(x.value)} ({_short(x.low)} … {_short(x.high)})"


def _samples(x: Estimate) -> str:
    return f"on {_count(x.n, 'held-out sample')}" if x.n > 1 else "as one number says"


def _short(value: float) -> str:
    """Three significant digits."""
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.3g}".replace("-", "−")


def _times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")
