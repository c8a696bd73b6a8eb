"""bench: what is timed is right and complete; speed itself is not tested here."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from rich.console import Console

from zeropoint import bench, kernels
from zeropoint.bench import OURS, TORCH, Result, Timing


def run(**more: Any) -> list[Result]:
    more = {"shapes": [(32, 48)], "rows": [1, 3], "seconds": 0.001} | more
    return list(bench.bench(**more))


def test_every_combination_in_order_with_every_candidate() -> None:
    results = run(shapes=[(32, 48), (16, 8)], rows=[1, 3], threads=[1])
    assert [(r.in_features, r.out_features, r.rows) for r in results] == [
        (32, 48, 1),
        (32, 48, 3),
        (16, 8, 1),
        (16, 8, 3),
    ]
    for r in results:
        expected = [name for name in TORCH + OURS if name not in r.notes]
        assert list(r.timings) == expected
        assert set(OURS) <= set(r.timings)
        for name, t in r.timings.items():
            assert 0 < t.low <= t.median <= t.high
            assert t.rounds >= 5
            assert t.sqnr > (199 if name == "torch float32" else 30), name
    json.dumps([r.to_dict() for r in results], allow_nan=False)


def test_ratio_is_peer_over_ours() -> None:
    def timing(median: float) -> Timing:
        return Timing(median, median, median, 5, 40.0)

    r = Result(1, 1, 1, 1, {"torch float32": timing(6.0), "int8-dynamic": timing(2.0)}, {})
    assert r.ratio("int8-dynamic", "torch float32") == 3.0
    assert r.ratio("int8-dynamic", "torch bfloat16") is None
    assert r.to_dict()["ratios"] == {"int8-dynamic": {"torch float32": 3.0}}


def test_all_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    x = torch.zeros(1)

    def candidate(name: str) -> Any:
        return lambda _: lambda: (order.append(name), x + 1)[1]

    candidates = {name: candidate(name) for name in ("torch float32", "b", "c")}
    monkeypatch.setattr(bench, "_turn", lambda call, count: (call(), 1.0)[1])
    timings, _ = bench._time(candidates, 1, 1, 1, 0.0)
    # After preparing and warming up: in each round everyone once, not always in the same order.
    rounds = [order[at : at + 3] for at in range(len(order) - 15, len(order), 3)]
    assert all(sorted(r) == ["b", "c", "torch float32"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert timings["b"].median == 1e6


def test_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = bench.QuantizedLinear.forward
    monkeypatch.setattr(
        bench.QuantizedLinear,
        "forward",
        lambda self, x: -wrong(self, x) if self.mode == "static" else wrong(self, x),
    )
    (result,) = run(rows=[2])
    assert "int8-static" not in result.timings
    assert "wrong" in result.notes["int8-static"]
    assert "int8-dynamic" in result.timings


def test_torch_without_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise AttributeError("module 'torch' has no attribute 'quantize_per_channel'")

    monkeypatch.setattr(torch, "quantize_per_channel", gone)
    (result,) = run(rows=[2])
    assert "torch int8 dynamic" not in result.timings
    assert "quantize_per_channel" in result.notes["torch int8 dynamic"]
    assert result.ratio("int8-dynamic", "torch int8 dynamic") is None


def test_reference_is_not_timed_where_that_takes_minutes() -> None:
    with kernels.force_isa("reference"):
        (result,) = run(shapes=[(2048, 4096)], rows=[4], seconds=0.001)
    assert not set(OURS) & set(result.timings)
    assert set(OURS) <= set(result.notes)
    assert "torch float32" in result.timings


def test_threads_are_set_and_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = [
            (result.threads, torch.get_num_threads())
            for result in bench.bench([(8, 8)], [1], [2, 1], seconds=0.001)
        ]
        assert seen == [(2, 2), (1, 1)]
        assert torch.get_num_threads() == 3
        next(bench.bench([(8, 8)], [1], [2], seconds=0.001))  # given up halfway
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_random_numbers_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    run()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("shapes", [(0, 4)]),
        ("shapes", []),
        ("rows", [0]),
        ("rows", []),
        ("threads", [0]),
        ("seconds", 0.0),
    ],
)
def test_numbers_that_are_not_positive(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        run(**{argument: value})


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert math.isclose(bench._sqnr(x, x + torch.tensor([0.0, 0.5])), 20.0)
    assert math.isclose(bench._sqnr(x, x), 200.0)
    assert not bench._sqnr(x, x * torch.nan) >= bench.MIN_SQNR


def test_table_shows_missing_candidates_as_a_dash() -> None:
    t = Timing(1234.5, 1.0, 2000.0, 5, 40.0)
    r = Result(384, 1536, 16, 2, {"torch float32": t, "int8-dynamic": t}, {})
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(bench.table([r]))
    text = console.export_text()
    assert "384 × 1536" in text
    assert "1,234" in text
    assert "1.00" in text
    assert "–" in text
