"""The page's plots: matplotlib's SVG, made to live inside an HTML page.

Text stays text and colours become the page's CSS variables, so that a plot follows the page into
dark mode. Nothing is told by colour alone: series differ in the shape of their markers.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import words
from .numbers import LayerReport, Report

if TYPE_CHECKING:
    from ..search.numbers import Front, Point

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


def front(f: Front) -> str:
    """Drop of the metric against what a model costs: the front, single choices, the chosen one."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 4.3), layout="constrained")
        axes = figure.add_subplot()
        axes.grid()
        scale, unit = _unit_of(f)
        xs = [_cost(f, p) / scale for p in f.points]
        order = sorted(range(len(xs)), key=lambda i: xs[i])
        axes.plot(
            [xs[i] for i in order], [f.points[i].measured.value for i in order],
            color=ONE, linewidth=1.2, alpha=0.55, zorder=2,
        )  # fmt: skip
        titles: dict[str, list[str]] = {}
        chosen = f.chosen
        series = (
            ("front", "on the front", ONE, "o", ONE, [p for p in f.points if p is not chosen]),
            ("uniform", "one choice for all layers", TWO, "s", PAPER, list(f.uniform)),
            ("chosen", "chosen", INK, "*", INK, [] if chosen is None else [chosen]),
        )
        for key, label, color, marker, fill, points in series:
            if not points:
                continue
            x = [_cost(f, p) / scale for p in points]
            y = [p.measured.value for p in points]
            for a, p in zip(x, points, strict=True):
                ends = (p.measured.low, p.measured.high)
                if all(math.isfinite(e) for e in ends):
                    axes.plot([a, a], ends, color=color, linewidth=1, alpha=0.6, zorder=2)
            size = 130 if key == "chosen" else 34
            axes.scatter(
                x, y, s=size, marker=marker, facecolor=fill, edgecolor=color, linewidth=1.4,
                label=label, gid=f"points-{key}", zorder=4 if key == "chosen" else 3,
            )  # fmt: skip
            titles[key] = [point_in_words(f, p) for p in points]
            if key == "uniform":
                for i, (a, b, p) in enumerate(zip(x, y, points, strict=True)):
                    axes.annotate(
                        choices(p), (a, b), xytext=(10, 7), textcoords="offset points",
                        fontsize=9, color=SOFT, gid=f"note-{i}", zorder=2,
                    )  # fmt: skip
        axes.axhline(0, color=SOFT, linewidth=0.8)
        if f.budget.max_drop is not None:
            _limit(axes.axhline, axes, "largest drop allowed", (1, f.budget.max_drop), True)
        bound = f.budget.max_bytes if f.cost == "bytes" else f.budget.max_latency
        if bound is not None:
            _limit(axes.axvline, axes, "largest allowed", (bound / scale, 1), False)
        axes.set_xlabel(f"{'size' if f.cost == 'bytes' else 'time of a call'} in {unit}")
        axes.set_ylabel(f"{f.metric} lost, on held-out data")
        axes.margins(0.06, 0.12)
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.3, columnspacing=1.6)
        return _svg(figure, "front", "The Pareto front", front_in_words(f), titles)


def front_in_words(f: Front) -> str:
    """What the plot of the front shows, for those who do not see it."""
    if not f.points:
        return "There are no points on the front."
    ends = [point_in_words(f, p) for p in (f.points[0], f.points[-1])]
    text = f"{words.count(len(f.points), 'point', 'points')}, from {ends[0]} to {ends[-1]}."
    if f.chosen is not None:
        text += f" Chosen: {point_in_words(f, f.chosen)}."
    return text + " Vertical lines are intervals. All values are in the table below."


def point_in_words(f: Front, p: Point) -> str:
    """``5.61 MB, 0.0021 lost (−0.001 … 0.005): 20 × int4, 4 × int8``."""
    lost = f"{words.number(p.measured.value)} lost {words.interval(p.measured)}"
    return f"{cost(f, p)}, {lost}: {choices(p)}"


def choices(p: Point) -> str:
    """How many layers got what."""
    if len(p.layers) == 1:
        return f"all {next(iter(p.layers))}"
    return ", ".join(f"{n} × {label}" for label, n in p.layers.items() if n)


def cost(f: Front, p: Point) -> str:
    """Bytes or time of a point, in words."""
    return words.size(p.bytes) if f.cost == "bytes" else words.seconds(_cost(f, p))


def _cost(f: Front, p: Point) -> float:
    if f.cost == "bytes":
        return float(p.bytes)
    return p.measured_seconds or p.seconds or math.nan


def _unit_of(f: Front) -> tuple[float, str]:
    most = max((_cost(f, p) for p in (*f.points, *f.uniform)), default=1.0)
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
    if f.cost == "seconds":
        units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
    return next((u for u in units if most >= u[0]), units[-1])


def _limit(line: Any, axes: Axes, text: str, at: tuple[float, float], across: bool) -> None:
    line(at[1] if across else at[0], color=TWO, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
    along = ("axes fraction", "data") if across else ("data", "axes fraction")
    axes.annotate(
        text, at, xycoords=along, xytext=(-4, 4) if across else (4, -12),
        textcoords="offset points", ha="right" if across else "left", fontsize=9,
        gid=f"note-{'drop' if across else 'cost'}",
    )  # fmt: skip


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
        "aria-labelledby": f"{key}-title",
        "aria-describedby": f"{key}-desc",
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
