"""Timing in turn: every call as often as the others, bounded, and nothing left behind."""

import gc
import time

import pytest

from zeropoint.interleave import MIN_ROUNDS, interleave


def test_every_call_has_as_many_rounds():
    times = interleave({"a": lambda: None, "b": lambda: time.sleep(1e-4)}, seconds=0.02)
    assert len(times["a"]) == len(times["b"]) >= MIN_ROUNDS
    assert 100 <= sorted(times["b"])[0] < 100_000
    assert sorted(times["a"])[len(times["a"]) // 2] < 10


def test_turns_alternate():
    order = []
    interleave({n: lambda n=n: order.append(n) or time.sleep(3e-4) for n in "abc"}, 0.0)
    rounds = [order[i : i + 3] for i in range(len(order) - 3 * MIN_ROUNDS, len(order), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) >= 3


def test_rounds_are_bounded():
    assert len(interleave({"a": lambda: None}, seconds=60.0, max_rounds=7)["a"]) == 7
    assert len(interleave({"a": lambda: time.sleep(1e-3)}, seconds=0.0)["a"]) == MIN_ROUNDS
    assert interleave({}, seconds=1.0) == {}


def test_the_collector_is_off_meanwhile_and_on_afterwards():
    states = []

    def fail():
        states.append(gc.isenabled())
        if len(states) > 10_000:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interleave({"a": fail}, seconds=5.0)
    assert states[-1] is False
    assert gc.isenabled()
