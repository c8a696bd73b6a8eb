"""Tables of what bench_linear.py measured, as Markdown, the worst ratio first."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import peers
from zeropoint.limits import Bound, Limits

DISTURBED = 0.1
"""Share of a CPU, others' or stolen, from which on a row is marked."""
MARK = "†"
Row = dict[str, Any]


def best_peer(row: Row) -> tuple[str, float] | None:
    """Name and µs of the fastest that is not ours."""
    times = {n: e["us"] for n, e in row["entries"].items() if n != peers.OURS}
    return min(times.items(), key=lambda item: item[1]) if times else None


def ratio(row: Row) -> float | None:
    """Best peer / ours: above 1, ours is faster."""
    best, ours = best_peer(row), row["entries"].get(peers.OURS)
    return None if best is None or ours is None else best[1] / ours["us"]


def disturbed(row: Row) -> bool:
    """Whether others used the CPUs while the row was timed."""
    return max(row["foreign"] or 0.0, row["steal"] or 0.0) > DISTURBED


def bound(row: Row, result: dict[str, Any], name: str) -> Bound | None:
    """The least time the machine allows: ours by its instruction set, others by the best."""
    if not result["limits"]:
        return None
    limits = Limits.from_dict(result["limits"])
    precision = peers.PRECISIONS[row["precision"]]
    operations, nbytes = 2 * row["m"] * row["k"] * row["n"], row["k"] * row["n"]
    nbytes = int(nbytes * precision.weight_bytes)
    isa = result["machine"]["isa"] if name == peers.OURS and precision.kind == "int8" else None
    try:
        hot = limits.bound(operations, nbytes, precision.kind, row["threads"], isa)
        if not row["cold"]:
            return hot
        memory = nbytes / (limits.bandwidth(1 << 60, row["threads"]) * 1e9)
        if memory <= hot.seconds:
            return hot
        return Bound(memory, "DRAM", operations / memory / 1e9)
    except LookupError:
        return None


def table(rows: Iterable[list[str]]) -> str:
    """Markdown; all columns but the last two to the right."""
    head, *body = rows
    align = ["---:"] * (len(head) - 2) + ["---", "---"]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, align, *body])


def compared(result: dict[str, Any], cold: bool = False) -> list[Row]:
    """Rows that have ours and a peer, the worst ratio first."""
    found = [r for r in result["rows"] if r["cold"] is cold and ratio(r) is not None]
    return sorted(found, key=lambda r: ratio(r) or 0.0)


def full(result: dict[str, Any], rows: Iterable[Row]) -> str:
    """One line a row, all peers in it."""
    head = ["ratio", "K × N", "M", "threads", "ours, µs", "of the limit", "precision"]
    lines = [[*head, "peers, µs, the best first"]]
    for row in rows:
        ours, limit = row["entries"][peers.OURS], bound(row, result, peers.OURS)
        others = sorted(
            ((n, e["us"]) for n, e in row["entries"].items() if n != peers.OURS),
            key=lambda item: item[1],
        )
        value = ratio(row)
        reached = "" if limit is None else f"{limit.seconds * 1e6 / ours['us']:.0%} {limit.by}"
        lines.append(
            [
                f"{value:.2f}{MARK if disturbed(row) else ''}",
                f"{row['k']} × {row['n']}",
                str(row["m"]),
                str(row["threads"]),
                microseconds(ours["us"]),
                reached,
                row["precision"] + (", cold" if row["cold"] else ""),
                "; ".join(f"{name} {microseconds(us)}" for name, us in others),
            ]
        )
    return table(lines)


def worst(result: dict[str, Any], count: int) -> str:
    """The beginning of the table."""
    rows = [r for r in result["rows"] if ratio(r) is not None]
    return full(result, sorted(rows, key=lambda r: ratio(r) or 0.0)[:count])


def summary(result: dict[str, Any]) -> str:
    """By precision and threads: the worst and the median ratio, and how often ours is ahead."""
    lines = [["rows", "ahead", "worst", "median", "best", "threads", "precision"]]
    for cold in (False, True):
        for precision in peers.PRECISIONS:
            rows = [r for r in compared(result, cold) if r["precision"] == precision]
            for threads in sorted({r["threads"] for r in rows}):
                values = [v for r in rows if r["threads"] == threads and (v := ratio(r))]
                lines.append(
                    [
                        str(len(values)),
                        str(sum(v >= 1 for v in values)),
                        f"{min(values):.2f}",
                        f"{statistics.median(values):.2f}",
                        f"{max(values):.2f}",
                        str(threads),
                        precision + (", cold" if cold else ""),
                    ]
                )
    return table(lines)


def limits_table(result: dict[str, Any]) -> str:
    """What the machine could do."""
    limits = Limits.from_dict(result["limits"])
    counts = sorted({p.threads for p in limits.peaks})
    lines = [["1 thread" if c == 1 else f"{c} threads" for c in counts] + ["unit", "limit"]]
    for isa in dict.fromkeys(p.isa for p in limits.peaks):
        for kind in dict.fromkeys(p.kind for p in limits.peaks if p.isa == isa):
            found = {p.threads: p.gops for p in limits.peaks if (p.isa, p.kind) == (isa, kind)}
            cells = [f"{found[c]:,.0f}" if c in found else "–" for c in counts]
            lines.append([*cells, "GOPS", f"{kind}, {isa}"])
    for size in sorted({r.nbytes for r in limits.reads}):
        rates = {r.threads: r.gbs for r in limits.reads if r.nbytes == size}
        cells = [f"{rates[c]:,.0f}" if c in rates else "–" for c in counts]
        amount = f"{size / 2**20:.3g} MiB" if size >= 1 << 20 else f"{size / 2**10:.3g} KiB"
        levels = "/".join(dict.fromkeys(limits.level(size, c) for c in counts))
        lines.append([*cells, "GB/s", f"reading {amount}, {levels}"])
    return table(lines)


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    spoiled = sum(disturbed(r) for r in result["rows"])
    parts = [
        "# Linear layers: every precision, every shape, beside every peer",
        "Written by `python benchmarks/bench_linear.py --docs`. All libraries take turns in one "
        "process, in changing order, each with packed weights of its own, and each result is "
        "compared with float32 before it is "
        "timed. Times are medians, in µs a call from Python. **ratio** is the best peer's time "
        "divided by ours (zeropoint): above 1, ours is faster. **of the limit** is the least time "
        "that this CPU allows, divided by ours, with what sets it: its arithmetic (compute), or "
        "reading the weights once from the level of cache they lie in.",
        f"{machine['cpu']}, {machine['cpus']} CPUs, kernel {machine['isa']} "
        f"({', '.join(machine['features'])}); {machine['system']}; Python {machine['python']}, "
        f"{versions}.",
        f"{len(result['rows'])} rows; {spoiled} of them, marked {MARK}, were timed while other "
        f"processes or machines took more than {DISTURBED:.0%} of a CPU.",
    ]
    parts += [f"{name} took no part: {why}." for name, why in result["absent"].items()]
    parts += ["## In short", summary(result)]
    parts += ["![Roofline: attained operations a second against operations a byte](roofline.svg)"]
    if result["limits"]:
        parts += ["## What this machine could do", limits_table(result)]
    for cold, title in ((False, "## All rows"), (True, "## Weights out of the caches")):
        rows = compared(result, cold)
        if rows:
            parts += [title, full(result, rows)]
    excluded = _left(result)
    if excluded:
        parts += ["## Not timed", excluded]
    return "\n\n".join(parts) + "\n"


def _left(result: dict[str, Any]) -> str:
    """Peers that failed, by reason, with where."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for row in result["rows"]:
        for name, reason in row["left"].items():
            kind = "too slow" if reason.startswith("slow") else reason
            kind = "wrong result" if reason.startswith("wrong: relative") else kind
            key = (name, row["precision"], kind.replace("|", "/"))
            places.setdefault(key, []).append(f"{row['k']} × {row['n']}, M {row['m']}")
    lines = [["rows", "peer", "precision and why"]]
    for (name, precision, reason), where in places.items():
        lines.append([str(len(where)), name, f"{precision}: {reason} (first at {where[0]})"])
    return table(lines) if places else ""


def microseconds(us: float) -> str:
    """Three digits or more."""
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}"
