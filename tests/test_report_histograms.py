"""Histograms of weights and activations, the integers they become, and their small pictures."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zeropoint
from twins import fast, quantized
from zeropoint import Linear, QuantizedLinear
from zeropoint.input_transform import walsh_hadamard
from zeropoint.report import Grid, Histogram, Integers, pictures
from zeropoint.report import histograms as h
from zeropoint.spec import int4


def test_weights_over_the_finest_and_coarsest_grid() -> None:
    model = nn.Sequential(*(Linear(16, 16) for _ in range(3)))
    with torch.no_grad():
        model[1].weight[2, 5] = 40.0
        model[1].weight[7] *= 1e-3
    report = fast(model, quantized(model), [torch.randn(8, 16)])
    assert all(x.histogram is not None for x in report.layers)
    found = report.layers[1].histogram
    assert found is not None
    assert sum(found.counts) == 256
    assert len(found.edges) == len(found.counts) + 1 <= h.BINS + 1
    assert found.edges[-1] == 40
    assert [g.label for g in found.grids][::2] == ["finest, channel 7", "coarsest, channel 2"]
    assert found.grids[-1].scale == pytest.approx(40 / 127, rel=0.01)
    integers = report.layers[1].integers
    assert integers is not None
    assert integers.qmin == -128
    assert sum(integers.counts) == 256
    assert integers.counts[-1] + integers.counts[1] >= 16  # of each channel the largest at ±127


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight-only"])
def test_activations_and_their_integers(mode: str) -> None:
    layer = Linear(8, 4)
    x = torch.rand(30, 8) - 0.25
    options = {"input_qparams": (0.01, 25)} if mode == "static" else {}
    twin = QuantizedLinear.from_linear(layer, mode, **options)
    found = fast(layer, twin, [x[:10], x[10:]]).layers[0]
    assert found.inputs is not None
    assert sum(found.inputs.counts) == 240
    assert found.inputs.edges[0] == pytest.approx(float(x.min()), rel=1e-6)
    assert found.inputs.edges[-1] == pytest.approx(float(x.max()), rel=1e-6)
    if mode == "weight-only":
        assert found.input_integers is None
        return
    assert found.input_integers is not None
    assert sum(found.input_integers.counts) == 240
    if mode == "static":
        q = zeropoint.quantize_per_tensor(x, 0.01, 25, torch.uint8).int_repr()
        expected = torch.bincount(q.reshape(-1).long(), minlength=256)
        assert list(found.input_integers.counts) == expected.tolist()
        assert found.inputs.grids == (Grid("every value", found.inputs.grids[0].scale, 25, 0, 255),)
    else:
        # each row uses its whole range: rows that hold negatives and positives meet 0 and 255
        assert found.inputs.grids == ()
        assert found.input_integers.counts[255] >= 30


def test_rows_with_nan_are_left_out_and_large_calls_sampled(monkeypatch) -> None:
    monkeypatch.setattr(h, "_SAMPLE", 64)
    inputs = h.Inputs(QuantizedLinear.from_linear(Linear(8, 4)))
    x = torch.ones(100, 8)
    x[0, 3] = math.nan
    inputs.add(x)
    found = inputs.histogram()
    assert found is not None
    assert 0 < sum(found.counts) <= 2 * 64
    assert found.edges[0] < 1 < found.edges[-1]
    assert h.Inputs(inputs.layer).histogram() is None
    assert h.Inputs(inputs.layer).integers() is None


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=50))
def test_any_activations_make_an_ordered_histogram(values: list[float]) -> None:
    inputs = h.Inputs(QuantizedLinear.from_linear(Linear(1, 1), "weight-only"))
    inputs.add(torch.tensor(values)[:, None])
    found = inputs.histogram()
    assert found is not None
    assert sum(found.counts) == len(values)
    assert len(found.counts) <= h.BINS
    assert list(found.edges) == sorted(found.edges)
    assert found.edges[0] < found.edges[-1]
    picture = pictures.reals(found, "activations")
    assert "nan" not in picture.path


def test_layer_that_changes_its_input_is_shown_as_it_quantizes() -> None:
    layer = Linear(8, 4)
    factor = torch.rand(8) + 0.5
    changed = walsh_hadamard(layer.weight.detach() / factor, 8) / 8
    twin = QuantizedLinear.from_quantized(
        zeropoint.quantize_to_spec(changed, zeropoint.WEIGHT_INT8), layer.bias,
        input_factor=factor, rotation=8,
    )  # fmt: skip
    x = torch.randn(20, 8)
    found = fast(layer, twin, [x]).layers[0]
    assert found.weight.sqnr_db > 30
    assert found.alone.sqnr_db > 30
    assert found.histogram is not None
    assert found.histogram.edges[-1] == pytest.approx(float(changed.max()), rel=1e-4)
    assert found.inputs is not None
    seen = walsh_hadamard(x * factor, 8)
    assert found.inputs.edges[-1] == pytest.approx(float(seen.max()), rel=1e-4)
    assert found.input_integers is not None
    assert found.input_integers.counts[255] >= 20


def test_groups_of_four_bits() -> None:
    q = zeropoint.quantize_to_spec(torch.randn(3, 20), int4(group=8))
    grids = h._grids(q)
    assert [g.label.split(",")[0] for g in grids] == ["finest", "median", "coarsest"]
    assert all(re.search(r", channel [012], group [012]$", g.label) for g in grids)
    assert grids[0].scale == float(q.scale.min())
    assert grids[-1].scale == float(q.scale.max())
    assert {(g.qmin, g.qmax) for g in grids} == {(0, 15)}


# Pictures


def bars(path: str) -> list[tuple[int, int]]:
    """``(width, height)`` of each bar."""
    found, height = [], 0
    for step, text in re.findall(r"([hv])(-?\d+)", path):
        if step == "h":
            found.append((int(text), height))
        else:
            height -= int(text)
    return found


def test_outline_follows_the_counts() -> None:
    x = pictures.integers(Integers(-2, (0, 1, 1, 7)))
    assert x.path.startswith(f"M0 {pictures.HEIGHT}")
    assert x.path.endswith(f"V{pictures.HEIGHT}z")
    # 1 and 1 are one bar, the last is the highest
    low = round((pictures.HEIGHT - 4) * math.log(2) / math.log(8))
    assert bars(x.path) == [(1, 0), (2, low), (1, pictures.HEIGHT - 4)]
    assert x.width == 4
    assert (x.low, x.high) == ("−2", "1")
    assert "3 of the 4 integers" in x.caption
    assert "78 %" in x.caption


def test_a_single_value_is_seen_among_millions() -> None:
    x = pictures.integers(Integers(0, (1, 0, 0, 9_999_999)))
    assert bars(x.path)[0][1] >= 2


def test_comb_has_the_grid_s_steps_where_they_can_be_told_apart() -> None:
    coarse, fine = (
        Grid("coarsest, channel 1", 0.5, 2, 0, 3),
        Grid("finest, channel 0", 1e-3, 0, 0, 255),
    )
    x = pictures.reals(Histogram((-1.0, 0.0, 1.0), (3, 4), (fine, coarse)), "weights")
    first, second = x.combs
    unit = pictures.WIDTH / 2.08  # of one real, the margins counted
    assert second.step == pytest.approx(0.5 * unit, rel=1e-4)
    assert second.start == pytest.approx(0.04 * unit, abs=0.01)  # −1 is the integer 0
    assert second.end == pytest.approx(1.54 * unit, abs=0.01)
    assert first.step is None
    assert first.end - first.start == pytest.approx(0.255 * unit, abs=0.02)
    assert x.zero == 50
    assert "7 weights from −1 to 1" in x.caption


def test_where_nearly_all_values_lie() -> None:
    found = Histogram((0.0, 1.0, 2.0, 10.0), (990, 9, 1), ())
    assert pictures.narrowest(found) == pytest.approx(0.1)
