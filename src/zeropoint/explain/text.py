"""An explanation in the terminal: a few sentences, a table, a number line. By rich."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .numbers import Explanation, Grid

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class View:
    """Sentences, table, number line, totals, one below the other."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        e = self.explanation
        yield Text("real = scale * (q - zero_point)", style="bold")
        yield Text()
        words = Table.grid(padding=(0, 1))
        words.add_column(no_wrap=True)
        words.add_column()
        for word, sentence in sentences(e):
            words.add_row(word, escape(sentence))
        yield words
        yield Text()
        yield table(e)
        yield Text(number_line(e, min(options.max_width, 100)), no_wrap=True, overflow="crop")
        yield Text()
        for sentence in totals(e):
            yield Text(sentence)


def number(x: float) -> str:
    """Five significant digits, with a true minus sign."""
    return f"{x:.5g}".replace("-", "−")


def short(x: float) -> str:
    """Three significant digits."""
    return f"{x:.3g}".replace("-", "−")


def integers(e: Explanation) -> str:
    """``unsigned 8-bit integers, 0 … 255``."""
    g = e.grid
    sign = "signed" if e.spec.signed else "unsigned"
    return f"{sign} {e.spec.bits}-bit integers, {number(g.qmin)} … {number(g.qmax)}"


def sentences(e: Explanation) -> list[tuple[str, str]]:
    """``(word, what it does)``."""
    g = e.grid
    how = "chosen from the values" if e.chosen else "as given"
    where = f" ({g.label} of {e.grids})" if e.grids > 1 else ""
    lines = [
        (
            "scale",
            f"{number(g.scale)}, {how}{where}: one step. A larger scale means coarser steps.",
        ),
        ("zero_point", f"{number(g.zero_point)}: the integer that stands for exactly 0."),
        ("range", f"{integers(e)}: the reals {number(g.lowest)} … {number(g.highest)}."),
        (
            "error",
            f"at most scale/2 = {number(g.scale / 2)} inside the range; a value outside is clipped "
            "to its end.",
        ),
    ]
    if e.name:
        lines.insert(0, ("values", f"{e.name}, {' × '.join(map(str, e.shape))}"))
    if e.others:
        scales = ", ".join(f"{number(x.scale)} ({x.label})" for x in e.others)
        lines.append(("scales", f"{e.grids}; the finest, median and coarsest: {scales}."))
    return lines


def table(e: Explanation) -> Table:
    """Each value shown, a line each, with the letter it has on the number line."""
    shown, all_of_it = len(e.values), e.integers.numel()
    title = None
    if shown < all_of_it:
        title = f"{shown} of {all_of_it} values, from the smallest to the largest"
    made = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False
    )
    made.add_column("")
    several = len(e.shape) > 1
    if several:
        made.add_column("at")
    headings = (
        "real",
        "real/scale + zero_point",
        "q",
        "scale*(q - zero_point)",
        "error",
        "at most",
    )
    for heading in headings:
        made.add_column(heading, justify="right")
    for n, v in enumerate(e.values):
        cells = [letter(n)]
        if several:
            cells.append(", ".join(map(str, v.index)))
        cells += [
            "–" if v.real is None else number(v.real),
            "–" if v.position is None else number(v.position),
            str(v.integer).replace("-", "−"),
            number(v.dequantized),
            "–" if v.error is None else short(v.error),
            short(v.bound) + (" clipped" if v.clipped else ""),
        ]
        made.add_row(*map(escape, cells), style="bold" if v.clipped else None)
    return made


def totals(e: Explanation) -> list[str]:
    """What becomes of all values together."""
    t = e.totals
    count = f"{t.elements} value{'s' if t.elements != 1 else ''}"
    used = f"{t.integers_used} of the {e.grid.levels} integers are in use"
    if e.grids > 1:
        used += f" in {e.grid.label}"
    if t.largest_error is None or t.rms_error is None or t.sqnr_db is None:
        return [
            f"{count}: {used}. The reals they were made of are not known here, so neither is the "
            f"error; typical is scale/√12 = {number(t.expected_rms)}."
        ]
    sqnr = "no error at all" if t.rms_error == 0 else f"SQNR {t.sqnr_db:.1f} dB"
    return [
        f"{count}: {t.clipped or 'none'} clipped, {used}.",
        f"error: largest {number(t.largest_error)}, root mean square {number(t.rms_error)} (values "
        f"spread evenly between the steps: scale/√12 = {number(t.expected_rms)}); {sqnr}.",
    ]


def letter(n: int) -> str:
    """The mark of the ``n``-th value."""
    return _LETTERS[n % len(_LETTERS)]


def number_line(e: Explanation, width: int = 72) -> str:
    """Values above the grid, integers and reals below, in plain text.

    ``+`` is a real that an integer stands for, ``0`` real zero, ``=`` such reals closer than the
    columns, a blank what no integer stands for: values there are clipped to the grid's end. ``*``
    are several values in one column.
    """
    g = e.grid
    margin = 11
    columns = max(24, width - margin - 2)
    points = [v.dequantized for v in e.values] + [v.real for v in e.values if v.real is not None]
    lo, hi = min(*points, 0.0), max(*points, 0.0)
    pad = max(0.06 * (hi - lo), 1.05 * g.scale)
    lo, hi = lo - pad, hi + pad
    per_column = (hi - lo) / (columns - 1)

    def column(x: float) -> int:
        return round((x - lo) / per_column)

    marks = [" "] * columns
    for n, v in enumerate(e.values):
        at = column(v.dequantized if v.real is None else v.real)
        marks[at] = letter(n) if marks[at] == " " else "*"
    line = [" "] * columns
    first = max(g.qmin, math.ceil(lo / g.scale) + g.zero_point)
    last = min(g.qmax, math.floor(hi / g.scale) + g.zero_point)
    dense = g.scale < 2 * per_column
    if dense:
        for at in range(column(max(lo, g.lowest)), column(min(hi, g.highest)) + 1):
            line[at] = "="
    else:
        for at in range(column(g.real(first)), column(g.real(last)) + 1):
            line[at] = "-"
        for q in range(first, last + 1):
            line[column(g.real(q))] = "+"
    if first <= g.zero_point <= last:
        line[column(0.0)] = "0"
    below_q, below_real = _labels(g, first, last, column, columns)
    rows = (("values", marks), ("grid", line), ("q", below_q), ("real", below_real))
    return "\n".join(f"{name:<{margin}}{''.join(row).rstrip()}" for name, row in rows)


def _labels(
    g: Grid, first: int, last: int, column: object, columns: int
) -> tuple[list[str], list[str]]:
    """Integers and reals under their places: zero, the ends, then the rest as room allows."""
    rows = ([" "] * columns, [" "] * columns)
    assert callable(column)
    count = last - first
    step = max(1, 10 ** max(0, math.floor(math.log10(count / 4)))) if count > 4 else 1
    while count / step > 10:
        step *= 2
    inner = [q for q in range(first, last + 1) if (q - g.zero_point) % step == 0]
    for q in dict.fromkeys([g.zero_point, first, last, *inner]):
        if not first <= q <= last:
            continue
        texts = (number(q), number(g.real(q)))
        wide = max(map(len, texts))
        start = min(max(0, column(g.real(q)) - wide // 2), columns - wide)
        taken = slice(max(0, start - 1), start + wide + 1)
        if any(c != " " for row in rows for c in row[taken]):
            continue
        for row, text in zip(rows, texts, strict=True):
            row[start : start + wide] = text.center(wide)
    return rows
