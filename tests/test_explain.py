"""What explain says of values, against the equation and against what quantizing them gives."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zeropoint
from zeropoint import Linear, PerChannel, QuantizedLinear, QuantSpec, explain
from zeropoint.explain import SHOWN, Grid
from zeropoint.explain.text import number_line
from zeropoint.spec import int4
from zeropoint.terminal import plain_text

finite = st.floats(-1e6, 1e6, width=32)


def test_the_example_everyone_starts_with() -> None:
    e = explain([-1.0, 0.0, 2.5], scale=0.5, zero_point=10)
    assert [v.integer for v in e.values] == [8, 10, 15]
    assert [v.dequantized for v in e.values] == [-1.0, 0.0, 2.5]
    assert [v.error for v in e.values] == [0.0, 0.0, 0.0]
    assert [v.bound for v in e.values] == [0.25] * 3
    assert (e.grid.lowest, e.grid.highest) == (-5.0, 122.5)
    assert not e.chosen


def test_larger_scale_is_coarser() -> None:
    x = torch.linspace(-1, 1, 1001)
    fine, coarse = (explain(x, scale=s, zero_point=128) for s in (0.01, 0.04))
    assert coarse.totals.integers_used < fine.totals.integers_used
    assert coarse.totals.largest_error > fine.totals.largest_error
    assert coarse.totals.rms_error == pytest.approx(coarse.totals.expected_rms, rel=0.05)


@given(st.lists(finite, min_size=1, max_size=30), st.floats(1e-5, 1e3), st.integers(0, 255))
def test_no_error_is_above_its_bound(values: list[float], scale: float, zero_point: int) -> None:
    e = explain(values, scale=scale, zero_point=zero_point)
    for v in e.values:
        assert v.error == v.dequantized - v.real
        assert abs(v.error) <= v.bound + e.grid.scale / 2 / 8000 + 1e-9 * abs(v.real)
        assert v.clipped == (v.bound > e.grid.scale / 2)
        if v.clipped:
            assert v.integer == (0 if v.real < e.grid.lowest else 255)


@given(st.lists(finite, min_size=1, max_size=30))
def test_real_zero_is_exactly_the_zero_point_of_a_chosen_scale(values: list[float]) -> None:
    e = explain([*values, 0.0])
    assert e.chosen
    assert e.grid.real(e.grid.zero_point) == 0
    zeros = e.reals == 0
    assert (e.integers[zeros] == e.grid.zero_point).all()
    assert e.totals.clipped == 0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_those_of_quantizing(signed: bool, symmetric: bool) -> None:
    spec = QuantSpec(signed=signed, symmetric=symmetric, granularity=PerChannel(0))
    x = torch.randn(5, 9) * torch.tensor([[1.0], [3.0], [0.1], [10.0], [2.0]])
    q = zeropoint.quantize_to_spec(x, spec)
    for channel in range(5):
        e = explain(x, spec, channel=channel)
        assert torch.equal(e.integers, q.int_repr()[channel].int())
        assert torch.equal(e.dequantized, q.dequantize()[channel])
        assert e.grid.scale == float(q.scale[channel])
        assert e.spec == spec
        assert [v.index for v in e.values] == [(channel, k) for k in range(9)]
    e = explain(x, spec)
    assert e.grid.label == "channel 3"
    assert [g.scale for g in e.others] == [float(q.scale.sort()[0][n]) for n in (0, 2, 4)]
    error = (q.dequantize().double() - x.double()).abs()
    assert e.totals.elements == 45
    assert e.totals.largest_error == pytest.approx(float(error.max()), rel=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width(bits: int) -> None:
    x = torch.linspace(0, 1, 1201)
    e = explain(x, QuantSpec(bits=bits, signed=False, symmetric=False))
    assert e.grid.levels == e.totals.integers_used == 2**bits
    assert 0.8 * e.grid.scale / 2 < e.totals.largest_error <= 1.001 * e.grid.scale / 2
    given = explain(x, e.spec, scale=e.grid.scale, zero_point=e.grid.zero_point)
    assert torch.equal(given.integers, e.integers)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups(symmetric: bool) -> None:
    spec = int4(group=8, symmetric=symmetric)
    layer = Linear(20, 3)
    with torch.no_grad():
        layer.weight[1, 17] = 4.0
    q = zeropoint.quantize_to_spec(layer.weight, spec)
    e = explain(layer, spec)
    assert e.grid.label == "channel 1, group 2"  # the coarsest
    assert e.grids == 9
    assert torch.equal(e.integers, q.int_repr()[1, 16:20].int())
    assert torch.equal(e.dequantized, q.dequantize()[1, 16:20])
    assert [v.index for v in e.values] == [(1, k) for k in range(16, 20)]
    e = explain(layer, spec, channel=2, group=0)
    assert (e.grid.label, e.grid.scale) == ("channel 2, group 0", float(q.scale[2, 0]))
    assert torch.equal(e.integers, q.int_repr()[2, :8].int())
    assert explain(layer, spec, channel=0).grid.scale == float(q.scale[0].max())
    twin = explain(QuantizedLinear.from_linear(layer, weight_spec=spec), channel=2, group=0)
    assert torch.equal(twin.dequantized, e.dequantized)
    error = (q.dequantize().double() - layer.weight.detach().double()).abs()
    assert e.totals.largest_error == float(error.max())
    one = explain([1.0, 2.0, 30.0], int4(group=2), scale=1.0, zero_point=0, group=1)
    assert one.integers.tolist() == [15]
    assert one.totals.clipped == 1


def test_scale_given_per_channel() -> None:
    spec = QuantSpec(granularity=PerChannel(1))
    x = torch.tensor([[1.0, 1.0], [2.0, -4.0]])
    e = explain(x, spec, scale=torch.tensor([0.5, 2.0]), channel=0)
    assert e.integers.tolist() == [2, 4]
    assert explain(x, spec, scale=torch.tensor([0.5, 2.0])).integers.tolist() == [0, -2]


def test_zero_point_by_default_begins_at_the_smallest_value() -> None:
    assert explain([-3.0, 1.0], scale=0.5).grid.zero_point == 6
    assert explain([3.0, 1.0], scale=0.5).grid.zero_point == 0
    assert explain([-1e9, 1.0], scale=0.5).grid.zero_point == 255
    assert explain([-3.0], QuantSpec(signed=True), scale=0.5).grid.zero_point == 0


def test_many_values_show_a_few_from_smallest_to_largest() -> None:
    x = torch.randn(100)
    e = explain(x)
    reals = [v.real for v in e.values]
    assert len(reals) == SHOWN
    assert reals == sorted(reals)
    assert (reals[0], reals[-1]) == (float(x.min()), float(x.max()))
    assert all(float(x[v.index]) == v.real for v in e.values)
    assert f"{SHOWN} of 100" in str(e)


def test_layer_and_its_quantized_twin() -> None:
    layer = Linear(32, 6)
    e = explain(layer, name="fc")
    twin = explain(QuantizedLinear.from_linear(layer), name="fc")
    assert torch.equal(e.integers, twin.integers)
    assert e.grid == twin.grid
    assert twin.reals is None
    assert twin.totals.largest_error is None
    assert {v.error for v in twin.values} == {None}
    assert twin.values[0].bound == twin.grid.scale / 2
    assert "fc, 6 × 32" in str(e)
    assert "neither is the error" in " ".join(str(twin).split())


@pytest.mark.parametrize(
    ("values", "extra", "message"),
    [
        ([], {}, "at least one"),
        ([1.0, math.nan], {}, r"nan at index \(1,\)"),
        ([math.inf], {}, "finite"),
        ([1e300], {}, "finite in float32"),
        ([1.0], {"zero_point": 3}, "zero_point must be given with scale"),
        ([1.0], {"scale": 0.0}, "scale must be positive"),
        ([1.0], {"scale": 1.0, "zero_point": 256}, "zero_point must be within"),
        ([1.0], {"channel": 0}, "without channels"),
        ([1.0], {"group": 0}, "without groups"),
        (Linear(2, 3), {"channel": -1}, "from 0 to 2"),
        (Linear(5, 3), {"spec": int4(group=2), "group": 3}, "from 0 to 2"),
        (1.0, {"spec": int4(group=2), "scale": 1.0}, "dimension"),
        ([1.0], {"spec": QuantSpec(granularity=PerChannel(1))}, "axis 1"),
        (Linear(2, 3), {"channel": 3}, "from 0 to 2"),
    ],
)
def test_what_does_not_fit(values: object, extra: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(values, **extra)


@pytest.mark.parametrize("values", ["abc", object(), torch.tensor([1j])])
def test_no_numbers(values: object) -> None:
    with pytest.raises(TypeError, match="values must be"):
        explain(values)


def test_spec_of_integers_is_their_own() -> None:
    q = zeropoint.quantize_per_tensor(torch.ones(2), 0.5, 3, torch.uint8)
    assert explain(q).grid == Grid(0.5, 3, 0, 255)
    with pytest.raises(ValueError, match="have their own"):
        explain(q, scale=0.5)


def test_one_number_and_only_zero() -> None:
    assert explain(torch.tensor(3.0)).values[0].index == ()
    e = explain([0.0, 0.0])
    assert e.totals.sqnr_db == math.inf
    assert "no error" in str(e)


def test_json_has_every_field_and_no_infinity() -> None:
    e = explain([0.0, 1.0], scale=0.5, zero_point=0)
    data = json.loads(e.to_json(), parse_constant=lambda c: pytest.fail(c))
    assert data["totals"]["sqnr_db"] is None
    assert data["grid"] == {
        "scale": 0.5, "zero_point": 0, "qmin": 0, "qmax": 255, "label": "",
        "lowest": 0.0, "highest": 127.5, "levels": 256,
    }  # fmt: skip
    assert [v["integer"] for v in data["values"]] == [0, 2]


# The number line


def line(e: zeropoint.Explanation) -> dict[str, str]:
    rows = number_line(e, 85).split("\n")
    return {row[:11].strip(): row[11:] for row in rows}


def test_number_line_puts_values_over_their_integers() -> None:
    rows = line(explain([-1.0, 0.0, 2.4], scale=0.5, zero_point=10))
    zero = rows["grid"].index("0")
    assert rows["values"][zero] == "b"
    assert rows["grid"][rows["values"].index("a")] == "+"
    assert rows["grid"][rows["values"].index("c")] == "-"  # 2.4 lies between two reals
    assert rows["q"][zero - 1 : zero + 2].strip() == "10"
    assert rows["q"].split() == [str(q) for q in range(7, 17)]
    assert rows["real"].split()[3] == "0"


def test_number_line_outside_of_the_range_is_blank() -> None:
    rows = line(explain([-5.0, 1.0, 9.0], QuantSpec(signed=True), scale=0.02))
    assert rows["grid"][rows["values"].index("a")] == " "
    assert len(rows["grid"]) < rows["values"].index("c")
    assert set(rows["grid"].strip()) == {"=", "0"}


@given(st.lists(finite, min_size=1, max_size=40), st.integers(20, 120))
def test_text_takes_any_values(values: list[float], width: int) -> None:
    e = explain(values)
    rows = number_line(e, width).split("\n")
    assert len({row[:11] for row in rows}) == 4
    assert all(len(row) <= max(width, 37) for row in rows)
    assert "0" in rows[1]
    assert plain_text(e, width)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot_is_written_whole(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"plot.{ending}"
    explain([-9.0, 0.2, 2.5, 400.0], scale=0.5, zero_point=10).to_plot(path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    if ending == "svg":
        assert "clipped" in path.read_text("utf-8") or "<path" in path.read_text("utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_plot_of_a_quantized_layer_and_of_many_values(tmp_path: Path) -> None:
    for e in (
        explain(QuantizedLinear.from_linear(Linear(64, 8)), name="$x_2$"),
        explain(torch.randn(3000)),
        explain([1e-30, 1e30]),
    ):
        e.to_plot(tmp_path / "p.png")


def test_plot_of_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must end in one of"):
        explain([1.0]).to_plot(tmp_path / "p.txt")
    assert list(tmp_path.iterdir()) == []
