"""limits: what is measured is plausible and complete, and what is made of it is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from zeropoint import kernels, limits
from zeropoint.limits import Limits, Peak, Read

needs_core = pytest.mark.skipif(not limits.available(), reason="the core is not built")

# Operations of one instruction; of a pair of them where the products are made by two.
OPERATIONS = {
    ("avx2", "float32"): 16,
    ("avxvnni", "float32"): 16,
    ("avx512vnni", "float32"): 32,
    ("amx", "float32"): 32,
    ("avx2", "int8"): 32,
    ("avxvnni", "int8"): 64,
    ("avx512vnni", "int8"): 128,
}
MADE = Limits(
    peaks=(
        Peak("wide", "int8", 1, 1000.0),
        Peak("wide", "float32", 1, 200.0),
        Peak("wide", "bfloat16", 1, 100.0),
        Peak("narrow", "int8", 1, 250.0),
        Peak("wide", "int8", 2, 2000.0),
    ),
    reads=(
        Read(1 << 10, 1, 80.0),
        Read(1 << 20, 1, 100.0),
        Read(1 << 30, 1, 10.0),
        Read(1 << 20, 2, 200.0),
    ),
    caches={"L1": 1 << 15, "L2": 1 << 20, "L3": 1 << 25},
    shared=("L3",),
)


@needs_core
def test_every_instruction_set_and_size_is_measured() -> None:
    found = limits.measure([1, 2], sizes=[1 << 14, 1 << 16], seconds=0.0005)
    isas = {isa for isa in kernels.available_isas() if isa != kernels.REFERENCE}
    for threads in (1, 2):
        for kind in ("int8", "float32"):
            assert {p.isa for p in found.peaks if (p.kind, p.threads) == (kind, threads)} == isas
        assert [r.nbytes for r in found.reads if r.threads == threads] == [1 << 14, 1 << 16]
    assert all(p.gops > 0.01 for p in found.peaks)
    # Two such instructions a cycle is the most there is, and no clock has 6 GHz: a loop in which
    # the compiler found something to save would exceed that.
    for p in found.peaks:
        if (p.isa, p.kind) in OPERATIONS:
            assert p.gops < OPERATIONS[p.isa, p.kind] * 2 * 6 * p.threads, p
    assert all(0.01 < r.gbs < 1e5 for r in found.reads)
    assert Limits.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@needs_core
def test_work_grows_with_rounds() -> None:
    core = kernels.core
    assert core is not None
    for isa in kernels.available_isas():
        if isa == kernels.REFERENCE:
            continue
        for code in limits.KINDS.values():
            once = core.limit_compute(isa, code, 1)
            assert core.limit_compute(isa, code, 10) == 10 * once
            assert once >= 0
    with pytest.raises(ValueError, match="isa"):
        core.limit_compute("reference", 0, 1)


@needs_core
@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("isa", {"isas": ["mmx"]}),
        ("threads", {"threads": [0]}),
        ("sizes", {"sizes": [0]}),
        ("seconds", {"seconds": 0.0}),
    ],
)
def test_what_makes_no_sense_is_refused(what: str, more: dict) -> None:
    with pytest.raises(ValueError, match=what):
        limits.measure(**({"threads": [1], "sizes": [4096], "seconds": 0.001} | more))


def test_without_the_core_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "core", None)
    with pytest.raises(RuntimeError, match="core"):
        limits.measure([1])


def test_peak_is_of_the_instruction_set_or_the_best() -> None:
    assert MADE.peak("int8", 1) == 1000.0
    assert MADE.peak("int8", 1, "narrow") == 250.0
    # Slower than float32 can do the same, so nobody would use it.
    assert MADE.peak("bfloat16", 1) == 200.0
    with pytest.raises(LookupError):
        MADE.peak("float32", 2)


def test_bandwidth_is_that_of_the_next_smaller_size_and_never_rises() -> None:
    assert MADE.bandwidth(1 << 10, 1) == 100.0  # the smaller block was disturbed
    assert MADE.bandwidth((1 << 30) - 1, 1) == 100.0
    assert MADE.bandwidth(1 << 40, 1) == 10.0
    assert MADE.bandwidth(1, 2) == 200.0
    with pytest.raises(LookupError):
        MADE.bandwidth(1, 4)


def test_level_counts_private_caches_once_a_thread() -> None:
    assert MADE.level(1 << 15, 1) == "L1"
    assert MADE.level(1 << 16, 1) == "L2"
    assert MADE.level(1 << 16, 2) == "L1"
    assert MADE.level(1 << 26, 2) == "DRAM"


def test_bound_is_the_slower_of_computing_and_reading() -> None:
    few = MADE.bound(1e6, 1 << 20, "int8", 1)
    assert few.by == "L2"
    assert few.seconds == pytest.approx((1 << 20) / 100e9)
    many = MADE.bound(1e9, 1 << 20, "int8", 1)
    assert (many.by, many.seconds, many.gops) == ("compute", pytest.approx(1e-3), 1000.0)
    assert MADE.bound(1e9, 1 << 20, "int8", 1, "narrow").seconds == pytest.approx(4e-3)


def test_caches_are_read_from_the_system(tmp_path: Path) -> None:
    for index, (level, kind, size, cpus) in enumerate(
        [
            ("1", "Data", "48K", "0"),
            ("1", "Instruction", "64K", "0"),
            ("2", "Unified", "2M", "0"),
            ("3", "Unified", "32768K", "0-1"),
        ]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (
            ("level", level),
            ("type", kind),
            ("size", size),
            ("shared_cpu_list", cpus),
        ):
            (folder / name).write_text(text + "\n")
    expected = {"L1": 48 << 10, "L2": 2 << 20, "L3": 32 << 20}
    assert limits._caches(tmp_path) == (expected, ("L3",))
    assert limits._caches(tmp_path / "nothing") == ({}, ())


def test_threads_run_at_the_same_time_and_their_work_adds_up() -> None:
    seen: list[int] = []
    work, took = limits._together(lambda index, rounds: seen.append(index) or rounds, 7, 3)
    assert sorted(seen) == [0, 1, 2]
    assert work == 21
    assert took >= 0


def test_tables_show_every_number() -> None:
    console = Console(width=200, record=True)
    for table in limits.table(MADE):
        console.print(table)
    text = console.export_text()
    for part in ("wide", "narrow", "1,000", "2,000", "1 KiB", "1 GiB", "DRAM", "100.0"):
        assert part in text
