"""The report as a browser shows it: headless Chromium over its DevTools pipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, DESKTOP, PHONE, Browser
from fake_results import write_ablation, write_run, write_watched_run

from jlt.geometry.gaussian import conditional_variance
from jlt.report import palette
from jlt.report.page import write_report
from jlt.storage.files import read_json

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module", params=["ablation", "run", "watched"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "ablation":
        write_ablation(folder, seeds=(0, 1))
    elif request.param == "run":
        write_run(folder, "x", 1, 0, 20.1)
    else:
        write_watched_run(folder, steps=3000, reached=2000, every=20)
    return write_report(folder)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_report_opens_without_a_complaint(browser: Browser, report: Path, size: tuple[int, int], dark: bool) -> None:
    browser.open(report, size, dark)
    assert browser.complaints() == []
    assert browser.requests() == [report.as_uri()]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_picture_decodes(browser: Browser, report: Path, dark: bool) -> None:
    browser.open(report, DESKTOP, dark)
    images = browser.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt.length, i.currentSrc])")
    assert len(images) >= 4
    for complete, width, alt, source in images:
        assert complete
        assert width > 0, source[:80]
        assert alt > 20
    # Whichever scheme is on, <picture> shows its own rendering of it.
    shown = browser.evaluate(
        "[...document.querySelectorAll('picture')].every(p => (p.querySelector('img').currentSrc == "
        f"p.querySelector('source').srcset) == {str(dark).lower()})"
    )
    assert shown


@pytest.mark.parametrize("width", [320, 390])
def test_nothing_reaches_over_the_edge_of_a_phone(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, (width, 844))
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    outside = browser.evaluate(
        "[...document.querySelectorAll('main *, header *, footer *')].filter(e => !e.closest('.scroll') && "
        f"e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 120))"
    )
    assert outside == []
    sizes = browser.evaluate(
        "[...document.querySelectorAll('p, li, td, figcaption')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2 of a CSS rgb() colour."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_follow_the_scheme_with_enough_contrast(browser: Browser, report: Path, dark: bool) -> None:
    browser.open(report, PHONE, dark)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    expected = palette.PAPER.dark if dark else palette.PAPER.light
    assert background == f"rgb({', '.join(str(int(expected[i : i + 2], 16)) for i in (1, 3, 5))})"
    for selector in ("h1", "figcaption", "td", "footer"):
        text = browser.evaluate(f"getComputedStyle(document.querySelector('{selector}')).color")
        low, high = sorted((luminance(background), luminance(text)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector


def test_a_slider_moves_the_curves_through_time(browser: Browser, tmp_path: Path) -> None:
    write_ablation(tmp_path, seeds=(0,))
    browser.open(write_report(tmp_path), DESKTOP)
    figures = browser.evaluate("[...document.querySelectorAll('figure.slider')].map(f => f.hidden)")
    assert figures == [False, False]
    before = browser.evaluate(CURVES)
    assert len(before) == 12
    assert all(path.startswith("M") and "NaN" not in path for path in before)
    browser.evaluate(MOVE.replace("TIME", "0.9"))
    after = browser.evaluate(CURVES)
    # Eq. 9 knows no time.
    assert after[:3] == before[:3]
    assert all(a != b for a, b in zip(after[3:], before[3:], strict=True))
    entry = read_json(tmp_path / "geometry.json")["tokens"]["1"]
    lam, t = entry["eigenvalues"][-1], 0.9
    label = browser.evaluate("document.querySelectorAll('figure.slider svg[role=img]')[2].getAttribute('aria-label')")
    shown = float(label.rpartition("v ")[2].rstrip("."))
    assert shown == pytest.approx(float(conditional_variance("v", lam, t)), rel=0.05)
    assert browser.complaints() == []


CURVES = "[...document.querySelector('figure.slider').querySelectorAll('path.curve')].map(p => p.getAttribute('d'))"
MOVE = """
(() => {
  const input = document.querySelector('figure.slider input');
  input.value = TIME;
  input.dispatchEvent(new Event('input'));
})()
"""
