"""The HTML page: parsed, and rendered by a headless Chromium where there is one."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import reports
from zeropoint import Linear, QuantizedLinear, Report, compare

HOSTILE = "</script><script>alert(1)</script>$x^2$\"'&_#010101"
VOID = {"wbr", "meta", "br", "hr", "img", "input", "link"}


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(*(Linear(32, 32) for _ in range(12)), Linear(32, 4))
    with torch.no_grad():
        model[3].weight[2, 7] = 6.0
    twin = nn.Sequential(*(QuantizedLinear.from_linear(m) for m in model[:12]), model[12])
    report = compare(model, twin, [torch.randn(6, 32)] * 2, lambda m: 0.75, repeats=3)
    named = replace(report.layers[3], name=HOSTILE)
    layers = (*report.layers[:3], named, *report.layers[4:])
    return replace(report, layers=layers, left={"head": f"why {HOSTILE}"})


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    text = report.to_html(path)
    assert path.read_text("utf-8") == text
    return path


class Page(HTMLParser):
    """Elements in order, each with its attributes and text; complains of what does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[int, str] = {}
        self.stack: list[tuple[str, int]] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.stack.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, tag
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, i in self.stack:
            self.texts[i] = self.texts.get(i, "") + data

    def of(self, *tags: str) -> list[tuple[dict[str, str], str]]:
        return [
            (attrs, self.texts.get(i, ""))
            for i, (tag, attrs) in enumerate(self.elements)
            if tag in tags
        ]


@pytest.fixture(scope="module")
def parsed(page: Path) -> Page:
    return Page(page.read_text("utf-8"))


def test_no_external_reference(page: Path, parsed: Page) -> None:
    text = page.read_text("utf-8")
    for attribute in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
        for _, attrs in parsed.elements:
            assert attrs.get(attribute, "#").startswith("#"), attrs
    assert "//" not in re.sub(r"^ *// .*$", "", text, flags=re.MULTILINE)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not parsed.of("link", "img", "iframe", "object")
    policy = next(a for a, _ in parsed.of("meta") if "http-equiv" in a)
    assert policy["content"].startswith("default-src 'none'")


@pytest.mark.parametrize("full", [False, True])
def test_ids_are_unique_and_references_resolve(parsed: Page, full: bool) -> None:
    parsed = Page(reports.full().to_html()) if full else parsed
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attrs in parsed.elements:
        wanted = attrs.get("aria-labelledby", "").split()
        wanted += [v[1:] for k, v in attrs.items() if k == "href"]
        wanted += re.findall(r"url\(#([^)]+)\)", " ".join(attrs.values()))
        assert set(wanted) <= set(ids), attrs


def test_structure_for_screen_readers(parsed: Page, report: Report) -> None:
    assert ("html", {"lang": "en"}) in parsed.elements
    headings = [int(t[1]) for t, _ in parsed.elements if re.fullmatch(r"h\d", t)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    tables, captions = parsed.of("table"), parsed.of("caption")
    assert len(tables) == len(captions) == 3
    assert [len(parsed.of(t)) for t in ("details", "summary")] == [12, 12]
    assert all(a.get("scope") in ("col", "row") for a, _ in parsed.of("th"))
    # One plot, and of each layer weights and activations, before and after; grids have words.
    drawn = [a for a, _ in parsed.of("svg") if a.get("aria-hidden") != "true"]
    assert len(drawn) == 1 + 4 * 12
    assert all(a["role"] == "img" for a in drawn)
    assert len(parsed.of("desc")) == 1
    assert all(a.get("aria-label") for a in drawn[1:])
    captions = [text for _, text in parsed.of("figcaption")]
    assert len(captions) == len(drawn)
    assert all(len(text) > 50 for text in captions)
    scrolling = [a for _, a in parsed.elements if "scroll" in a.get("class", "").split()]
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in scrolling)
    first = next(a for t, a in parsed.elements if t == "a")
    assert first["class"] == "skip"


def test_verdict_on_top_and_layers_in_model_order(parsed: Page, report: Report) -> None:
    verdict = next(text for a, text in parsed.of("p") if a.get("class") == "verdict")
    assert verdict == report.verdict
    names = [a["data-v"] for a, _ in parsed.of("th") if "data-v" in a]
    assert names == [x.label for x in report.layers]
    text = "".join(text for _, text in parsed.of("dd"))
    assert report.environment is not None
    for value in (report.environment.cpu, report.environment.isa, report.environment.torch):
        assert value in text


def test_hostile_names_stay_text(page: Path, parsed: Page) -> None:
    assert len(parsed.of("script")) == 2
    assert HOSTILE in "".join(text for _, text in parsed.of("h3"))
    assert HOSTILE in next(t for _, t in parsed.of("desc"))
    assert "<script>alert" not in page.read_text("utf-8")


def test_numbers_are_in_the_page(parsed: Page, report: Report) -> None:
    text = next(t for a, t in parsed.of("script") if a.get("id") == "report-data")
    assert Report.from_dict(json.loads(text)) == report


def test_plots_take_their_colours_from_the_page(parsed: Page) -> None:
    styles = " ".join(
        a.get("style", "") for t, a in parsed.elements if t in ("path", "use", "text")
    )
    assert "var(--ink)" in styles
    assert not re.findall(r"#[0-9a-f]{6}\b", styles)
    assert "DejaVu" not in styles
    assert not any("\\math" in text for _, text in parsed.of("text"))


def test_every_point_names_its_layer(parsed: Page, report: Report) -> None:
    titles = [text for _, text in parsed.of("title")]
    for x in report.layers:
        assert sum(f". {x.label}: " in t for t in titles) == 2


@pytest.mark.parametrize("case", ["exact", "no layers", "not run", "untimed", "one weight value"])
def test_odd_reports_render(report: Report, case: str) -> None:
    if case == "exact":
        exact = replace(report.layers[0].alone, noise_power=0.0)
        layers = [replace(x, alone=exact, accumulated=exact) for x in report.layers]
        report = replace(report, layers=(*layers[:-1], report.layers[-1]))
    elif case == "not run":
        none = type(report.layers[0].alone)()
        report = replace(report, layers=(replace(report.layers[0], alone=none, accumulated=none),))
    elif case == "no layers":
        report = replace(report, layers=(), left={}, metric=None, environment=None)
    elif case == "untimed":
        layers = [replace(x, seconds_before=None, seconds_after=None) for x in report.layers]
        report = replace(report, layers=tuple(layers), latency=())
    else:
        layer = Linear(8, 1)
        nn.init.constant_(layer.weight, 0.5)
        report = compare(layer, QuantizedLinear.from_linear(layer), [torch.randn(4, 8)], repeats=0)
        assert report.layers[0].histogram is not None
    page = Page(report.to_html())
    svgs = sum("plot" in a["class"] for a, _ in page.of("svg"))
    assert svgs == {"no layers": 0}.get(case, 1)
    assert len(page.of("details")) == len(report.layers)
    if case == "exact":
        assert "exact" in [text for _, text in page.of("text")]


def test_a_hundred_layers_weigh_little_more_than_a_megabyte(report: Report) -> None:
    layers = tuple(replace(report.layers[n % 12], name=f"layers.{n}") for n in range(100))
    assert len(replace(report, layers=layers).to_html().encode()) < 1.6e6


def test_title(report: Report) -> None:
    page = Page(report.to_html(title="A < B"))
    assert page.of("title")[0][1] == "A < B"
    assert page.of("h1")[0][1] == "A < B"


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_missing_extra_says_what_to_install(
    report: Report, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "zeropoint.report.plots", raising=False)
    monkeypatch.delattr("zeropoint.report.plots", raising=False)
    with pytest.raises(ImportError, match=r"pip install zeropoint\[report\]"):
        report.to_html()
