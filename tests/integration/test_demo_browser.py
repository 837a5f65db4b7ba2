"""`cloc-mllm demo` in a real browser, started as a user starts it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tests.tiny_mllm import cloc_dir, llm_dir, mllm_dir

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

__all__ = ["cloc_dir", "llm_dir", "mllm_dir"]

BROWSER_FLAGS = [
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
_LEAST_PATIENCE_S = 60
_PATIENCE_PER_START = 10  # a quiet machine starts the demo in 6 s, and a busy one is slow at all


class Demo(NamedTuple):
    """A running demo, and how long a page of it may take on this machine as busy as it is."""

    address: str
    patience_s: float

    @property
    def patience_ms(self) -> float:
        return 1000 * self.patience_s


@pytest.fixture(scope="module")
def demo(cloc_dir: Path, mllm_dir: Path, project_root: Path) -> Iterator[Demo]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cloc_mllm.cli", "demo", "--port", str(port)]
    command += ["--cloc", str(cloc_dir), "--mllm", str(mllm_dir)]
    patience_s: float = _LEAST_PATIENCE_S
    with tempfile.TemporaryFile("w+") as log:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        begun = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=project_root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            started = any("127.0.0.1" in line for line in process.stdout)
            log.seek(0)
            assert started, log.read()
            patience_s = max(patience_s, _PATIENCE_PER_START * (time.monotonic() - begun))
            yield Demo(f"http://127.0.0.1:{port}/", patience_s)
        finally:
            process.terminate()
            process.wait(patience_s)


@pytest.fixture(scope="module")
def browser(chromium: str, demo: Demo) -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=BROWSER_FLAGS, timeout=demo.patience_ms
        )
        yield browser
        browser.close()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser, demo: Demo) -> Iterator:
    """The open page. At the end: nothing was asked of any other host, no script failed."""
    page = browser.new_page(viewport=request.param)
    page.set_default_timeout(demo.patience_ms)
    elsewhere: list[str] = []
    failures: list[str] = []

    def note(asked) -> None:
        if not asked.url.startswith((demo.address, "data:", "blob:")):
            elsewhere.append(asked.url)

    page.on("request", note)
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("dialog", lambda dialog: failures.append(dialog.message))
    page.goto(demo.address)
    page.wait_for_selector("#picture img")
    yield page
    page.close()
    assert elsewhere == []
    assert failures == []


def click_picture(page, x: float, y: float) -> None:
    """Click at a share of the picture's width and height."""
    image = page.locator("#picture img")
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    before = image.get_attribute("src")
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.wait_for_function(
        "before => document.querySelector('#picture img').src != before", arg=before
    )


def upload(page, path: Path) -> None:
    before = page.locator("#picture img").get_attribute("src")
    page.set_input_files("#upload input, input[type=file]", str(path))
    page.wait_for_function(
        "before => document.querySelector('#picture img').src != before", arg=before
    )


def test_type_a_phrase_and_see_the_box(page) -> None:
    before = page.locator("#picture img").get_attribute("src")
    page.locator("#phrase").get_by_role("textbox").fill("<img src=x onerror=alert(1)> ${alert(2)}")
    page.locator("#find").click()
    page.wait_for_selector("#found .answer")
    assert page.locator("#picture img").get_attribute("src") != before
    text = page.locator("#found").inner_text()
    assert "Language model" in text and "CLOC head" in text
    assert re.search(r"Encoding the picture took \d+ ms|already encoded", text)


def test_a_suggestion_is_one_click(page, demo: Demo) -> None:
    suggestions = page.locator("#suggestions button")
    before = suggestions.all_inner_texts()
    page.locator("#examples button").nth(1).click()
    sync_api.expect(suggestions).not_to_have_text(before, timeout=demo.patience_ms)
    wanted = suggestions.first.inner_text()
    suggestions.first.click()
    page.wait_for_selector("#found .answer")
    assert page.locator("#phrase").get_by_role("textbox").input_value() == wanted


def test_two_clicks_name_what_is_in_the_box(page) -> None:
    click_picture(page, 0.2, 0.3)
    page.get_by_text("Now click the opposite corner").wait_for()
    click_picture(page, 0.7, 0.8)
    page.wait_for_selector("#named .closest")
    assert page.locator("#named .closest tr").count() == 9
    page.locator("#names").get_by_role("textbox").fill("crab, <b>boat</b>")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelectorAll('#named .closest tr').length == 3")
    assert "<b>boat</b>" in page.locator("#named").inner_text()
    page.locator("#clear-box").click()
    page.get_by_text("Click two opposite corners").wait_for()


def test_the_second_click_may_follow_at_once(page) -> None:
    image = page.locator("#picture img")
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    for share in (0.2, 0.7):
        page.mouse.click(box["x"] + share * box["width"], box["y"] + share * box["height"])
    page.wait_for_selector("#named .closest")


@pytest.mark.parametrize(
    "size", [(1600, 400), (300, 900), (160, 120)], ids=["wide", "tall", "small"]
)
def test_clicks_land_where_they_were_made(page, size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, "white").save(tmp_path / "white.png")
    upload(page, tmp_path / "white.png")
    click_picture(page, 0.25, 0.25)
    click_picture(page, 0.75, 0.75)
    page.wait_for_selector("#named .closest")
    source = page.locator("#picture img").get_attribute("src")
    downloaded = page.request.get(source).body()
    (tmp_path / "drawn.webp").write_bytes(downloaded)
    with Image.open(tmp_path / "drawn.webp") as drawn:
        dark = drawn.convert("L").point(lambda value: 255 if value < 90 else 0)
        left, _, right, bottom = dark.getbbox()
        width, height = drawn.size
    assert abs(left / width - 0.25) < 0.03
    assert abs(bottom / height - 0.75) < 0.03
    assert right / width > 0.72  # the tag may stand out to the right


def test_a_file_that_is_no_picture_is_explained(page, tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>")
    page.set_input_files("#upload input, input[type=file]", str(tmp_path / "page.png"))
    page.get_by_text("not_an_image").first.wait_for()
