"""A report as JSON by its schema, as words and as a table in the terminal."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from twins import quantized
from zeropoint import Linear, Report, compare
from zeropoint.atomic import write_text
from zeropoint.report import Difference, Timing, schema, words


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(1)
    model = nn.Sequential(*(Linear(24, 24) for _ in range(5)), Linear(24, 3))
    with torch.no_grad():
        model[2].weight[0, 0] = 9.0
    twin = quantized(model, keep=("4",))
    return compare(model, twin, [torch.randn(4, 24)] * 2, lambda m: 0.5, repeats=2)


def test_json_follows_its_schema(report: Report, tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    path = tmp_path / "report.json"
    text = report.to_json(path)
    assert path.read_text("utf-8") == text
    data = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    jsonschema.validate(data, schema())
    # Every field that is written is described, and so every description is tried.
    assert set(data) == set(schema()["properties"])
    layer = schema()["properties"]["layers"]["items"]["properties"]
    assert all(set(x) == set(layer) for x in data["layers"])
    assert set(data["layers"][0]["alone"]) == set(schema()["$defs"]["difference"]["properties"])


def test_json_round_trip(report: Report) -> None:
    assert Report.from_dict(json.loads(report.to_json())) == report


@pytest.mark.parametrize(
    "data", [{}, {"schema_version": 2}, {"schema_version": 1}, {"schema_version": 1, "outputs": 3}]
)
def test_not_a_report(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"schema_version|not a report"):
        Report.from_dict(data)


@given(
    st.floats(0, 1e300),
    st.floats(0, 1e300),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 3),
)
def test_sqnr_survives_json(signal: float, noise: float, n: int, bad: int, skipped: int) -> None:
    d = Difference(signal, noise, 1.0, n, min(bad, n), skipped)
    value = d.sqnr_db
    again = Difference(**json.loads(json.dumps({k: getattr(d, k) for k in d.__dataclass_fields__})))
    assert again.sqnr_db == value or (math.isnan(value) and math.isnan(again.sqnr_db))
    assert words.decibels(d)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@given(st.floats())
def test_words_take_any_number(x: float) -> None:
    for function in (words.number, words.factor):
        assert function(x)
    if math.isnan(x) or 0 <= x <= 1e12:
        assert words.seconds(x)
    assert words.change(x, 1.0)


@given(st.floats(-1, 1))
@example(0.99996)
@example(math.nextafter(1, 0))
@example(1.0)
def test_cosine_is_never_rounded_to_one(x: float) -> None:
    assert (words.cosine(x) == "1.0000") == (x == 1)


def test_sizes_seconds_factors() -> None:
    assert [words.size(x) for x in (0, 999, 1000, 22_700_000, 5e12)] == [
        "0 bytes", "999 bytes", "1.00 kB", "22.7 MB", "5000 GB",
    ]  # fmt: skip
    assert [words.seconds(x) for x in (0.0, 4.2e-6, 0.00461, 2.5, None)] == [
        "0 µs", "4.20 µs", "4.61 ms", "2.50 s", "–",
    ]  # fmt: skip
    assert words.spread(Timing(0.001, 0.0009, 0.0011, 3)) == "1.00 ms (0.900 … 1.10)"
    assert [words.factor(x) for x in (1.04, 3.94, 12.3)] == ["1.04×", "3.9×", "12×"]
    assert words.shrinkage(100, 25) == "4.0× smaller"
    assert words.shrinkage(100, 200) == "2.0× larger"
    assert words.shrinkage(100, 100) == "same"


def test_verdict_says_slower_and_undecided(report: Report) -> None:
    def timed(before: tuple[float, ...], after: tuple[float, ...]) -> str:
        x = replace(report.latency[0], before=Timing(*before, 9), after=Timing(*after, 9))
        return replace(report, latency=(x,)).verdict

    assert "runs 2.0× slower" in timed((1.0, 0.9, 1.1), (2.0, 1.9, 2.1))
    assert "runs 2.0× faster" in timed((2.0, 1.9, 2.1), (1.0, 0.9, 1.1))
    assert "is about as fast" in timed((1.0, 0.9, 1.6), (1.2, 1.1, 1.3))


@pytest.mark.parametrize("width", [60, 80, 160])
def test_table_keeps_layer_names_at_any_width(report: Report, width: int) -> None:
    name = "a.[bold]0[/].q"
    marked = replace(report, layers=(replace(report.layers[0], name=name), *report.layers[1:]))
    file = io.StringIO()
    Console(width=width, file=file).print(marked)
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert any(name in line and "dB" in line for line in lines)


def test_print_has_no_escape_codes(report: Report) -> None:
    text = str(report)
    assert "\x1b" not in text
    assert report.environment is not None
    assert report.environment.isa in text
    assert "Left in float" in text


def test_importing_zeropoint_imports_no_plots() -> None:
    code = (
        "import sys, zeropoint; "
        "sys.exit(', '.join({'matplotlib', 'jinja2', 'rich'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
