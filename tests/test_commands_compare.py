"""``zeropoint compare`` with what diagnose and search found, and the report's other forms of it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import reports
from commands import fails, in_folder, ok
from zeropoint import Report
from zeropoint.report import schema

__all__ = ["in_folder"]  # a fixture: used by being here


@pytest.fixture(scope="module")
def full() -> Report:
    return reports.full()


def test_what_diagnose_and_search_wrote_is_shown_beside(full: Report) -> None:
    assert full.diagnosis is not None
    assert full.front is not None
    full.diagnosis.to_json("d.json")
    full.front.to_json("f.json")
    ok("quantize", "zp_nets:small", "--to", "int8-dynamic", "--out", "q.safetensors")
    beside = ("--diagnosis", "d.json", "--front", "f.json")
    text = ok(
        "compare", "zp_nets:small", "q.safetensors", "--data", "data.npy", *beside,
        "--json", "r.json", "--html", "r.html",
    )  # fmt: skip
    words = " ".join(text.split())
    assert full.diagnosis.causes[0].evidence in words
    assert "int4 group 32" in words
    report = Report.from_dict(json.loads(Path("r.json").read_text("utf-8")))
    assert report.diagnosis == full.diagnosis
    assert report.front == full.front
    page = Path("r.html").read_text("utf-8")
    assert 'id="causes"' in page
    assert 'id="front"' in page


@pytest.mark.parametrize("option", ["--diagnosis", "--front"])
@pytest.mark.parametrize("text", ["{}", "no JSON", '{"schema_version": 1}'])
def test_other_files_are_refused_by_name(option: str, text: str) -> None:
    Path("x.json").write_text(text)
    line = fails("compare", "zp_nets:small", "q", "--data", "data.npy", option, "x.json")
    assert "x.json" in line


def test_json_with_both_follows_its_schema_and_comes_back(full: Report) -> None:
    text = full.to_json()
    data = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    jsonschema.validate(data, schema())
    assert Report.from_dict(data) == full
    # Numbers of a list stand in one line.
    assert max(len(line.split()) for line in text.splitlines()) > 60
    assert len(text.splitlines()) < 5000


def test_table_shows_both(full: Report) -> None:
    text = str(full)
    assert full.diagnosis is not None
    for part in ("channel 7 is 61 times", "int4 group 32"):
        assert part in " ".join(text.split())
    assert "dynamic, weight int8 per channel" in text


def test_beside_keeps_what_is_not_given(full: Report) -> None:
    bare = reports.report()
    assert bare.beside() == bare
    both = bare.beside(full.diagnosis).beside(front=full.front)
    assert (both.diagnosis, both.front) == (full.diagnosis, full.front)
