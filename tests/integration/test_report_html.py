"""The page of a report in a real browser: on a phone, on a screen, on paper, in both colour schemes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from builder import reports as forms
from tests.support import reports
from tests.support.browser import Browser, browser

pytestmark = pytest.mark.browser

PAGES = ("gpu", "bad", "no_gpu", "waived", "notebook", "hostile", "index")
PHONE, TABLET, SCREEN = 390, 760, 1280

CONTRAST = """
(() => {
  const parts = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const under = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = parts(getComputedStyle(at).backgroundColor);
      if (found.length && (found.length < 4 || found[3] > 0)) return found;
    }
    return [255, 255, 255];
  };
  const worst = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const drawn = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parts(drawn)), light(under(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = `${element.tagName}.${element.getAttribute("class")}`;
    worst.push([Math.round(ratio * 100) / 100, name, element.textContent.trim().slice(0, 40)]);
  }
  return worst.sort((a, b) => a[0] - b[0]).slice(0, 5);
})()
"""
"""The five texts that stand out least from what is behind them, by WCAG's contrast ratio."""

OVERLAPS = """
(() => {
  const found = [];
  for (const plot of document.querySelectorAll("svg.plot g")) {
    const [a, b] = [...plot.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
    if (a && b && a.right > b.left) found.push(plot.textContent);
  }
  return found;
})()
"""
"""Bars whose label runs into the value."""

HIDDEN = """
[...document.querySelectorAll("details .inside > p")]
  .filter((one) => !one.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true})).length
"""
"""How many of the checks' own lines are folded away."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "gpu": reports.gpu, "bad": reports.bad, "no_gpu": reports.no_gpu, "waived": reports.waived,
        "notebook": reports.notebook, "hostile": reports.hostile,
    }  # fmt: skip
    made = {name: reports.read(make()) for name, make in makers.items()}
    found = {name: forms.write_all(report, root / name)[-1] for name, report in made.items()}
    return found | {"index": forms.write_overview(made, root)[0]}


@pytest.mark.parametrize("width", [PHONE, TABLET, SCREEN])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_complains_of_nothing_and_fetches_nothing(
    chromium: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    page = chromium.page()
    page.open(pages[name], width=width)
    assert page.value("document.documentElement.scrollWidth") <= width
    # Opened, too: what is inside may be wider.
    page.value("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(OVERLAPS) == []
    assert page.complaints == []
    assert page.requests == [pages[name].as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_every_text_can_be_read(chromium: Browser, pages: dict[str, Path], name: str, scheme: str) -> None:
    page = chromium.page()
    page.open(pages[name], scheme=scheme)
    page.value("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    worst = page.value(CONTRAST)
    assert worst
    assert worst[0][0] >= 4.5, worst


def test_the_colours_follow_the_scheme(chromium: Browser, pages: dict[str, Path]) -> None:
    seen = []
    for scheme in ("light", "dark"):
        page = chromium.page()
        page.open(pages["gpu"], scheme=scheme)
        seen.append(page.value("getComputedStyle(document.body).backgroundColor"))
    assert seen[0] != seen[1]


def test_bars_are_drawn_as_long_as_their_numbers(chromium: Browser, pages: dict[str, Path]) -> None:
    page = chromium.page()
    page.open(pages["gpu"], width=PHONE)
    widths = page.value("[...document.querySelectorAll('figure:first-child .bar')].map((bar) => bar.getBBox().width)")
    track = page.value("document.querySelector('figure:first-child .track').getBBox().width")
    assert track > PHONE / 2
    assert widths[0] / track == pytest.approx(4187.3 / 4813.0, rel=0.01)


def test_a_page_can_be_printed_with_everything_on_it(chromium: Browser, pages: dict[str, Path]) -> None:
    page = chromium.page()
    page.open(pages["bad"], scheme="dark")
    assert page.paper().startswith(b"%PDF-")
    page.ask("Emulation.setEmulatedMedia", media="print")
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.value(HIDDEN) == 0
    page.ask("Emulation.setEmulatedMedia", media="screen")
    assert page.value(HIDDEN) > 0


def test_no_script_runs_even_where_one_is_planted(chromium: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    text = pages["gpu"].read_text("utf-8")
    planted = tmp_path / "planted.html"
    planted.write_text(text.replace("<main>", "<main><script>document.title = 'ran'</script>"), "utf-8")
    page = chromium.page()
    page.open(planted)
    assert page.value("document.title") != "ran"
    assert any("Content Security Policy" in complaint for complaint in page.complaints)
