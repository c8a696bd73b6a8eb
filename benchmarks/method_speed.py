"""How fast models run, one of each form: all take turns, and ratios of medians are what counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

import method_quality
from linear_timing import Foreign
from method_subjects import Call, Subject
from model_peers import Contender, ModelPeer
from tools import machine
from zeropoint.atomic import write_text
from zeropoint.interleave import interleave
from zeropoint.running import model_bytes


def contenders(
    subject: Subject, rows: list[method_quality.Row], peers: list[ModelPeer], folder: Path
) -> dict[str, Contender]:
    """A model of each form among the rows, by form: from its checkpoint, or a peer's."""
    by_name = {peer.name: peer for peer in peers}
    found: dict[str, Contender] = {}
    for row in rows:
        if row.form in found:
            continue
        if row.title in by_name:
            found[row.form] = by_name[row.title].prepare(subject, folder)
        elif row.title == method_quality.FLOAT or (
            method_quality.checkpoint(folder, row.title).exists()
        ):
            model = method_quality.load(subject, folder, row.title)
            found[row.form] = Contender(
                model_bytes(model),
                lambda model=model: subject.scores(model),
                lambda threads, model=model: subject.calls(model),
            )
    return found


def time_all(
    subject: Subject, ready: dict[str, Contender], threads: int, seconds: float
) -> dict[str, Any]:
    """Time every case, about so many seconds a case and contender.

    Returns:
        As JSON types: the machine, threads, and by case the CPUs that others took meanwhile and by
        form the median µs of a call, its quartiles and how many calls were timed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            calls = {form: contender.calls(threads) for form, contender in ready.items()}
            cases = {c.name: _case(subject, c.name, calls, seconds) for c in subject.cases}
        return {"machine": machine(), "threads": threads, "cases": cases}
    finally:
        torch.set_num_threads(before)


def _case(
    subject: Subject, case: str, calls: dict[str, dict[str, Call]], seconds: float
) -> dict[str, Any]:
    print(f"{subject.name}: timing {case}", file=sys.stderr, flush=True)
    foreign = Foreign()
    times = interleave({form: by_case[case] for form, by_case in calls.items()}, seconds)
    found = {}
    for form, samples in times.items():
        low, middle, high = quantiles(samples, n=4, method="inclusive")
        found[form] = {"us": middle, "low": low, "high": high, "n": len(samples)}
    return {"forms": found, **foreign.share()}


def write(folder: Path, speeds: dict[str, Any]) -> None:
    """Keep them beside the rows."""
    write_text(folder / "speed.json", json.dumps(speeds, ensure_ascii=False, indent=1))


def read(folder: Path) -> dict[str, Any] | None:
    """As they were measured last."""
    file = folder / "speed.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
