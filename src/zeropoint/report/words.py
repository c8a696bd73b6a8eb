"""Numbers as people read them, and the verdict. Shared by the table and the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..terminal import seconds, size, three, unit_of

if TYPE_CHECKING:
    from ..statistics import Estimate
from .numbers import Difference, Latency, Report, Timing


def decibels(x: Difference) -> str:
    """``31.4 dB``, ``exact``, ``not run``, ``none finite`` …"""
    value = x.sqnr_db
    if math.isnan(value):
        if x.non_finite:
            return "NaN/Inf"
        return "not comparable" if x.skipped_calls else "not run"
    if math.isinf(value):
        return "exact" if value > 0 else "no signal"
    return f"{value:.1f} dB"


def spread(x: Timing) -> str:
    """Median and quartiles in the median's unit: ``4.61 ms (4.58 … 4.70)``."""
    factor = unit_of(x.median)[1]
    return f"{seconds(x.median)} ({three(x.q1 * factor)} … {three(x.q3 * factor)})"


def number(value: float) -> str:
    """Four significant digits."""
    return "not a number" if math.isnan(value) else f"{value:.4g}".replace("-", "−")


def cosine(value: float) -> str:
    """A cosine never rounded up to 1."""
    if math.isnan(value):
        return "–"
    for digits in (4, 5, 6, 8):
        text = f"{value:.{digits}f}"
        if float(text) < 1:
            return text
    return "1.0000" if value == 1 else "> 0.99999999"


def interval(x: Estimate, words: Callable[[float], str] = number) -> str:
    """The ends of an interval: ``(0.9685 … 0.9912)``; ``(?)`` where nothing is known."""
    if not (math.isfinite(x.low) and math.isfinite(x.high)):
        return "(?)"
    return f"({words(x.low)} … {words(x.high)})"


def mean_cosine(r: Report) -> str:
    """``0.9985 (0.9983 … 0.9987)``; the value alone where the interval is not known."""
    text, x = cosine(r.outputs.cosine_mean), r.outputs.cosine
    return text if x is None else f"{text} {interval(x, cosine)}"


def factor(value: float) -> str:
    """``3.9×``; below 2 with two decimals."""
    if not math.isfinite(value) or value <= 0:
        return "–"
    return (
        f"{value:.2f}×" if value < 1.995 else f"{value:.1f}×" if value < 9.95 else f"{value:.0f}×"
    )


def change(before: float, after: float) -> str:
    """``+0.0012``; ``0`` where nothing changed."""
    difference = after - before
    if math.isnan(difference):
        return "–"
    return "0" if difference == 0 else f"{difference:+.3g}".replace("-", "−")


def pace(x: Latency) -> str:
    """``2.1× faster``, ``1.3× slower`` or ``about as fast``, where the quartiles overlap."""
    if not math.isfinite(x.speedup) or x.speedup <= 0:
        return "not comparable"
    if not x.distinguishable:
        return "about as fast"
    if x.speedup >= 1:
        return f"{factor(x.speedup)} faster"
    return f"{factor(1 / x.speedup)} slower"


def shrinkage(before: float, after: float) -> str:
    """``3.9× smaller``, ``1.1× larger`` or ``same``."""
    r = ratio(before, after)
    if not r > 0:
        return "–"
    if abs(r - 1) < 0.005:
        return "same"
    return f"{factor(r)} smaller" if r > 1 else f"{factor(1 / r)} larger"


def count(n: int, one: str, many: str) -> str:
    """``1 batch``, ``5 batches``."""
    return f"{n} {one if n == 1 else many}"


def marked(r: Report) -> set[str]:
    """Names of the layers marked as worst: a quarter of them, at most three."""
    return {x.name for x in r.worst(max(1, min(3, len(r.layers) // 4)))}


def ratio(before: float, after: float) -> float:
    return before / after if after else math.nan


def verdict(r: Report) -> str:
    """What a reader who stops here should know: size, speed, fidelity, and where it is lost."""
    sizes = f"({size(r.bytes_before)} → {size(r.bytes_after)})"
    parts = [f"is {shrinkage(r.bytes_before, r.bytes_after)} {sizes}".replace("same", "as large")]
    if r.latency:
        x = r.latency[0]
        times = f"({seconds(x.before.median)} → {seconds(x.after.median)}, {x.name})"
        parts.append(f"runs {pace(x)} {times}" if x.distinguishable else f"is {pace(x)} {times}")
    d = r.outputs.difference
    if d.exact:
        parts.append("returns exactly the same outputs")
    elif r.outputs.vectors:
        parts.append(
            f"keeps its outputs at a cosine of {mean_cosine(r)} on average, "
            f"{cosine(r.outputs.cosine_min)} at worst (SQNR {decibels(d)})"
        )
    text = "The quantized model " + _list(parts) + "."
    if r.metric is not None:
        before, after = number(r.metric.before), number(r.metric.after)
        text += f" Its {r.metric.name} " + (
            f"stays at {after}" if before == after else f"goes from {before} to {after}"
        )
        found = r.metric.comparison
        text += "." if found is None else f": {found.verdict}."
    if d.non_finite:
        text += f" Warning: {d.non_finite} output values are NaN or infinite in one model only."
    broken = [x.label for x in r.layers if x.alone.non_finite]
    if broken:
        text += f" Warning: NaN or infinite values arise in {_list(broken[:3])}."
    worst = r.worst(1)
    if worst:
        text += f" Most is lost in {worst[0].label} ({decibels(worst[0].alone)} alone)."
    return text


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
