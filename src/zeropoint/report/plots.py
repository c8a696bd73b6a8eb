"""The page's plots: matplotlib's SVG, made to live inside an HTML page.

Text stays text and colours become the page's CSS variables, so that a plot follows the page into
dark mode. Nothing is told by colour alone: series differ in the shape of their markers.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator

from . import words
from .numbers import Histogram, LayerReport, Report

# Colours that nothing else uses, replaced by CSS variables of the page.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--one)",
    "#050505": "var(--two)",
    "#060606": "var(--paper)",
}
INK, SOFT, LINE, ONE, TWO, PAPER = _VARIABLES

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zeropoint",
    "font.family": "DejaVu Sans",  # measured with it; shown in the page's font
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
}


def layer_errors(r: Report) -> str:
    """SQNR of each layer in model order, alone and in the running model."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y")
        finite = [
            v
            for x in r.layers
            for v in (x.alone.sqnr_db, x.accumulated.sqnr_db)
            if math.isfinite(v)
        ]
        low, high = (min(finite), max(finite)) if finite else (0.0, 60.0)
        margin = max(2.0, 0.12 * (high - low))
        ceiling = high + margin  # exact layers stand here
        series = (
            ("running", "running", TWO, "s", 5.0, PAPER, [x.accumulated for x in r.layers]),
            ("alone", "alone", ONE, "o", 5.5, ONE, [x.alone for x in r.layers]),
        )
        titles: dict[str, list[str]] = {}
        for key, label, color, marker, size, fill, values in series:
            points = [(i, d) for i, d in enumerate(values, 1) if not math.isnan(d.sqnr_db)]
            xs = [i for i, _ in points]
            ys = [min(max(d.sqnr_db, low - margin), ceiling) for _, d in points]
            axes.plot(xs, ys, color=color, linewidth=1, alpha=0.45, zorder=2)
            axes.scatter(
                xs,
                ys,
                s=size**2,
                marker=marker,
                facecolor=fill,
                edgecolor=color,
                linewidth=1.4,
                label=f"{label} ({'with' if key == 'running' else 'without'} the error of the "
                "layers before)",
                gid=f"points-{key}",
                zorder=3,
            )
            titles[key] = [
                f"{i}. {r.layers[i - 1].label}: {words.decibels(d)} {key}" for i, d in points
            ]
        if any(x.alone.exact or x.accumulated.exact for x in r.layers):
            axes.axhline(ceiling, color=LINE, linestyle=(0, (2, 3)), zorder=1)
            axes.annotate(
                "exact",
                (0, ceiling),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                color=SOFT,
                fontsize=9,
            )
        axes.set_ylim(low - 1.6 * margin, ceiling + 0.6 * margin)
        axes.set_xlim(0.4, len(r.layers) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.set_xlabel("layer, numbered as in the table")
        axes.set_ylabel("SQNR in dB, higher is better")
        for x in r.worst(1):
            _name_worst(axes, r, x, low - margin)
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.3, columnspacing=1.6)
        return _svg(
            figure,
            "layers",
            "Error of each layer in model order",
            errors_in_words(r),
            titles,
        )


def errors_in_words(r: Report) -> str:
    """What the plot of errors shows, for those who do not see it."""
    values = [x.alone.sqnr_db for x in r.layers if math.isfinite(x.alone.sqnr_db)]
    if not values:
        return "No layer has a finite signal-to-noise ratio."
    worst = "; ".join(f"{x.label} {words.decibels(x.alone)}" for x in r.worst(3))
    return (
        f"Alone, the {len(r.layers)} layers reach {min(values):.1f} to {max(values):.1f} dB. "
        f"Worst: {worst}. All values are in the table of layers."
    )


def weights(x: LayerReport, number: int) -> str:
    """Histogram of a layer's float weights above the grids they are rounded to."""
    h = x.histogram
    assert h is not None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.7, 3.0), layout="constrained")
        heights = (5, 0.55 * len(h.grids) + 0.2)
        top, comb = figure.subplots(
            2, 1, sharex=True, gridspec_kw={"height_ratios": heights, "hspace": 0.02}
        )
        top.grid(axis="y")
        top.stairs(h.counts, h.edges, fill=True, facecolor=ONE, alpha=0.35)
        top.stairs(h.counts, h.edges, edgecolor=ONE, linewidth=1.2, baseline=None)
        top.set_yscale("symlog", linthresh=1)
        top.set_ylim(0, 2 * max(h.counts))
        top.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
        top.minorticks_off()
        top.set_ylabel("weights")
        top.tick_params(axis="x", length=0)
        _combs(comb, h)
        comb.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        comb.set_xlabel("value of the weight")
        return _svg(figure, f"weights-{number}", f"Weights of {x.label}", weights_in_words(x), {})


def weights_in_words(x: LayerReport) -> str:
    """What a histogram shows."""
    h = x.histogram
    assert h is not None
    total, width = sum(h.counts), h.edges[-1] - h.edges[0]
    # the shortest run of bins that holds 99 % of the weights
    need, best, start, held = 0.99 * total, len(h.counts), 0, 0
    for end, c in enumerate(h.counts):
        held += c
        while held - h.counts[start] >= need:
            held -= h.counts[start]
            start += 1
        if held >= need:
            best = min(best, end + 1 - start)
    coarsest = h.grids[-1]
    values = coarsest.qmax - coarsest.qmin + 1
    middle = width * best / len(h.counts)
    shared = min(values, math.ceil(middle / coarsest.scale))
    steps = ", ".join(f"{words.number(g.scale)} ({g.label})" for g in h.grids)
    return (
        f"{total:,} weights from {words.number(h.edges[0])} to {words.number(h.edges[-1])}; 99 % "
        f"of them lie within {100 * best / len(h.counts):.0f} % of that range and share {shared} "
        f"of the {values} values of the coarsest grid. Step of the grid: {steps}."
    )


def _combs(axes: Axes, h: Histogram) -> None:
    """A row of ticks for each grid: every integer's place on the axis of the weights."""
    margin = 0.03 * (h.edges[-1] - h.edges[0])
    low, high = h.edges[0] - margin, h.edges[-1] + margin
    axes.set_xlim(low, high)
    for row, g in enumerate(reversed(h.grids)):
        steps = (g.scale * (q - g.zero_point) for q in range(g.qmin, g.qmax + 1))
        xs = [x for x in steps if low <= x <= high]
        vertices = [v for x in xs for v in ((x, row - 0.3), (x, row + 0.3))]
        codes = [Outline.MOVETO, Outline.LINETO] * len(xs)
        axes.add_patch(
            mpl.patches.PathPatch(
                Outline(vertices, codes), facecolor="none", edgecolor=TWO, linewidth=0.5
            )
        )
    axes.set_ylim(-0.6, len(h.grids) - 0.4)
    axes.set_yticks(range(len(h.grids)), [g.label.split(",")[0] for g in reversed(h.grids)])
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.spines["left"].set_visible(False)


def _name_worst(axes: Axes, r: Report, x: LayerReport, floor: float) -> None:
    """A leader from the worst layer's point to its name, below all points."""
    i = next(i for i, y in enumerate(r.layers, 1) if y.name == x.name)
    right = i > len(r.layers) / 2
    axes.annotate(
        f"worst alone: {i}. {_shorten(x.label)}",
        (i, max(x.alone.sqnr_db, floor)),
        xytext=(i + (-0.2 if right else 0.2), axes.get_ylim()[0]),
        va="bottom",
        ha="right" if right else "left",
        fontsize=9,
        gid="note",
    )
    axes.plot(
        [i, i],
        [axes.get_ylim()[0], max(x.alone.sqnr_db, floor)],
        color=SOFT,
        linewidth=0.8,
        linestyle=(0, (2, 3)),
        zorder=1,
    )


def _shorten(name: str, length: int = 48) -> str:
    return name if len(name) <= length else "…" + name[-length + 1 :]


def _svg(
    figure: Figure, key: str, title: str, description: str, points: dict[str, list[str]]
) -> str:
    """The figure as an ``<svg>`` element with unique ids, CSS colours, title and description."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        parent.tag = parent.tag.rsplit("}", 1)[-1]
        parent.attrib = {k.rsplit("}", 1)[-1]: _attribute(v, key) for k, v in parent.attrib.items()}
        parent.text = (parent.text or "").strip()
        parent.tail = ""
        for child in list(parent):
            # matplotlib's style sheet would apply to the whole page
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for parent in root.iter():
        if "id" in parent.attrib:
            parent.attrib["id"] = f"{key}-{parent.attrib['id']}"
    for which, texts in points.items():
        group: Any = root.find(f".//g[@id='{key}-points-{which}']")
        marks = [] if group is None else list(group.iter("use"))
        for mark, text in zip(marks, texts, strict=True):
            ET.SubElement(mark, "title").text = text
    for at, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(tag, id=f"{key}-{tag}")
        element.text = text
        root.insert(at, element)
    root.attrib = {
        "class": "plot",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{key}-title {key}-desc",
    }
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def _attribute(value: str, key: str) -> str:
    """References get the plot's prefix, colours become variables, coordinates two decimals."""
    value = re.sub(r"^#(?=[\w])", f"#{key}-", value).replace("url(#", f"url(#{key}-")
    value = re.sub(r"font-family: [^;]+; ?", "", value)
    value = re.sub(r"font: (\d[\d.]*px) [^;]+", r"font-size: \1", value)
    for color, variable in _VARIABLES.items():
        value = value.replace(color, variable)
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", value).replace("  ", " ").strip()
