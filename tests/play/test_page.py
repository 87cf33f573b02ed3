"""The page in a real browser, served as a user starts it; the last test ends it with Ctrl-C."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maps import random_map
from trce_cli.checkpoint.open import open_checkpoint

ROOT = Path(__file__).parents[2]
WAIT = 60_000  # ms
# A prompt that means a weapon: the maps' history names the preset `weapons`, which is sensitive.
ASKED = "a pistol"


class Served:
    """`trce play`, and where it is."""

    def __init__(self, *args: Any) -> None:
        line = [sys.executable, "-m", "trce_cli", "play", *map(str, args), "--port", "0", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        # A runner may have told its children to ignore Ctrl-C.
        self.process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert self.process.stdout is not None
        told = ""
        while not told.endswith("}\n") and (line_ := self.process.stdout.readline()):
            told += line_
        assert told, self.process.communicate()[1]
        self.url = json.loads(told)["url"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page of `emoji` with two maps."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'trce[play]'")
    folder = tmp_path_factory.mktemp("maps")
    emoji = open_checkpoint("emoji").path
    files = [random_map(emoji, seed).save(folder / f"{name}.safetensors")
             for seed, name in ((1, "one"), (2, "two"))]  # fmt: skip
    page = Served("emoji", "--edit", files[0], "--edit", files[1], "--steps", 2)
    yield page
    page.process.kill()
    page.process.communicate()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page in a fresh window, whose requests and complaints are kept."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(WAIT)
    opened.asked, opened.complaints = [], []
    opened.on("request", lambda asked: opened.asked.append(asked.url))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.goto(served.url)
    opened.wait_for_selector("#prompt textarea")
    yield opened
    context.close()


def draw(page: Any, prompt: str = ASKED) -> None:
    page.fill("#prompt textarea", prompt)
    page.click("#draw button, button#draw")
    done(page, prompt)


def done(page: Any, prompt: str) -> None:
    page.wait_for_selector(f'.pairs[data-left="0"] img[alt*="{prompt}"]')


def shown(page: Any) -> list[np.ndarray]:
    sources = page.evaluate("[...document.querySelectorAll('.pairs img')].map(image => image.src)")
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in sources
    ]


def test_it_asks_nothing_of_others_and_forbids_it(page: Any, served: Served) -> None:
    draw(page, "a cat")
    assert [url for url in page.asked if not url.startswith((served.url, "data:"))] == []
    assert page.complaints == []
    failed = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'asked', () => 'refused')")
    assert failed == "refused"
    with urllib.request.urlopen(served.url) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    elsewhere = urllib.request.Request(served.url, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(elsewhere)


def test_it_draws_what_generate_draws_and_more_seeds(page: Any, trce: Any, tmp_path: Path) -> None:
    page.fill("#count input", "2")
    draw(page)
    before = shown(page)
    assert len(before) == 4  # two seeds, both sides
    told = trce("generate", "emoji", ASKED, "--steps", 2, "-n", 2, "-o", tmp_path / "out")
    assert told.status == 0, told.err
    for seed in (0, 1):
        assert (before[2 * seed] == np.asarray(Image.open(tmp_path / f"out/0001-seed{seed}.png"))).all()
        assert (before[2 * seed] != before[2 * seed + 1]).any()


def test_each_map_has_a_slider_and_at_nothing_both_sides_are_equal(page: Any) -> None:
    draw(page)
    sliders = page.locator(".strength input[type=range]")
    assert sliders.count() == 2
    sliders.nth(0).fill("0")
    page.wait_for_function("document.querySelectorAll('.role')[1].textContent == 'erased, two at 1'")
    sliders.nth(1).fill("0")
    page.wait_for_function("document.querySelectorAll('.role')[1].textContent == 'erased'")
    done(page, ASKED)
    original, erased = shown(page)
    assert (original == erased).all()


def test_sensitive_pictures_are_blurred_until_clicked_and_examples_can_be_clicked(page: Any) -> None:
    blurred = "[...document.querySelectorAll('.pairs img')].map(i => getComputedStyle(i).filter != 'none')"
    draw(page)
    assert page.evaluate(blurred) == [True, True]
    page.locator(".veil").nth(1).click()
    assert page.evaluate(blurred) == [True, False]
    harmless = page.locator(".examples", has_text="benign").locator("button", has_text="a").last
    text = harmless.text_content().strip()
    harmless.click()
    done(page, text)
    assert page.input_value("#prompt textarea") == text
    assert page.evaluate(blurred) == [False, False]
    draw(page)
    page.check("#show input")
    page.wait_for_function(f"!{blurred}.includes(true)")


def test_what_cannot_be_drawn_is_said_on_the_page(page: Any) -> None:
    page.fill("#prompt textarea", ASKED)
    page.get_by_label("Steps").fill("5000")
    page.click("#draw button, button#draw")
    page.wait_for_selector("text=draws in 1 to")


def test_a_narrow_screen_needs_no_sideways_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 420, "height": 900})
    draw(page)
    assert page.evaluate("document.documentElement.scrollWidth <= 420")
    original, erased = (frame.bounding_box() for frame in page.locator(".pair .frame").all()[:2])
    assert original["y"] == erased["y"]  # however long what stands above them is


def test_ctrl_c_ends_it_in_a_sentence(served: Served) -> None:
    served.process.send_signal(signal.SIGINT)
    _, said = served.process.communicate(timeout=60)
    assert served.process.returncode == 130
    assert said.endswith("Error: The page is closed.\nHint: Run the same line to open it again.\n")
    assert "Traceback" not in said
