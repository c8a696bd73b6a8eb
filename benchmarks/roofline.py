"""The roofline: operations a second that each library attained, against operations a byte.

Readable without colour: ours are filled circles, every library has a marker of its own, and the
limits are labelled where they are drawn. After Williams, Waterman and Patterson 2009.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import peers
from zeropoint.atomic import write_text
from zeropoint.limits import Limits

LIBRARIES = ("torch", "ONNX Runtime", "OpenVINO", "torchao", "zentorch", "llama.cpp")
MARKERS = dict(zip((peers.OURS, *LIBRARIES), ("o", "s", "^", "v", "D", "x", "P"), strict=True))
PANELS = {
    "float32": ("float32",),
    "bfloat16": ("bfloat16",),
    "int8 static": ("int8 static u8→u8", "int8 static u8→f32", "int8 static f32→f32"),
    "int8 dynamic": ("int8 dynamic",),
    "int8 weight-only, float32": ("int8 weight-only f32",),
    "int8 weight-only, bfloat16": ("int8 weight-only bf16",),
    "int4 dynamic": ("int4 dynamic",),
    "int4 weight-only, float32": ("int4 weight-only f32",),
    "int4 weight-only, bfloat16": ("int4 weight-only bf16",),
}


def library(name: str) -> str:
    """Whose entry this is: the first words of its name."""
    return next((one for one in (*LIBRARIES[1:], peers.OURS) if name.startswith(one)), "torch")


def intensity(row: dict[str, Any]) -> float:
    """Operations for each byte that has to move: weights, inputs and outputs, once each."""
    p = peers.PRECISIONS[row["precision"]]
    k, n, m = row["k"], row["n"], row["m"]
    moved = k * n * p.weight_bytes + m * k * p.input_bytes + m * n * p.output_bytes
    return 2 * m * k * n / moved


def points(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Library → (operations a byte, GOPS), its best entry of each row."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        best: dict[str, float] = {}
        for name, entry in row["entries"].items():
            owner = library(name)
            best[owner] = min(best.get(owner, float("inf")), entry["us"])
        for owner, us in best.items():
            gops = 2 * row["m"] * row["k"] * row["n"] / us / 1e3
            found.setdefault(owner, []).append((intensity(row), gops))
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the SVG, for the largest number of threads that was timed, weights in the caches."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [r for r in result["rows"] if not r["cold"]] or result["rows"]
    threads = max(r["threads"] for r in rows)
    rows = [r for r in rows if r["threads"] == threads]
    shown = {
        title: [r for r in rows if r["precision"] in precisions]
        for title, precisions in PANELS.items()
    }
    shown = {title: found for title, found in shown.items() if found}
    style = {"svg.hashsalt": "zeropoint", "svg.fonttype": "path", "font.size": 9}
    with plt.rc_context(style):
        columns = 2
        lines = -(-len(shown) // columns)
        figure, grid = plt.subplots(
            lines, columns, figsize=(11, 3.6 * lines + 0.8), squeeze=False, sharex=True, sharey=True
        )
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        handles: dict[str, Any] = {}
        span = [intensity(r) for r in rows]
        for axes, (title, found) in zip(grid.flat, shown.items(), strict=False):
            axes.set(xscale="log", yscale="log", title=title)
            axes.set_xlim(min(span) / 1.5, max(span) * 1.5)
            axes.grid(True, which="major", linewidth=0.3, color="0.85")
            for owner, dots in points(found).items():
                ours = owner == peers.OURS
                handles[owner] = axes.scatter(
                    *zip(*dots, strict=True),
                    marker=MARKERS[owner],
                    s=26 if ours else 20,
                    facecolors="black" if ours or MARKERS[owner] == "x" else "none",
                    edgecolors=None if MARKERS[owner] == "x" else "black" if ours else "0.35",
                    linewidths=0.8,
                    zorder=3 if ours else 2,
                )
        if result["limits"]:
            limits = Limits.from_dict(result["limits"])
            for axes, title in zip(grid.flat, shown, strict=False):
                _roofs(axes, limits, peers.PRECISIONS[PANELS[title][0]].kind, threads)
        for axes in grid[-1]:
            axes.set_xlabel("operations a byte moved (weights, inputs, outputs)")
        for line in grid:
            line[0].set_ylabel("GOPS")
        order = [name for name in MARKERS if name in handles]
        figure.legend(
            [handles[name] for name in order], order, ncols=len(order), loc="lower center",
            frameon=False,
        )  # fmt: skip
        count = f"{threads} thread" + "s" * (threads != 1)
        figure.suptitle(f"{result['machine']['cpu']}, {count}, kernel {result['machine']['isa']}")
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    write_text(path, "\n".join(line.rstrip() for line in buffer.getvalue().split("\n")))


def _roofs(axes: Any, limits: Limits, kind: str, threads: int) -> None:
    """A horizontal line for each instruction set's arithmetic, a slope for each level of memory."""
    left, right = axes.get_xlim()
    small = {"textcoords": "offset points", "fontsize": 7}
    peaks = {
        p.isa: p.gops
        for p in limits.peaks
        if p.kind == kind and p.threads == threads and p.isa != "portable"
    }
    drawn: list[float] = []
    for isa, gops in sorted(peaks.items(), key=lambda item: -item[1]):
        if any(abs(gops / other - 1) < 0.25 for other in drawn):
            continue  # the same registers under another name
        drawn.append(gops)
        axes.axhline(gops, color="black", linewidth=0.8, zorder=1)
        axes.annotate(f"{isa} {gops:,.0f}", (right, gops), xytext=(-2, 2), ha="right", **small)
    levels: dict[str, float] = {}
    for read in limits.reads:
        if read.threads == threads:
            level = limits.level(read.nbytes, threads)
            levels[level] = max(levels.get(level, 0.0), read.gbs)
    levels.pop("L1", None)  # no layer worth timing fits there
    for (level, gbs), dashes in zip(levels.items(), ((1, 1), (4, 1), (8, 2)), strict=False):
        end = min(max(drawn, default=right * gbs) / gbs, right)
        line = [left, end], [left * gbs, end * gbs]
        axes.plot(*line, color="black", linewidth=0.8, dashes=dashes, zorder=1)
        axes.annotate(f"{level} {gbs:,.0f} GB/s", (left, left * gbs), xytext=(3, 6), **small)
