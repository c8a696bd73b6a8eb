"""An explanation as a picture: the staircase of the grid, and the error under it. By matplotlib."""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..atomic import write_bytes
from .numbers import Explanation
from .text import letter, number, sentences, short

_POINTS = 2000
"""Of more values than this, so many are drawn."""
_STEPS = 400
"""With more steps than this in sight, the staircase is a line."""
_LEGEND: dict[str, Any] = {"fontsize": 9, "framealpha": 0.9, "edgecolor": "none"}
_BLUE, _RED, _GREY = "#1d5fbf", "#a8480c", "#5a6270"


def write(e: Explanation, path: str | os.PathLike[str]) -> None:
    """Draw ``e`` into a file, atomically. See :meth:`Explanation.to_plot`."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"a plot needs matplotlib ({error}): pip install zeropoint[report]"
        ) from error
    ending = Path(path).suffix.removeprefix(".").lower()
    known = FigureCanvasAgg.get_supported_filetypes()
    if ending not in known:
        endings = ", ".join(f".{k}" for k in sorted(known))
        raise ValueError(f"path must end in one of {endings}; got {str(path)!r}")
    style = {"text.parse_math": False, "svg.hashsalt": "zeropoint", "font.size": 10}
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(9, 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        top, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2)})
        _staircase(top, e)
        _errors(below, e)
        words = dict(sentences(e))
        title = f"{e.name}: " if e.name else ""
        figure.suptitle(
            f"{title}scale {number(e.grid.scale)}, zero point {number(e.grid.zero_point)}"
            + (f", {e.grid.label}" if e.grid.label else "")
            + f"\n{words['range']}",
            fontsize=11,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, dpi=150)
    write_bytes(path, buffer.getvalue())


def _span(e: Explanation) -> tuple[float, float]:
    back = e.dequantized
    points = back if e.reals is None else torch.stack([back, e.reals])
    lo, hi = min(0.0, float(points.min())), max(0.0, float(points.max()))
    pad = max(0.06 * (hi - lo), 1.2 * e.grid.scale)
    return lo - pad, hi + pad


def _staircase(axes: Any, e: Explanation) -> None:
    from matplotlib.ticker import MaxNLocator

    g = e.grid
    lo, hi = _span(e)
    axes.set_xlim(lo, hi)
    axes.set_ylim(lo, hi)
    axes.grid(color="#d5dae2", linewidth=0.6)
    axes.plot([lo, hi], [lo, hi], color=_GREY, linewidth=1, linestyle=(0, (4, 3)), label="no error")
    # each integer's step: half a step to either side of the real it stands for
    qs = [q for q in range(g.qmin, g.qmax + 1) if lo - g.scale <= g.real(q) <= hi + g.scale]
    levels = [g.real(q) for q in qs]
    if len(levels) > _STEPS:
        xs, ys = [lo, g.lowest, g.highest, hi], [g.lowest, g.lowest, g.highest, g.highest]
    else:
        left, right = min(lo, levels[0] - g.scale / 2), max(hi, levels[-1] + g.scale / 2)
        edges = [left, *(v + g.scale / 2 for v in levels[:-1]), right]
        xs = [x for a, b in pairwise(edges) for x in (a, b)]
        ys = [v for v in levels for _ in (0, 1)]
    label = "real → q → real"
    axes.plot(xs, ys, color=_BLUE, linewidth=1.6, solid_joinstyle="miter", label=label, zorder=3)
    axes.plot(0, 0, "+", color="black", markersize=16, markeredgewidth=1.4, label="0 is exact")
    for clipped, marker, name in ((False, "o", "value"), (True, "X", "value, clipped")):
        chosen = [v for v in e.values if v.clipped == clipped]
        if chosen:
            xs = [v.dequantized if v.real is None else v.real for v in chosen]
            ys = [v.dequantized for v in chosen]
            axes.plot(xs, ys, marker, color=_RED, markersize=6, zorder=4, label=name)
    for n, v in enumerate(e.values):
        x = v.dequantized if v.real is None else v.real
        if len(e.values) < 26:
            axes.annotate(
                letter(n), (x, v.dequantized), (0, -13), textcoords="offset points", ha="center"
            )
    _shade(axes, e, lo, hi)
    axes.set_ylabel("dequantized: scale·(q − zero_point)")
    second = axes.secondary_yaxis(
        "right", functions=(lambda r: r / g.scale + g.zero_point, lambda q: g.real(q))
    )
    second.yaxis.set_major_locator(MaxNLocator(integer=True))
    second.yaxis.set_major_formatter(lambda q, _: number(q) if g.qmin <= q <= g.qmax else "")
    second.set_ylabel("q")
    axes.legend(loc="upper left", **_LEGEND)


def _errors(axes: Any, e: Explanation) -> None:
    g = e.grid
    lo, hi = _span(e)
    half = g.scale / 2
    axes.grid(color="#d5dae2", linewidth=0.6)
    for sign in (-1, 1):
        axes.axhline(
            sign * half, color=_BLUE, linestyle="--", linewidth=1.2,
            label="± scale/2" if sign > 0 else None,
        )  # fmt: skip
    if e.reals is not None:
        x, back = e.reals.reshape(-1), e.dequantized.reshape(-1)
        if len(x) > _POINTS:
            keep = torch.linspace(0, len(x) - 1, _POINTS).long()
            x, back = x[keep], back[keep]
        inside = torch.tensor([not g.clips(v) for v in x.tolist()])
        for which, marker, name in ((inside, "o", "error"), (~inside, "X", "error, clipped")):
            if bool(which.any()):
                size = 5 if len(x) <= 64 else 2
                axes.plot(
                    x[which], (back - x)[which], marker, color=_RED, markersize=size, label=name
                )
        largest = float((back - x).abs().max())
        if largest > 4 * half:  # or the bound would be too small to see
            axes.set_yscale("symlog", linthresh=half, subs=[])
            tens = [half * 10**k for k in range(12) if half * 10**k < 10 * largest]
            axes.set_yticks([0.0, *tens, *(-t for t in tens)])
            axes.yaxis.set_major_formatter(lambda y, _: short(y))
            axes.minorticks_off()
    _shade(axes, e, lo, hi)
    axes.set_xlabel("real")
    axes.set_ylabel("error: dequantized − real")
    axes.margins(y=0.35)
    axes.legend(loc="upper left", ncols=4, **_LEGEND)


def _shade(axes: Any, e: Explanation, lo: float, hi: float) -> None:
    g = e.grid
    label = "outside: clipped"
    for a, b in ((lo, g.lowest - g.scale / 2), (g.highest + g.scale / 2, hi)):
        if a < b:
            axes.axvspan(a, b, facecolor="none", edgecolor="#b7bec9", hatch="///", label=label)
            label = "_"
