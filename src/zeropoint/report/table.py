"""A report in the terminal, by rich."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..terminal import table as styled
from . import words
from .numbers import LayerReport, Report

WIDE = 110
"""Columns from which a line has room for bytes and times before and after, not their ratio only."""


class View:
    """Verdict, whole model, layers in model order, one below the other."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        r = self.report
        yield Text(r.verdict + "\n", style="bold")
        yield _whole(r)
        if r.layers:
            yield _layers(r, options.max_width >= WIDE)
        if r.left:
            yield _left(r)
        for title, beside in (("diagnosis", r.diagnosis), ("search", r.front)):
            if beside is not None:
                yield Rule(title, align="left", style="dim", characters="─")
                yield beside
        if r.environment is not None:
            e = r.environment
            yield Text(
                f"{e.cpu} · {e.isa} · {e.threads} of {e.logical_cpus} threads · torch {e.torch} · "
                f"zeropoint {e.zeropoint} · Python {e.python} · {e.date}",
                style="dim",
            )


def whole_rows(r: Report) -> list[tuple[str, str, str, str]]:
    """``(what, float, quantized, change)``, also for the page."""
    d = r.outputs.difference
    rows = [
        ("Output SQNR", "", words.decibels(d), ""),
        ("Output cosine, mean", "", words.mean_cosine(r), ""),
        ("Output cosine, worst", "", words.cosine(r.outputs.cosine_min), ""),
        ("Output error, largest", "", words.number(d.max_abs_error), ""),
    ]
    if r.metric is not None:
        m = r.metric
        cells = (words.number(m.before), words.number(m.after), words.change(m.before, m.after))
        if m.comparison is not None:
            found = (m.comparison.before, m.comparison.after, m.comparison.change)
            cells = tuple(f"{c} {words.interval(x)}" for c, x in zip(cells, found, strict=True))  # type: ignore[assignment]
        rows.append((m.name, *cells))
    before, after = r.bytes_before, r.bytes_after
    rows.append(("Size", words.size(before), words.size(after), words.shrinkage(before, after)))
    for x in r.latency:
        rows.append(
            (f"Latency, {x.name}", words.spread(x.before), words.spread(x.after), words.pace(x))
        )
    return rows


def latency_note(r: Report) -> str:
    """What the latency rows are."""
    runs = "; ".join(f"{x.name}: {x.inputs}, {x.before.repeats} runs each" for x in r.latency)
    return f"Latency: median (quartiles), both models in turn. {runs}."


def interval_note(r: Report) -> str:
    """What stands in parentheses, and whether the metric's change is significant."""
    m, x = r.metric, r.outputs.cosine
    if m is not None and m.comparison is not None:
        c = m.comparison
        return f"(low … high): intervals at {c.change.level:.0%}. {m.name}: {c.verdict}."
    if x is not None:
        return (
            f"(low … high): interval at {x.level:.0%} by {words.count(x.n, 'sample', 'samples')}."
        )
    if r.outputs.vectors:
        return "No intervals: they need scipy, pip install 'zeropoint[search]'."
    return ""


def _whole(r: Report) -> Table:
    table = styled(f"{r.model}, {words.count(r.batches, 'batch', 'batches')}")
    table.add_column("", no_wrap=True)
    for name in ("float", "quantized", "change"):
        table.add_column(name, justify="right")
    for row in whole_rows(r):
        table.add_row(*(escape(cell) for cell in row))
    notes = [interval_note(r), latency_note(r) if r.latency else ""]
    table.caption = escape("\n".join(note for note in notes if note)) or None
    return table


def _layers(r: Report, wide: bool) -> Table:
    worst = words.marked(r)
    given = {x.recipe or x.mode for x in r.layers}
    title = "Layers, in model order" + (f", all {given.pop()}" if len(given) == 1 else "")
    caption = (
        "alone: SQNR with the float model's input; running: with what the layers before lost. "
        "* worst alone."
    )
    if not wide:
        caption += " bytes, time: before / after."
    table = styled(title, caption=caption)
    table.add_column("#", justify="right")
    table.add_column("layer", overflow="fold", ratio=1 if not wide else None, min_width=16)
    if given:
        table.add_column("given", overflow="fold")
    for name in ("alone", "running", "max error", "bytes", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, x in enumerate(r.layers, 1):
        mark = "*" if x.name in worst else " "
        cells = (
            words.decibels(x.alone) + mark,
            words.decibels(x.accumulated),
            f"{x.alone.max_abs_error:.3g}" if x.alone.elements else "–",
            layer_bytes(x) if wide else words.factor(words.ratio(x.bytes_before, x.bytes_after)),
            layer_time(x) if wide else layer_speedup(x),
        )
        table.add_row(
            str(i),
            escape(x.label),
            *([escape(x.recipe or x.mode)] if given else []),
            *cells,
            style="bold" if mark == "*" else None,
        )
    return table


def layer_bytes(x: LayerReport) -> str:
    """``147 kB → 39.9 kB``."""
    return f"{words.size(x.bytes_before)} → {words.size(x.bytes_after)}"


def layer_time(x: LayerReport) -> str:
    """``41.2 µs → 10.1 µs``, or ``–``."""
    if x.seconds_before is None or x.seconds_after is None:
        return "–"
    return f"{words.seconds(x.seconds_before)} → {words.seconds(x.seconds_after)}"


def layer_speedup(x: LayerReport) -> str:
    """``4.1×``: how many times faster; below 1, slower."""
    if x.seconds_before is None or not x.seconds_after:
        return "–"
    return words.factor(x.seconds_before / x.seconds_after)


def _left(r: Report) -> Table:
    table = styled("Left in float")
    table.add_column("layer", overflow="fold")
    table.add_column("why")
    for name, reason in r.left.items():
        table.add_row(escape(name or "(model)"), escape(reason or "–"))
    return table
