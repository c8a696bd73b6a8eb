"""The table of methods in Markdown, best first, and its place in the docs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from method_quality import FLOAT, Entry, Row
from method_subjects import Case, Subject
from zeropoint.atomic import write_text
from zeropoint.statistics import estimate, paired

DISTURBED = 0.1
"""CPUs that others took while something was timed, from which on the table says so."""


def table(
    subject: Subject, rows: list[Row], entries: list[Entry], speeds: dict[str, Any] | None
) -> str:
    """A line for each row: quality with its interval, bytes, and speeds where they were measured.

    Args:
        rows: as measured, float among them.
        entries: ours; a row of another title is a peer's.
        speeds: as :func:`method_speed.time_all` returns them.
    """
    ours = {entry.title: entry for entry in entries}
    head = ["model", "method", subject.measure, "95 % interval", "beside rounding", "MB"]
    for case in subject.cases if speeds else ():
        head += [f"{case.name}, {'tokens/s' if case.tokens else 'ms'}", "× float32"]
    aligned = ["---", "---", "---:", "---:", "---", *["---:"] * (len(head) - 5)]
    lines = [head, aligned]
    float_row = [row for row in rows if row.title == FLOAT]
    rest = [row for row in rows if row.title != FLOAT]
    for row in [*float_row, *sorted(rest, key=lambda r: -subject.better * _mean(r))]:
        found = estimate(row.scores)
        ends = sorted((subject.shown(found.low), subject.shown(found.high)))
        entry = ours.get(row.title)
        name = row.title if entry is None else entry.name
        method = "" if entry is None else ", ".join(entry.method)
        cells = [
            name,
            method,
            f"{subject.shown(found.value):.4f}",
            " … ".join(f"{x:.4f}" for x in ends),
            against_nearest(subject, row, rows, ours),
            f"{row.bytes / 1e6:.1f}",
        ]
        for case in subject.cases if speeds else ():
            cells += _speed(case, row.form, speeds["cases"][case.name]["forms"] if speeds else {})
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def against_nearest(subject: Subject, row: Row, rows: list[Row], ours: dict[str, Entry]) -> str:
    """Whether the samples tell a method from rounding to nearest by the same recipe."""
    entry = ours.get(row.title)
    if entry is None or not entry.method:
        return ""
    nearest = [r for r in rows if r.title == entry.name]
    if not nearest:
        return ""
    found = paired(nearest[0].scores, row.scores)
    if not found.significant:
        return "no difference shown"
    return "better" if subject.better * found.change.value > 0 else "worse"


def conditions(speeds: dict[str, Any]) -> str:
    """Where and how the speeds were measured."""
    text = f"Speeds: {speeds['machine'].splitlines()[0]}."
    busy = [f"{c} ({s['foreign']:.1f})" for c, s in speeds["cases"].items() if _disturbed(s)]
    if busy:
        text += f" Other programs ran meanwhile (CPUs they took: {', '.join(busy)})."
    return text


def put(page: Path, name: str, text: str | None) -> None:
    """Replace what stands between a page's marks of this name; ``None`` only looks for them.

    Raises:
        ValueError: the page does not have both marks once, in their order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = page.read_text(encoding="utf-8")
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed) or begin in rest or end in before + after:
        raise ValueError(f"{page} must hold {begin} and, behind it, {end}, each once")
    if text is not None:
        write_text(page, f"{before}{begin}\n{text}\n{end}{after}")


def _mean(row: Row) -> float:
    return math.fsum(row.scores) / len(row.scores)


def _speed(case: Case, form: str, times: dict[str, dict[str, float]]) -> list[str]:
    """Tokens a second or ms, and how many times as fast as float32."""
    if form not in times:
        return ["", ""]
    us = times[form]["us"]
    shown = f"{case.tokens / us * 1e6:,.0f}" if case.tokens else f"{us / 1e3:.2f}"
    return [shown, f"{times[FLOAT]['us'] / us:.2f}" if FLOAT in times else ""]


def _disturbed(times: dict[str, Any]) -> bool:
    return times["foreign"] is not None and times["foreign"] > DISTURBED
