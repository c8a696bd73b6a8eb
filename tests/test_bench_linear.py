"""bench_linear: every adapter computes the layer, and the tables say what was timed."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bench_linear
import linear_report
import linear_timing
import peers
import roofline
from peers import ggml

ARGUMENTS = ["--shapes", "64x96", "--rows", "1", "3", "--threads", "1", "--budget", "0.01"]


def run(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str, peers_: str = "torch"
) -> dict[str, Any]:
    file = folder / "results.json"
    arguments = [*ARGUMENTS, "--json", str(file), "--peers", peers_, *more]
    monkeypatch.setattr(sys, "argv", ["bench_linear.py", *arguments])
    monkeypatch.setattr(bench_linear.limits, "SIZES", (1 << 14,))
    before = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        bench_linear.main()
    finally:
        torch.set_num_threads(before[0])
        torch.set_grad_enabled(before[1])
    return json.loads(file.read_text())


CASES, ABSENT = peers.available()
QUICK = [p for p in CASES if not p.slow]


@pytest.mark.parametrize("peer", QUICK, ids=lambda p: f"{p.name}, {p.precision}")
def test_adapter_computes_the_layer(peer: peers.Peer) -> None:
    generator = torch.Generator().manual_seed(0)
    k, n = 256, 96
    case = peers.Case(
        torch.randn(n, k, generator=generator) / k**0.5, torch.randn(n, generator=generator), 1
    )
    for m in (3, 1):
        x = torch.randn(m, k, generator=generator).clamp(-4, 4)
        prepared: dict[Any, Any] = {}
        with torch.no_grad():
            expected = F.linear(x, case.weight, case.bias)
            ready = bench_linear._ready(peer, case, m, x, expected, prepared)
        if isinstance(ready, str) and not ready.startswith("wrong"):
            pytest.skip(ready)
        assert not isinstance(ready, str), ready


@pytest.mark.parametrize("buffer", ["CPU", "CPU_REPACK", "AMX"])
def test_llama_cpp_multiplies_by_its_own_weights(buffer: str) -> None:
    """Nearer to the quantized weights than those are to the floats, which all adapters must be."""
    gguf = pytest.importorskip("gguf")
    reason = peers.llamacpp_.missing() or ggml.unusable(buffer)
    if reason:
        pytest.skip(reason)
    n, k = 96, 256
    case = peers.Case(torch.randn(n, k), torch.randn(n), 1)
    for kind in ("Q4_0", "Q4_K"):
        quantized = ggml.quantize(case.weight.numpy(), kind)
        weight = gguf.dequantize(quantized, gguf.GGMLQuantizationType[kind])
        layer = peers.llamacpp_._layer(case, 1, kind, buffer)
        for m in (1, 40):
            x = torch.randn(m, k)
            y = layer.floats(layer.run(layer.convert(x)))
            expected = F.linear(x, torch.from_numpy(weight), case.bias)
            assert float((y - expected).norm() / expected.norm()) < 0.02


def test_peer_that_ends_its_process_is_left_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "another_build.py"
    program.write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setattr(ggml, "__file__", str(program))
    ggml.unusable.cache_clear()
    assert "signal 4" in str(ggml.unusable(ggml.AMX))
    program.write_text("raise ValueError('no such buffer')")
    ggml.unusable.cache_clear()
    assert ggml.unusable(ggml.AMX) == "ValueError: no such buffer"
    ggml.unusable.cache_clear()


@pytest.mark.parametrize("foreign", [0.0, 0.5])
def test_peer_far_behind_is_not_tried_with_more_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, foreign: float
) -> None:
    """Unless others had the CPU: then nobody knows whose fault it was."""

    def prepare(case: peers.Case, rows: int) -> peers.Layer:
        def run(x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.03 * len(x))
            return F.linear(x, case.weight, case.bias)

        return peers.Layer(run)

    snail = peers.Peer("snail", "float32", prepare)
    monkeypatch.setattr(peers.torch_, "PEERS", [snail])
    share = {"foreign": foreign, "steal": 0.0}
    monkeypatch.setattr(linear_timing.Foreign, "share", lambda self: share)
    result = run(monkeypatch, tmp_path, "--precisions", "float32", "--rows", "1", "2", "3")
    tried = ["snail" in row["entries"] for row in result["rows"]]
    assert tried == [True, True, foreign > 0]
    if not foreign:
        assert "50 times the best" in result["rows"][2]["left"]["snail"]


def test_wrong_result_is_not_timed() -> None:
    def prepare(case: peers.Case, rows: int) -> peers.Layer:
        return peers.Layer(lambda x: -F.linear(x, case.weight, case.bias))

    case = peers.Case(torch.randn(4, 8), torch.randn(4), 1)
    x = torch.randn(2, 8)
    expected = F.linear(x, case.weight, case.bias)
    peer = peers.Peer("odd", "float32", prepare)
    assert "wrong" in str(bench_linear._ready(peer, case, 2, x, expected, {}))


def test_each_adapter_packs_for_itself() -> None:
    case = peers.Case(torch.randn(4, 8), torch.randn(4), 1)
    packings = [peers.torch_._pack(case, "fbgemm") for _ in range(2)]
    assert packings[0] is not packings[1]


def test_missing_library_is_left_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.onnxruntime_, "missing", lambda: "not here")
    found, absent = peers.available(["onnxruntime", "torch"])
    assert absent == {"onnxruntime": "not here"}
    assert {p.name.split()[0] for p in found} == {"zeropoint", "torch"}
    with pytest.raises(ValueError, match="libraries"):
        peers.available(["numpy"])


def test_run_covers_every_precision_and_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(monkeypatch, tmp_path)
    assert [(r["m"], r["precision"]) for r in first["rows"]] == [
        (m, p) for m in (1, 3) for p in peers.PRECISIONS
    ]
    for row in first["rows"]:
        assert peers.OURS in row["entries"]
        for entry in row["entries"].values():
            assert 0 < entry["low"] <= entry["us"] <= entry["high"]
            assert entry["n"] >= 3
    assert "ratio" in capsys.readouterr().out
    again = run(monkeypatch, tmp_path)
    assert again["rows"] == first["rows"]
    more = run(monkeypatch, tmp_path, "--shapes", "64x96", "32x32")
    assert more["rows"][: len(first["rows"])] == first["rows"]
    assert {r["k"] for r in more["rows"]} == {64, 32}


def test_file_of_another_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    content = {"version": bench_linear.VERSION, "machine": {"cpu": "another"}}
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="another machine, build"):
        run(monkeypatch, tmp_path)


def test_report_and_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page, plot = tmp_path / "page.md", tmp_path / "plot.svg"
    run(monkeypatch, tmp_path, "--markdown", str(page), "--plot", str(plot))
    text = page.read_text()
    for part in ("zeropoint", "torch", "64 × 96", "int8 weight-only bf16", "In short"):
        assert part in text
    first = plot.read_bytes()
    assert first.startswith(b"<?xml")
    assert b"</svg>" in first
    run(monkeypatch, tmp_path, "--report-only", "--plot", str(plot))
    assert plot.read_bytes() == first  # the same data give the same bytes


def row(ours: float, **others: float) -> dict[str, Any]:
    entries = {"zeropoint": {"us": ours}} | {n: {"us": us} for n, us in others.items()}
    return {
        "k": 64, "n": 96, "m": 2, "threads": 1, "cold": False, "precision": "float32",
        "entries": entries, "left": {}, "foreign": 0.0, "steal": 0.0,
    }  # fmt: skip


def test_ratio_is_the_best_peer_over_ours() -> None:
    assert linear_report.ratio(row(2.0, torch=6.0, other=3.0)) == 1.5
    assert linear_report.ratio(row(2.0)) is None
    rows = [row(1.0, torch=3.0), row(1.0, torch=0.5), row(1.0, torch=1.5)]
    result = {"rows": rows, "limits": None, "machine": {"isa": "x"}}
    values = [linear_report.ratio(r) for r in linear_report.compared(result)]
    assert values == [0.5, 1.5, 3.0]
    assert "| 3 | 2 | 0.50 | 1.50 | 3.00 |" in linear_report.summary(result)


def test_disturbed_rows_are_marked() -> None:
    quiet, busy = row(1.0, torch=1.0), row(1.0, torch=2.0)
    busy["foreign"] = 0.5
    text = linear_report.full({"limits": None}, [quiet, busy])
    assert "| 1.00 |" in text
    assert "| 2.00† |" in text


def test_foreign_load_is_noticed() -> None:
    if linear_timing.Foreign().start is None:
        pytest.skip("no /proc/stat here")
    times = iter([(0.0, 10.0, 4.0, 1.0), (2.0, 14.0, 7.0, 1.5)])
    watch = linear_timing.Foreign.__new__(linear_timing.Foreign)
    watch._now = lambda: next(times)  # type: ignore[method-assign]
    watch.start = watch._now()
    assert watch.share() == {"foreign": 0.5, "steal": 0.25}


def test_all_take_turns_in_changing_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(linear_timing.time, "perf_counter", lambda: next(ticks) * 1e-4)
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = linear_timing.in_turn(calls, dict.fromkeys(calls, 1e-4), 2e-3, settle=0.0)
    assert all(len(t.samples) >= linear_timing.ROUNDS for t in times.values())
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len({tuple(turns[i : i + 3]) for i in range(0, len(turns) - 2, 3)}) > 1


def test_a_call_that_was_disturbed_gets_another_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but a long call is given up after one round; what comes later is what counts."""
    now = [0.0]
    monkeypatch.setattr(linear_timing.time, "perf_counter", lambda: now[0])
    counts = dict.fromkeys(("quick", "disturbed", "slow"), 0)

    def call(name: str) -> None:
        counts[name] += 1
        took = {"quick": 1e-4, "slow": 0.06}.get(name)
        now[0] += took or (8e-3 if counts[name] <= 2 else 1e-4)

    calls = {name: functools.partial(call, name) for name in counts}
    estimates = {"quick": 1e-4, "disturbed": 8e-3, "slow": 0.06}
    times = linear_timing.in_turn(calls, estimates, 2e-2, settle=0.0)
    assert times["disturbed"].to_dict()["us"] == pytest.approx(100)
    assert len(times["disturbed"].samples) > linear_timing.ROUNDS
    assert len(times["slow"].samples) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_given_time_to_find_a_cpu_each(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each rest a call takes two ticks three times over; of one thread nothing excuses it."""
    now, since_rest = [0.0], [0]
    monkeypatch.setattr(linear_timing.time, "perf_counter", lambda: now[0])

    def call() -> None:
        since_rest[0] += 1
        now[0] += 8e-3 if since_rest[0] <= 3 else 1e-4

    def rest() -> None:
        since_rest[0] = 0

    times = linear_timing.in_turn(
        {"a": call}, {"a": 1e-4}, 2e-3, settle=1e-3, rest=rest, threads=threads
    )
    assert times["a"].to_dict()["us"] == pytest.approx(8000 if threads == 1 else 100)


@pytest.mark.parametrize("took", [0.02, 0.2])
def test_waiting_for_threads_ends(took: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that stays slower than it was is timed all the same."""
    now, counts = [0.0], [0]
    monkeypatch.setattr(linear_timing.time, "perf_counter", lambda: now[0])

    def call() -> None:
        counts[0] += 1
        now[0] += took

    times = linear_timing.in_turn({"a": call}, {"a": 1e-4}, 1e-3, settle=1e-3, threads=2)
    assert times["a"].to_dict()["us"] == pytest.approx(took * 1e6)
    assert counts[0] <= linear_timing.ROUNDS * (1 + linear_timing.GATHERING / took + 1)


def test_every_burst_begins_at_rest() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    rest = lambda: order.append("rest")  # noqa: E731
    linear_timing.in_turn(calls, dict.fromkeys(calls, 1e-4), 1e-4, settle=0.0, rest=rest)
    bursts = "".join(order).split("rest")[1:]
    assert len(bursts) == 2 * linear_timing.ROUNDS
    assert all(len(set(burst)) == 1 for burst in bursts)


def test_rest_lasts_as_long_as_threads_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"monotonic": 0.0, "process_time": 0.0}
    spins = 0.02

    def sleep(seconds: float) -> None:
        now["process_time"] += min(seconds, max(spins - now["monotonic"], 0.0))
        now["monotonic"] += seconds

    monkeypatch.setattr(linear_timing.time, "sleep", sleep)
    for name in now:
        monkeypatch.setattr(linear_timing.time, name, lambda name=name: now[name])
    linear_timing.until_idle()
    assert spins < now["monotonic"] < spins + 0.005
    now["monotonic"], spins = 0.0, 10.0
    linear_timing.until_idle()
    assert now["monotonic"] < 0.07


def test_cold_flushes_before_every_call() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    linear_timing.cold(calls, dict.fromkeys(calls, 1.0), 3, lambda: order.append("flush"))
    assert order[::2] == ["flush"] * 6
    assert sorted(order[1::2]) == ["a"] * 3 + ["b"] * 3


def test_intensity_counts_weights_inputs_and_outputs() -> None:
    assert roofline.intensity(row(1.0)) == pytest.approx(
        2 * 2 * 64 * 96 / (4 * (64 * 96 + 2 * 64 + 2 * 96))
    )
    assert roofline.library("torch fbgemm") == "torch"
    assert roofline.library("torchao compiled") == "torchao"
    assert roofline.library("llama.cpp Q4_0 AMX") == "llama.cpp"
