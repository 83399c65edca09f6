"""The page in a real browser: Chromium, driven by Playwright, which is installed for this alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from serving import Served
from test_server import FLAGS, SPEC
from tiny import make

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

SCRIPT = r"""
import sys
from playwright.sync_api import sync_playwright

url, chromium, folder = sys.argv[1:]
text = " ".join(f"The number of house {n} is {n * 37 % 101}." for n in range(60))
wrong = []
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for width, height, scheme in ((1400, 900, "light"), (400, 800, "dark")):
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.goto(url + "/")
        page.wait_for_selector("#model:not(:empty)")
        assert page.evaluate("document.activeElement.id") == "question"
        dropped = page.evaluate_handle(
            "text => { const all = new DataTransfer();"
            "all.items.add(new File([text], 'houses.txt')); return all }",
            f"Told {width} times. {text}",
        )
        page.dispatch_event("main", "drop", {"dataTransfer": dropped})
        page.wait_for_selector("#documents li")
        page.keyboard.type("Which number has house 17?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#reading:not([hidden])")
        assert "of" in page.inner_text("#read")
        page.screenshot(path=f"{folder}/reading-{width}.png")
        page.wait_for_selector(".account")
        assert "read" in page.inner_text(".account")
        if width < 960:
            page.click("text=Show the document")
        page.wait_for_selector("#kept:not([hidden])")
        report = page.frame_locator("#report")
        report.locator("text=What was kept").first.wait_for()
        assert "Which number has house 17?" in report.locator("body").inner_text()
        assert "evicted" in report.locator("body").inner_text()
        page.screenshot(path=f"{folder}/answer-{width}.png")
        # nothing is wider than the window
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # the second question, by keyboard alone
        page.focus("#question")
        page.keyboard.type("And house 18?")
        page.keyboard.press("Enter")
        page.locator(".account").nth(1).wait_for()
        assert "read before" in page.inner_text("li:last-child .account")
        page.keyboard.press("Escape")
        assert page.is_hidden("#kept")
    browser.close()
assert not wrong, wrong
print("the page works")
"""


def environment(folder: Path, *packages: str) -> Path:
    """A Python with some packages, of its own; kept where LASERKV_CLIENTS says."""
    kept = os.environ.get("LASERKV_CLIENTS")
    place = (Path(kept) if kept else folder) / "-".join(packages).replace("[", "_").replace("]", "")
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not (place / "whole").exists():
        venv.create(place, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (place / "whole").touch()
    return python


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    python = environment(tmp_path, "playwright")
    tiny = make(tmp_path, spec=SPEC)
    pictures = Path(os.environ.get("LASERKV_PICTURES", tmp_path))
    with Served(tiny.path, *FLAGS, "--cache-dir", str(tmp_path / "cache")) as one:
        done = subprocess.run(
            [python, "-c", SCRIPT, one.url, str(CHROMIUM), str(pictures)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "the page works" in done.stdout
