"""The page of `jlt explain`: its numbers are those of jlt.geometry, its measurements those of the documents."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, DESKTOP, PHONE, Browser

from jlt.cli.main import main
from jlt.config import TimestepConfig
from jlt.geometry import gaussian
from jlt.geometry.forecast import (
    STATED_SHARE,
    Estimate,
    capacity_curve,
    forecast,
    needed_ranks,
    required_rank,
    training_times,
    unavoidable_risk,
    width_floor,
)
from jlt.geometry.spectrum import eigenvalues_descending
from jlt.latents.store import LatentStore
from jlt.patches import patch_tokens
from jlt.prediction import mixture, slope
from jlt.report.explain_page import MEASURED, Measured, explanation
from jlt.results.geometry import TrainingModel
from jlt.storage.codec import from_json
from jlt.storage.files import read_json

PAGE = from_json(Measured, read_json(MEASURED))
DOCS = Path(__file__).parent.parent / "docs"
NAMES = ("x", "eps", "v", "edm", "skip=0.3", "skip=2", "mix=0.5", "mix=1.7")
MODEL = TrainingModel(TimestepConfig(), t_eps=0.05)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "explain.html"
    assert main(["explain", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.open(page, DESKTOP)
    yield browser
    browser.close()


def evaluated(browser: Browser, expression: str, **values: Any) -> Any:
    """Evaluate an expression in which names stand for JSON values."""
    given = ", ".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
    return browser.evaluate(f"(() => {{ const {given}; return {expression}; }})()")


def spectra(random: np.random.Generator) -> list[np.ndarray]:
    drawn = [np.sort(np.exp(random.normal(0, spread, 24)))[::-1] for spread in (0.02, 0.4, 2.0)]
    return [*drawn, np.append(drawn[1][:-2], [0.0, 0.0])]


@needs_chromium
@pytest.mark.parametrize("name", NAMES)
def test_closed_forms_are_those_of_the_package(browser: Browser, name: str) -> None:
    random = np.random.default_rng(NAMES.index(name))
    lam, t = np.exp(random.uniform(-9, 5, 200)), random.uniform(0.001, 0.999, 200)
    found = evaluated(
        browser,
        "lam.map((l, i) => { const mix = gaussian.mixture(name, t[i]); return [...mix, gaussian.slope(mix, t[i]), "
        "gaussian.targetVariance(mix, l), gaussian.bestCoefficient(mix, l, t[i]), "
        "gaussian.conditionalVariance(mix, l, t[i]), gaussian.explainedPower(mix, l, t[i])]; })",
        lam=lam.tolist(),
        t=t.tolist(),
        name=name,
    )
    expected = [
        *(np.broadcast_to(share, t.shape) for share in mixture(name, t)),
        slope(name, t),
        gaussian.target_variance(name, lam, t),
        gaussian.best_coefficient(name, lam, t),
        gaussian.conditional_variance(name, lam, t),
        gaussian.explained_power(name, lam, t),
    ]
    # A coefficient may vanish, where only its absolute error means anything.
    np.testing.assert_allclose(np.array(found).T, expected, rtol=1e-6, atol=1e-12)


@needs_chromium
def test_training_times_are_those_of_the_package(browser: Browser) -> None:
    found = np.array(evaluated(browser, "forecast.times.map(time => [time.t, time.probability])", none=0))
    order, times = np.argsort(found[:, 0]), training_times(MODEL)
    np.testing.assert_allclose(found[order, 0], np.sort(times.t), rtol=1e-9)
    np.testing.assert_allclose(found[order, 1], times.probability[np.argsort(times.t)], rtol=1e-6)


@needs_chromium
@pytest.mark.parametrize("name", NAMES)
def test_capacity_and_floor_are_those_of_the_package(browser: Browser, name: str) -> None:
    times = training_times(MODEL)
    for lam in spectra(np.random.default_rng(7)):
        curve, floor, risk, rank = evaluated(
            browser,
            "[forecast.capacityCurve(name, lam), forecast.floorCurve(name, lam)].map(curve => [...curve]).concat("
            "[forecast.unavoidableRisk(lam), forecast.requiredRank(forecast.capacityCurve(name, lam), "
            "forecast.STATED_SHARE * forecast.unavoidableRisk(lam))])",
            name=name,
            lam=lam.tolist(),
        )
        python = capacity_curve(name, lam, times)
        np.testing.assert_allclose(curve, python, rtol=1e-6, atol=1e-12)
        widths = [width_floor(name, lam, times, width) for width in range(len(lam) + 1)]
        np.testing.assert_allclose(floor, widths, rtol=1e-6, atol=1e-12)
        assert risk == pytest.approx(unavoidable_risk(lam, times), rel=1e-6)
        assert rank == pytest.approx(required_rank(python, STATED_SHARE * risk), rel=1e-6, abs=1e-9)


@needs_chromium
def test_the_outcome_is_that_of_the_forecast(browser: Browser) -> None:
    outcomes = set()
    drawn = spectra(np.random.default_rng(7))
    for lam in [*drawn, drawn[2] / drawn[2].mean(), np.full(24, 30.0), np.full(24, 0.9)]:
        needed = needed_ranks(lam, MODEL, STATED_SHARE)
        python = forecast([Estimate("", lam, np.zeros(24), 1e9)], MODEL, [24])
        # The page has no confidence: it makes the call of a forecast that is sure.
        call = python.outcome if python.call == "undecided" else python.call
        assert evaluated(browser, "forecast.outcome(needed, lam)", needed=needed, lam=lam.tolist()) == call
        outcomes.add(call)
    assert outcomes == {"even", "v", "x"}


def choose(browser: Browser, **values: object) -> None:
    """Move controls as a reader does, and wait for the next frame."""
    for name, value in values.items():
        browser.evaluate(
            f"(() => {{ const control = document.getElementById('{name}'); control.value = '{value}'; "
            "for (const kind of ['input', 'change']) control.dispatchEvent(new Event(kind, {bubbles: true})); "
            "return new Promise(done => requestAnimationFrame(() => setTimeout(done))); })()"
        )


def shown(browser: Browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector('{selector}').innerText")


@needs_chromium
def test_the_sentence_follows_the_sliders(browser: Browser, page: Path) -> None:
    browser.open(page, DESKTOP)
    choose(browser, width=-1.5, spread=1.25, line="mix", point=0.5)
    assert shown(browser, "#verdict").startswith(
        "Forecast: x before mix=0.5 before v before ε. At this width x fits, and v"
    )
    choose(browser, width=1)
    assert "every direction" in shown(browser, "#verdict")
    choose(browser, spread=0)
    assert shown(browser, "#verdict").startswith("The forecast is even")
    before = browser.evaluate("document.querySelector('#variance svg').innerHTML")
    choose(browser, line="skip", point=1.2, time=0.7)
    assert browser.evaluate("document.querySelector('#variance svg').innerHTML") != before
    # A click on the map moves both of its sliders, here to the right and the bottom.
    browser.evaluate(
        "(() => { const map = document.getElementById('map'), box = map.getBoundingClientRect(); "
        "map.dispatchEvent(new MouseEvent('click', {clientX: box.right, clientY: box.bottom})); })()"
    )
    assert browser.evaluate("[spread.value, width.value].map(Number)") == [2, -3]
    assert browser.complaints() == []


@needs_chromium
@pytest.mark.parametrize("space", [space for space in PAGE.spaces if space.preset], ids=lambda space: space.name)
def test_a_preset_is_the_measured_space(browser: Browser, page: Path, space: Any) -> None:
    browser.open(page, DESKTOP)
    choose(browser, space=space.name)
    lam = np.array(space.spectrum)
    assert shown(browser, "output[for=spread]") == f"{np.log10(lam).std():.2f}"
    assert shown(browser, "output[for=width]") == f"{100 * space.width / space.dimension:.0f}%"
    needed = needed_ranks(lam, MODEL, STATED_SHARE)
    cells = browser.evaluate("[...document.querySelectorAll('#readout tbody tr')].map(row => row.cells[1].innerText)")
    assert cells[:3] == [f"{100 * needed[name] / len(lam):.0f}%" for name in ("x", "eps", "v")]


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_page_opens_alone_and_fits(browser: Browser, page: Path, size: tuple[int, int], dark: bool) -> None:
    browser.open(page, size, dark)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert (
        browser.evaluate("[...document.querySelectorAll('.chart svg[role=img]')].map(svg => svg.ariaLabel.length > 20)")
        == [True] * 7
    )
    # The text of the page claims this of every row.
    winners = browser.evaluate("[...document.querySelectorAll('.winner')].map(cell => cell.textContent)")
    assert len(winners) == len(PAGE.experiments)
    assert all(winner.endswith("as forecast") for winner in winners)
    assert "NaN" not in browser.evaluate("document.querySelector('main').innerHTML")
    assert (
        browser.evaluate("[...document.querySelectorAll('.controls input, .controls select')].map(c => c.tabIndex)")
        == [0] * 6
    )


def test_ratios_are_those_of_the_documents() -> None:
    text = "".join((DOCS / name).read_text() for name in ("findings.md", "photographs.md"))
    number = r"(\d+\.\d+)"
    ranges = {tuple(map(float, found)) for found in re.findall(rf"\({number} to {number}", text)}
    numbers = {float(found) for found in re.findall(number, text)}
    for found in PAGE.experiments:
        if found.low is not None:
            assert (found.low, found.high) in ranges, found.title
            assert found.ratio in numbers, found.title
    assert [found.ratio for found in PAGE.experiments if found.low is None] == [
        round(38.4 / 5.03, 1),  # the distances of v and x in the pixels of digits
        *(round(v / x, 2) for v, x in ((6.56, 2.56), (28.71, 14.81))),  # the FIDs of Fu et al.
    ]


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_digits_of_the_page_are_those_of_the_package(digit_latents: Path, patch_size: int) -> None:
    store = LatentStore.open(digit_latents)
    tokens = patch_tokens(torch.cat([batch for batch, _ in store.batches(512)]).float(), patch_size).double()
    space = next(space for space in PAGE.spaces if space.name == f"digits{patch_size}")
    assert space.dimension == tokens.shape[1]
    eigenvalues = eigenvalues_descending(np.cov(tokens.numpy(), rowvar=False, bias=True))
    np.testing.assert_allclose(space.spectrum, eigenvalues, rtol=0.01)


def test_other_names_of_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--out", str(tmp_path)]) == 2
    assert "ends in .html" in capsys.readouterr().err


def test_the_page_runs_only_its_own_script() -> None:
    text = explanation()
    assert text.count("<script>") == 1
    assert "script-src 'sha256-" in html.unescape(text)
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text)
