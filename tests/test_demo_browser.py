"""The demo as a browser shows it: `jlt demo` in a process of its own, and headless Chromium."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from browser import CHROMIUM, DESKTOP, PHONE, Browser
from demo_helpers import NAMES, train_pair

from jlt.runtime.signals import STOPPING

pytest.importorskip("gradio")
# The server and the browser start in seconds, and on a machine that does other work in minutes.
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"), pytest.mark.timeout(900)]

PICTURES = "document.querySelectorAll('#pictures .grid:not(.z) img')"
NOTE = "document.querySelector('#note .note')?.innerText ?? ''"


class Demo:
    """A running `jlt demo`, and its page."""

    def __init__(self, runs: list[Path], browser: Browser) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.browser = f"http://127.0.0.1:{self.port}/", browser
        self.process = forked.start(["demo", *map(str, runs), "--port", str(self.port)])

    def until(self, expression: str, seconds: float = 90) -> Any:
        """Wait until JavaScript has a value that is true, and return it."""
        deadline = time.monotonic() + seconds
        while not (value := self.browser.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} stayed false; the note is {self.note!r}"
            time.sleep(0.05)
        return value

    @property
    def note(self) -> str:
        return str(self.browser.evaluate(NOTE))

    def type(self, field: str, text: str) -> None:
        """Replace the text of a field as a user does, and press Enter."""
        self.browser.evaluate(f"(e => {{ e.focus(); e.select() }})(document.querySelector('#{field} input'))")
        if text:
            self.browser.call("Input.insertText", text=text)
        else:
            self._press("Backspace", 8)
        self._press("Enter", 13, "\r")

    def _press(self, key: str, code: int, text: str = "") -> None:
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.browser.call("Input.dispatchKeyEvent", type="keyDown", **pressed)
        self.browser.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def sources(self) -> list[str]:
        return list(self.browser.evaluate(f"[...{PICTURES}].map(image => image.src)"))


@pytest.fixture(scope="module")
def demo(digit_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    demo = Demo(train_pair(digit_latents, tmp_path_factory.mktemp("runs")), browser)
    deadline = time.monotonic() + 120
    while demo.process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", demo.port), timeout=1):
                break
        except OSError:
            time.sleep(0.1)
    yield demo
    browser.close()
    demo.process.kill()
    demo.process.wait(20)


def test_the_page_draws_two_systems_and_asks_no_other_server(demo: Demo) -> None:
    browser = demo.browser
    browser.open(demo.address, DESKTOP)
    demo.until(f"{PICTURES}.length == 16")
    assert browser.evaluate("[...document.querySelectorAll('#pictures strong')].map(e => e.innerText)") == [
        *NAMES.values()
    ]
    assert demo.note.startswith("8 images of seed 0")

    # A class is chosen, and two images of it.
    demo.type("label", "7")
    demo.until("document.querySelector('#pictures .what').innerText.endsWith('7')")
    slider = "document.querySelector('#num input[type=range]')"
    browser.evaluate(f"{slider}.value = 1; {slider}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    browser.evaluate(f"{slider}.dispatchEvent(new PointerEvent('pointerup', {{bubbles: true}}))")
    demo.until(f"{PICTURES}.length == 2")
    assert browser.evaluate(f"[...{PICTURES}].every(i => i.complete && i.naturalWidth == 32 && i.alt.length > 10)")
    assert browser.evaluate(f"getComputedStyle({PICTURES}[0]).imageRendering") == "pixelated"

    # The slider moves, and the pictures change.
    before = demo.sources()
    t = "document.querySelector('#t input[type=range]')"
    browser.evaluate(f"{t}.value = 0.4; {t}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    demo.until("document.querySelector('#pictures .what').innerText.includes('t = 0.40')")
    assert all(a != b for a, b in zip(before, demo.sources(), strict=True))

    # The way between two seeds, and the command.
    for part in ("between", "commands"):
        browser.evaluate(f"document.querySelector('#{part} button.label-wrap').click()")
    demo.until("document.querySelectorAll('#walk, #commands textarea').length == 3")
    browser.evaluate("document.querySelector('#walk').click()")
    demo.until("document.querySelectorAll('#between img').length == 16")
    command = browser.evaluate("document.querySelector('#commands textarea').value")
    assert command.endswith("--out samples-1 --num 1 --steps 20 --labels 7")

    complaints = [one for one in browser.complaints() if not one["params"].get("canceled")]
    assert complaints == []
    requested = [url for url in browser.requests() if not url.startswith("blob:")]
    assert len(requested) > 10
    assert [url for url in requested if not url.startswith(demo.address)] == []


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("seed", "-1", "Seed must be a whole number"),
        ("seed", "", "Seed must be a whole number"),
        ("seed", "1e99", "Seed must be a whole number"),
        ("steps", "0", "Steps must be a whole number"),
        ("steps", "1000000", "Steps must be a whole number"),
        ("high", "0", "0 <= low < high <= 1"),
        ("label", "tench", "no class named"),
    ],
)
def test_wrong_input_shows_a_message_and_the_next_drawing_works(
    demo: Demo, field: str, text: str, message: str
) -> None:
    usual = {"seed": "0", "steps": "20", "high": "1", "label": "7"}[field]
    demo.type(field, text)
    demo.until(f"({NOTE}).includes({json.dumps(message)})")
    assert len(demo.sources()) == 2
    demo.type(field, usual)
    demo.until(f"({NOTE}).startsWith('1 image of seed 0')")


def test_a_phone_scrolls_in_one_direction(demo: Demo) -> None:
    width, height = PHONE
    demo.browser.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True
    )
    demo.until(f"window.innerWidth == {width}")
    assert demo.browser.evaluate("document.documentElement.scrollWidth") == width
    assert demo.browser.evaluate("document.querySelector('#main').getBoundingClientRect().left") < 20
    outside = demo.browser.evaluate(
        "[...document.querySelectorAll('#main *, #heading *')].filter(e => "
        f"e.getBoundingClientRect().right > {width} + 0.5).map(e => e.outerHTML.slice(0, 120))"
    )
    assert outside == []


def test_what_is_sent_past_the_page_is_answered_and_the_server_lives(demo: Demo) -> None:
    fields = ["tench", 1, 0, 1, 0, 1, 20, "heun", "0.9", 1]
    assert "no class named" in called(demo, fields)
    fields[0] = "<script>"
    assert "<script>" not in called(demo, fields)
    fields[:2] = ["3", 10**9]
    assert "Images must be a whole number from 1 to 16" in called(demo, fields)
    fields[1] = 1
    assert "data:image/png" in called(demo, fields)


def called(demo: Demo, fields: list[Any]) -> str:
    """Call the API of the page as a program does, and return the answer as it is sent."""
    place = f"{demo.address}gradio_api/call/draw"
    request = urllib.request.Request(place, json.dumps({"data": fields}).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        number = json.load(answer)["event_id"]
    with opener.open(f"{place}/{number}", timeout=60) as answer:
        return str(answer.read().decode())


def test_sigterm_ends_it_at_once_with_a_sentence(demo: Demo) -> None:
    begun = time.monotonic()
    demo.process.send_signal(signal.SIGTERM)
    out, error = demo.process.communicate(timeout=30)
    assert demo.process.returncode == 0
    assert out.strip() == "The demo has ended."
    assert error.splitlines() == [f"Open {demo.address} (Ctrl-C ends it)", STOPPING]
    assert time.monotonic() - begun < 10
