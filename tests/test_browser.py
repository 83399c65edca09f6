"""The report's page in a real browser: opening, scrolling, searching, and hostile documents.

Screenshots go into the folder that LASERKV_SCREENSHOTS names, for somebody to look at.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_retention import HOSTILE, sample

from laserkv_gguf.retention import page as pages
from laserkv_gguf.retention.spans import EVICTED

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")

WORDS = "The supply ship came in May, and nobody on the island saw it before the fog was gone. \n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    with playwright.sync_playwright() as started:
        try:
            # as root, which CI often is, Chromium has no sandbox
            opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


class Shown:
    """A page that was opened, and whatever went wrong in it."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1400, "height": 900}, **options})
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on(
            "console",
            lambda said: self.wrong.append(said.text) if said.type == "error" else None,
        )
        self.page.on("request", self._asked)
        started = time.perf_counter()
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]", state="attached")
        self.seconds = time.perf_counter() - started

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.wrong.append(request.url)


def test_a_hundred_thousand_tokens(browser: Any, tmp_path: Path) -> None:
    """Open in under two seconds, of which a busy machine may take more; drawn as one scrolls."""
    path = tmp_path / "long.html"
    pages.write(path, [sample(WORDS, 100_000)])
    shown = Shown(browser, path)
    print(f"opened after {shown.seconds:.2f} s")
    assert shown.seconds < 60
    drawn = shown.page.locator("main i").count()
    assert 0 < drawn < 20_000
    slowest = shown.page.evaluate(
        """async () => {
            let slowest = 0, before = performance.now();
            for (let i = 0; i < 60; i++) {
                scrollBy(0, 1500);
                await new Promise(requestAnimationFrame);
                const now = performance.now();
                slowest = Math.max(slowest, now - before);
                before = now;
            }
            return slowest;
        }"""
    )
    print(f"slowest of 60 frames {slowest:.0f} ms")
    shown.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    shown.page.wait_for_function("document.querySelector('main').lastChild.chunk.drawn")
    assert shown.wrong == []


def test_what_is_shown_of_a_token(browser: Any, tmp_path: Path) -> None:
    path, given = tmp_path / "one.html", sample(WORDS * 3)
    pages.write(path, [given])
    shown = Shown(browser, path)
    assert shown.page.locator("main .chunk").all_text_contents() == ["".join(given.pieces)]
    for index in (0, 20, 100):
        token = shown.page.locator("main i").nth(index)
        assert token.text_content() == given.pieces[index]
        token.dispatch_event("mousemove", {"clientX": 10, "clientY": 10})
        said = shown.page.locator("#tip").text_content()
        assert f"score {given.scores[index]:.3g}"[:9] in said
        kept = given.states[index] != EVICTED
        assert (f"position {given.positions[index]}" in said) == kept
        assert ("evicted" in said) != kept
        assert "apwe"[given.states[index]] in token.get_attribute("class").split()
    shown.page.fill("#search", "SHIP")
    shown.page.keyboard.press("Enter")
    assert shown.page.locator("#found").text_content() == "1 of 3"
    assert "".join(shown.page.locator("main i.hit").all_text_contents()) == "ship" * 3
    shown.page.locator(".tokens i").first.click()
    assert "looked most at" in shown.page.locator(".looks").text_content()
    assert shown.page.locator("main i.seen").all_text_contents() == ["T"]
    shown.page.select_option("#shade", "looked")
    assert shown.wrong == []


def test_two_stand_side_by_side(browser: Any, tmp_path: Path) -> None:
    path, one = tmp_path / "two.html", sample(WORDS * 3)
    other = replace(one, title="other", states=np.full(len(one), EVICTED, np.uint8))
    pages.write(path, [one, other])
    shown = Shown(browser, path)
    assert shown.page.locator("main .chunk:visible").count() == 2
    differ = int((one.states != EVICTED).sum())
    assert shown.page.locator("main i.d").count() == 2 * differ
    shown.page.select_option("#view", "b")
    assert shown.page.locator("main .chunk:visible").count() == 1
    narrow = Shown(browser, path, viewport={"width": 400, "height": 800})
    assert narrow.page.locator("main .chunk:visible").count() == 1
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert shown.wrong == narrow.wrong == []


def test_a_hostile_document_does_nothing(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    pages.write(path, [sample()])
    shown = Shown(browser, path)
    assert shown.page.evaluate("document.querySelectorAll('img, svg').length") == 0
    assert shown.page.locator("main .chunk").evaluate("e => e.textContent") == HOSTILE
    shown.page.locator(".tokens i").first.click()
    shown.page.fill("#search", "<script>")
    shown.page.keyboard.press("Enter")
    shown.page.locator("main i").nth(5).hover()
    assert shown.wrong == []


def test_print_shows_all(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "printed.html"
    pages.write(path, [sample(WORDS, 30_000)])
    shown = Shown(browser, path)
    shown.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown.page.locator("main i").count() == len(sample(WORDS, 30_000))


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_to_look_at(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "look.html"
    pages.write(path, [sample(WORDS, 3000)])
    size = {"width": width, "height": 900}
    shown = Shown(browser, path, viewport=size, color_scheme=scheme)
    folder = Path(os.environ.get("LASERKV_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"report-{width}-{scheme}.png"
    shown.page.screenshot(path=target)
    assert target.stat().st_size > 5000
    assert shown.wrong == []
