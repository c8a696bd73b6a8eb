"""The report page as a browser shows it: nothing loaded, nothing out of reach, nothing unreadable.

Needs Chromium (Debian: ``apt-get install chromium``), or the one that ``$ZEROPOINT_CHROMIUM``
names, and from PyPI ``playwright axe-playwright-python``, whose own browsers are not used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import reports
from zeropoint import Report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright from PyPI")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python from PyPI"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("ZEROPOINT_CHROMIUM") or next(
    (found for name in NAMES if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a browser: apt-get install chromium, or set ZEROPOINT_CHROMIUM"
)
THEMES = ("light", "dark")


@pytest.fixture(scope="module")
def report() -> Report:
    return reports.full()


@pytest.fixture(scope="module")
def file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.to_html(path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        launched = p.chromium.launch(
            executable_path=CHROMIUM,
            # root, as in a container, has no sandbox
            args=["--no-sandbox"] if os.geteuid() == 0 else [],
        )
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Any, file: Path) -> Iterator[Any]:
    """``visit(theme=…, width=…)`` opens the page; at the end, nothing may have gone wrong."""
    complaints: list[str] = []
    requests: list[str] = []

    @contextmanager
    def opened(theme: str = "light", width: int = 1280, **options: Any) -> Iterator[Any]:
        context = browser.new_context(
            color_scheme=theme, viewport={"width": width, "height": 900}, offline=True, **options
        )
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        yield page
        context.close()

    yield opened
    assert complaints == []
    assert set(requests) == {file.as_uri()}


def test_it_shows_what_the_report_holds(visit: Any, report: Report) -> None:
    with visit() as page:
        assert page.title() == page.inner_text("h1")
        assert page.inner_text(".verdict") == report.verdict
        headings = page.locator("h2").all_inner_texts()
        assert len(headings) == 8
        assert page.locator("#table tbody tr").count() == len(report.layers)
        assert page.locator("details.layer").count() == len(report.layers)
        # The sick layer's section is open, with its cause, its cure and four histograms.
        opened = page.locator("details.layer[open]")
        assert opened.count() == 1
        text = opened.inner_text()
        assert report.diagnosis is not None
        cause = report.diagnosis.causes[0]
        for part in (cause.evidence[1:], cause.cure_text):
            assert part in text
        boxes = [svg.bounding_box() for svg in opened.locator("svg.bars").all()]
        assert len(boxes) == 4
        assert all(box["width"] > 300 and box["height"] > 50 for box in boxes)
        assert page.locator("svg .marked, tr.marked .badge.good").first.inner_text() == "chosen"


def focused(page: Any) -> dict[str, Any] | None:
    """What has the focus, where it is in the page's order, and whether one can see it."""
    return page.evaluate(
        """() => {
          const e = document.activeElement;
          if (!e || e === document.body) return null;
          const all = Array.from(document.querySelectorAll(REACHABLE)).filter(VISIBLE);
          const box = e.getBoundingClientRect(), style = getComputedStyle(e);
          return {tag: e.tagName, text: e.textContent.trim().slice(0, 60), at: all.indexOf(e),
                  seen: box.width > 0 && box.height > 0 && box.bottom > 0 && box.top < innerHeight,
                  outline: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2};
        }""".replace("REACHABLE", repr("a[href], button, summary, [tabindex='0']")).replace(
            "VISIBLE", "x => x.checkVisibility()"
        )
    )


def test_tab_reaches_everything_in_order_and_shows_where_it_is(visit: Any) -> None:
    with visit() as page:
        total = page.evaluate(
            "() => Array.from(document.querySelectorAll("
            "\"a[href], button, summary, [tabindex='0']\")).filter(x => x.checkVisibility()).length"
        )
        assert total > 50
        places = []
        for _ in range(total):
            page.keyboard.press("Tab")
            found = focused(page)
            assert found is not None
            assert found["seen"], found
            assert found["outline"], found
            places.append(found["at"])
        assert places == list(range(total))
        page.keyboard.press("Tab")  # and out again
        assert focused(page) is None


def test_skip_link_comes_first_and_skips(visit: Any) -> None:
    with visit() as page:
        assert page.locator(".skip").bounding_box()["x"] < -500
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.locator(".skip").bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        found = page.evaluate("document.activeElement.ariaLabel")
        assert found == "Table: the whole model"


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_layer_opens_by_key(visit: Any, key: str) -> None:
    with visit() as page:
        layer = page.locator("#layer-1")
        assert not layer.evaluate("e => e.open")
        assert not layer.locator(".facts").is_visible()
        layer.locator("summary").focus()
        page.keyboard.press(key)
        assert layer.evaluate("e => e.open")
        assert layer.locator(".facts").is_visible()
        page.keyboard.press(key)
        assert not layer.evaluate("e => e.open")


def test_all_layers_open_and_close_by_key(visit: Any, report: Report) -> None:
    with visit() as page:
        for name, count in (("Open all", len(report.layers)), ("Close all", 0)):
            page.get_by_role("button", name=name).focus()
            page.keyboard.press("Enter")
            assert page.locator("details.layer[open]").count() == count


def test_a_link_to_a_layer_opens_it_and_goes_on_from_there(visit: Any) -> None:
    with visit() as page:
        link = page.locator("#table a[href='#layer-9']")
        for _ in range(2):  # also when it was closed again
            link.focus()
            page.keyboard.press("Enter")
            playwright.expect(page.locator("#layer-9[open] summary")).to_be_focused()
            box = page.locator("#layer-9 summary").bounding_box()
            assert 0 <= box["y"] < 300
            page.keyboard.press("Enter")


def test_the_table_sorts_by_key(visit: Any, report: Report) -> None:
    with visit() as page:
        page.get_by_role("button", name="Alone, dB").focus()
        for order in ("ascending", "descending"):
            page.keyboard.press("Enter")
            assert page.locator("th[aria-sort]").get_attribute("aria-sort") == order
            assert page.locator("th[aria-sort]").inner_text().startswith("Alone")
            names = page.locator("#table tbody th").all_inner_texts()
            expected = sorted(report.layers, key=lambda x: x.alone.sqnr_db)
            if order == "descending":
                expected.reverse()
            assert [n.split()[0] for n in names] == [x.label for x in expected]


def test_without_scripts_nothing_is_missing(visit: Any, report: Report) -> None:
    with visit(java_script_enabled=False) as page:
        assert page.locator("#table tbody tr").count() == len(report.layers)
        assert page.locator("button").count() == 0
        page.locator("#layer-2 summary").press("Enter")
        assert page.locator("#layer-2 .facts").is_visible()


LUMINANCE = """
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  function rgba(text) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  }
  const over = (top, below) => below.map((c, i) => i < 3 ? top[i] * top[3] + c * (1 - top[3]) : 1);
  function background(e) {
    const layers = [];
    for (; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  }
  function luminance([r, g, b]) {
    const [x, y, z] = [r, g, b].map(c => {
      c /= 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  }
  function contrast(a, b) {
    const [low, high] = [luminance(a), luminance(b)].sort((p, q) => p - q);
    return (high + 0.05) / (low + 0.05);
  }
"""


@pytest.mark.parametrize("theme", THEMES)
def test_every_text_has_contrast(visit: Any, theme: str) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1 for all text, that of the plots included."""
    with visit(theme) as page:
        page.get_by_role("button", name="Open all").click()
        found = page.evaluate(
            "() => {"
            + LUMINANCE
            + """
              const texts = Array.from(document.querySelectorAll('body *')).filter(e =>
                !e.closest('script, title, desc') && e.checkVisibility() &&
                Array.from(e.childNodes).some(n => n.nodeType === 3 && n.textContent.trim()));
              return texts.map(e => {
                const style = getComputedStyle(e), below = background(e);
                const color = rgba(e.closest('svg') ? style.fill : style.color);
                return [contrast(over(color, below), below), e.tagName, e.textContent.slice(0, 40)];
              });
            }"""
        )
        assert len(found) > 300
        assert {tag for _, tag, _ in found} >= {"text", "TD", "FIGCAPTION", "H3"}
        assert [x for x in found if x[0] < 4.5] == []


@pytest.mark.parametrize("theme", THEMES)
def test_bars_and_points_have_contrast(visit: Any, theme: str) -> None:
    """WCAG 2.2, 1.4.11: 3 to 1 for what is drawn."""
    with visit(theme) as page:
        found = page.evaluate(
            "() => {"
            + LUMINANCE
            + """
              const drawn = [...document.querySelectorAll(
                'svg.bars path, svg.comb path, .plot [id*=points-] use, #all button')];
              return drawn.filter(e => e.checkVisibility()).map(e => {
                const style = getComputedStyle(e), below = background(e.closest('div'));
                const color = e.tagName === 'BUTTON' ? style.borderTopColor : style.stroke;
                return [contrast(over(rgba(color), below), below), e.outerHTML.slice(0, 90)];
              });
            }"""
        )
        assert len(found) > 30
        assert [x for x in found if x[0] < 3] == []


def test_dark_differs_from_light(visit: Any) -> None:
    seen = {}
    for theme in THEMES:
        with visit(theme) as page:
            seen[theme] = page.evaluate(
                "() => {"
                + LUMINANCE
                + """
                  const fill = document.querySelector('.plot text');
                  return {paper: luminance(background(document.body)),
                          ink: luminance(rgba(getComputedStyle(document.body).color)),
                          plot: luminance(rgba(getComputedStyle(fill).fill))};
                }"""
            )
    assert seen["light"]["paper"] > 0.9 > 0.1 > seen["dark"]["paper"]
    assert seen["light"]["ink"] < 0.1 < 0.7 < seen["dark"]["ink"]
    assert seen["light"]["plot"] < 0.2 < 0.3 < seen["dark"]["plot"]


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_sticks_out(visit: Any, width: int) -> None:
    with visit(width=width) as page:
        page.get_by_role("button", name="Open all").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # What is wider scrolls on its own, and the keyboard can scroll it.
        wide = page.evaluate(
            """() => Array.from(document.querySelectorAll('body *')).filter(e =>
              e.scrollWidth > e.clientWidth + 1 && e.clientWidth &&
              ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.tabIndex !== 0
            ).map(e => e.outerHTML.slice(0, 80))"""
        )
        assert wide == []


def test_large_text_stays_inside(visit: Any) -> None:
    with visit(width=1280) as page:
        page.add_style_tag(content="html, body { font-size: 200% }")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_nothing(visit: Any, theme: str) -> None:
    """The rules of WCAG 2.2 A and AA that a program can check, and axe's own good practice."""
    with visit(theme) as page:
        page.get_by_role("button", name="Open all").click()
        result = axe.Axe().run(page)
        assert result.violations_count == 0, result.generate_report()
        assert len(result.response["passes"]) > 20


def test_names_that_screen_readers_say(visit: Any) -> None:
    with visit() as page:
        snapshot = page.locator("main").aria_snapshot()
        assert 'heading "The whole model" [level=2]' in snapshot
        assert 'navigation "Contents"' in snapshot
        assert 'img "The Pareto front"' in snapshot
        assert snapshot.count("table") >= 4
        assert 'img "Histogram of weights, before"' in snapshot
