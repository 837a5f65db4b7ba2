"""`cloc-mllm demo` in a real browser, started as a user starts it.

Every tab is used by mouse, by touch and by keys, on a desktop and on a phone. No page asks another
host anything, or leaves an error in the console.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import Record
from tests.tiny_mllm import cloc_dir

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

__all__ = ["cloc_dir"]

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
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
_LEAST_PATIENCE_S = 60
# Gradio measures its row of tabs in several steps, which show and hide the button for more.
_TABS_ARE_LAID_OUT = """async () => {
    const row = () => [...document.querySelectorAll('[role=tab], .overflow-menu > button')]
        .map(button => button.checkVisibility({visibilityProperty: true})).join();
    const before = row();
    await new Promise(done => setTimeout(done, 300));
    return before.includes('true') && row() === before;
}"""
_PATIENCE_PER_START = 10  # a quiet machine starts the demo in 6 s, and a busy one is slow at all


class Demo(NamedTuple):
    """A running demo, and how long a page of it may take on this machine as busy as it is."""

    address: str
    patience_s: float

    @property
    def patience_ms(self) -> float:
        return 1000 * self.patience_s


@pytest.fixture(scope="module")
def demo(
    project_root: Path,
    cloc_dir: Path,
    tiny_scenes: list[Record],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Demo]:
    """The shipped models for the built-in drawings, which answer in words, too; all tabs."""
    data = tmp_path_factory.mktemp("data") / "records"
    drops = DropLog()
    drops.add("record", "img-7", "missing_image", "photo.jpg")
    write_records(tiny_scenes, data, drop_log=drops)
    options = ["--model", "scenes", "--compare", str(cloc_dir), "--data", str(data)]
    with served(project_root, *options) as demo:
        yield demo


@pytest.fixture(scope="module")
def photos_demo(project_root: Path) -> Iterator[Demo]:
    """What `cloc-mllm demo` serves without any option: the model for photos, without words."""
    with served(project_root) as demo:
        yield demo


@contextmanager
def served(project_root: Path, *options: str) -> Iterator[Demo]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cloc_mllm.cli", "demo", "--port", str(port)]
    command += options
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
    with opened(browser, demo, request.param) as page:
        yield page


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def photos_page(request: pytest.FixtureRequest, browser, photos_demo: Demo) -> Iterator:
    with opened(browser, photos_demo, request.param) as page:
        yield page


@contextmanager
def opened(
    browser, demo: Demo, size: dict, theme: str = "light", touch: bool | None = None
) -> Iterator:
    """An open page. At the end: nothing was asked of any other host, no script failed.

    Args:
        touch: whether the screen takes fingers; by default a phone's does.
    """
    touch = size is PHONE if touch is None else touch
    context = browser.new_context(viewport=size, has_touch=touch, is_mobile=touch and size is PHONE)
    page = context.new_page()
    page.set_default_timeout(demo.patience_ms)
    elsewhere: list[str] = []
    failures: list[str] = []

    def note(asked) -> None:
        if not asked.url.startswith((demo.address, "data:", "blob:")):
            elsewhere.append(asked.url)

    page.on("request", note)
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("dialog", lambda dialog: failures.append(dialog.message))
    page.on("console", lambda said: said.type == "error" and failures.append(said.text))
    page.goto(f"{demo.address}?__theme={theme}")
    page.wait_for_function("document.querySelector('#surface .picture')?.naturalWidth > 0")
    yield page
    context.close()
    assert elsewhere == []
    assert failures == []


def draw(page, *points: tuple[float, float]) -> None:
    """Draw a stroke through points, in shares of the picture: by touch where the screen takes it,
    else by mouse."""
    picture = page.locator("#surface .picture")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    path = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    if not page.evaluate("navigator.maxTouchPoints"):
        page.mouse.move(*path[0])
        page.mouse.down()
        for place in path[1:]:
            page.mouse.move(*place, steps=4)
        page.mouse.up()
        return
    finger = page.context.new_cdp_session(page)
    for kind, place in [("touchStart", path[0]), *(("touchMove", place) for place in path[1:])]:
        event = {"type": kind, "touchPoints": [{"x": place[0], "y": place[1]}]}
        finger.send("Input.dispatchTouchEvent", event)
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    finger.detach()


def tab(page, name: str, press: Callable[[Any], None] = lambda button: button.click()) -> None:
    """Open a tab; on a phone some are behind the button for more."""
    page.wait_for_function(_TABS_ARE_LAID_OUT)
    button = page.get_by_role("tab", name=name, exact=True)
    if not button.is_visible():
        press(page.locator(".overflow-menu > button"))
        button = page.locator(".overflow-dropdown button", has_text=name)
    press(button)


def type_into(page, field: str, text: str) -> None:
    box = page.locator(field).get_by_role("textbox")
    box.fill(text)
    box.press("Enter")


def boxes(page) -> list[str]:
    """The tags of the boxes on the picture."""
    return page.locator("#surface .tags span").all_inner_texts()


def upload(page, path: Path) -> None:
    before = page.locator("#surface .picture").get_attribute("src")
    page.set_input_files("#upload input, input[type=file]", str(path))
    page.wait_for_function(
        "before => document.querySelector('#surface .picture').src != before", arg=before
    )


def test_phrases_and_boxes_are_linked_both_ways(page) -> None:
    type_into(page, "#phrases", "<img src=x onerror=alert(1)>, ${alert(2)}, {{7*7}}")
    page.wait_for_function("document.querySelectorAll('#found .answer small').length == 6")
    buttons = page.locator("#found button.phrase")
    assert buttons.all_inner_texts() == ["<img src=x onerror=alert(1)>", "${alert(2)}", "{{7*7}}"]
    assert set(boxes(page)) <= set(buttons.all_inner_texts()) and boxes(page)
    text = page.locator("#found").inner_text()
    assert "Language model" in text and "similarity" in text
    assert re.search(r"Encoding the picture took \d+ ms|already encoded", text)
    colors = {
        button.evaluate("b => getComputedStyle(b).backgroundColor") for button in buttons.all()
    }
    assert len(colors) == 3

    buttons.nth(1).click()
    assert buttons.nth(1).get_attribute("aria-pressed") == "true"
    lit = page.locator("#surface svg .mark.lit")
    assert {mark.get_attribute("data-group") for mark in lit.all()} == {"1"}
    # the box that is tapped lights up its phrase; a small box may lie on top of it
    box = page.locator("#surface svg .mark[data-group='1']").last.bounding_box()
    picture = page.locator("#surface .picture").bounding_box()
    x = (box["x"] + box["width"] / 2 - picture["x"]) / picture["width"]
    y = (box["y"] + box["height"] / 2 - picture["y"]) / picture["height"]
    buttons.nth(1).click()
    assert page.locator("#found .phrase.lit").count() == 0
    draw(page, (min(max(x, 0.01), 0.99), min(max(y, 0.01), 0.99)))
    assert page.locator("#found .phrase[aria-pressed=true]").count() == 1


def test_a_suggestion_is_one_click(page, demo: Demo) -> None:
    suggestions = page.locator("#suggestions button")
    sync_api.expect(suggestions.first).to_have_text(re.compile(r"\w"), timeout=demo.patience_ms)
    before = suggestions.first.inner_text()
    page.locator("#examples button").nth(1).click()
    sync_api.expect(suggestions.first).not_to_have_text(before, timeout=demo.patience_ms)
    wanted = suggestions.first.inner_text()
    suggestions.first.click()
    page.wait_for_selector("#found .answer")
    sync_api.expect(page.locator("#phrases").get_by_role("textbox")).to_have_value(
        wanted, timeout=demo.patience_ms
    )


@pytest.mark.parametrize("tool", ["box", "point", "scribble"])
def test_a_drawing_is_named(page, tool: str) -> None:
    page.locator(f"[data-tool={tool}]").click()
    draw(page, (0.2, 0.3), (0.5, 0.7), (0.7, 0.8))
    page.wait_for_selector("#named .closest")
    assert page.locator("#named .closest tbody tr").count() == 8
    assert page.get_by_text("learnt boxes alone").count() == (tool != "box")
    assert page.locator("#surface svg .asked").count() == (1 if tool == "box" else 2)


def test_questions_keep_the_region(page, demo: Demo) -> None:
    draw(page, (0.2, 0.3), (0.7, 0.8))
    page.wait_for_selector("#named .closest")
    type_into(page, "#names", "crab, <b>boat</b>")
    page.wait_for_function("document.querySelectorAll('#named .closest tbody tr').length == 2")
    assert "<b>boat</b>" in page.locator("#named").inner_text()
    for count, question in enumerate(["What is <i>this</i>?", "Is it red?"], 1):
        type_into(page, "#question", question)
        page.wait_for_function(f"document.querySelectorAll('#replies .said').length == {count}")
        sync_api.expect(page.locator("#question").get_by_role("textbox")).to_have_value(
            "", timeout=demo.patience_ms
        )
        assert question in page.locator("#replies").inner_text()
        sync_api.expect(page.locator("#surface svg .asked")).to_have_count(1)
    page.locator("#surface .clear").click()
    page.locator("#named .hint").wait_for()
    sync_api.expect(page.locator("#surface svg .asked")).to_have_count(0)


def test_the_pen_works_by_keys(page) -> None:
    page.locator("#surface .stage").focus()
    for key in ["ArrowLeft", "ArrowUp", "Enter", *["ArrowRight"] * 9, *["Shift+ArrowDown"] * 30]:
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    page.wait_for_selector("#named .closest")
    box = page.locator("#surface svg .asked")
    actual = [float(box.get_attribute(name)) for name in ("x", "y", "width", "height")]
    assert actual == pytest.approx([480, 480, 180, 120])
    page.keyboard.press("Escape")
    page.locator("#named .hint").wait_for()
    page.locator("[data-tool=scribble]").press("Enter")
    page.locator("#surface .stage").focus()
    for key in ["Enter", "ArrowRight", "ArrowDown", "ArrowDown", " "]:
        page.keyboard.press(key)
    page.wait_for_selector("#named .closest")
    page.locator("[data-tool=point]").press("Enter")
    page.locator("#surface .stage").press("Enter")
    page.wait_for_selector("#surface svg .dot.asked", state="attached")


@pytest.mark.parametrize(
    "size", [(1600, 400), (300, 900), (160, 120)], ids=["wide", "tall", "small"]
)
def test_drawings_land_where_they_were_made(page, size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, "white").save(tmp_path / "white.png")
    upload(page, tmp_path / "white.png")
    draw(page, (0.25, 0.25), (0.75, 0.75))
    page.wait_for_selector("#named .closest")
    box = page.locator("#surface svg .asked")
    actual = [float(box.get_attribute(name)) for name in ("x", "y", "width", "height")]
    assert actual == pytest.approx([250, 250, 500, 500], abs=15)  # a pixel of the small picture


def test_the_encoder_is_explored(page) -> None:
    tab(page, "Explore")
    type_into(page, "#heat-phrase", "the <b>crab</b>")
    page.locator("#surface .heat").wait_for()
    assert "orange" in page.locator("#heat").inner_text()
    draw(page, (0.2, 0.3), (0.7, 0.8))
    page.locator("#surface svg .asked").wait_for(state="attached")
    page.locator("#surface .heat").wait_for(state="hidden")
    assert page.locator("#readings").is_visible()  # the tab is not left
    page.locator("#explore-names").get_by_role("textbox").fill("crab, boat, <i>key</i>")
    page.locator("#compare-encoders").click()
    page.wait_for_selector("#readings .readings")
    assert page.locator("#readings tbody tr").count() == 3
    assert "<i>key</i>" in page.locator("#readings").inner_text()
    page.locator("#search").click()
    page.wait_for_selector("#hits img")
    assert page.locator("#hits").get_by_text("cosine").count() == 3  # the other scenes


def test_a_chat_keeps_its_turns(page, demo: Demo) -> None:
    tab(page, "Chat")
    draw(page, (0.2, 0.3), (0.7, 0.8))
    page.locator("#surface svg .asked").wait_for(state="attached")
    for count, question in enumerate(["What is <i>this</i>?", "Where is it?"], 1):
        type_into(page, "#chat-question", question)
        page.wait_for_function(f"document.querySelectorAll('#talk .said').length == {count}")
        sync_api.expect(page.locator("#chat-question").get_by_role("textbox")).to_have_value(
            "", timeout=demo.patience_ms
        )
    asked = page.locator("#talk .asked").all_inner_texts()
    assert asked[0].startswith("What is <i>this</i>?") and "▭ 1" in asked[0]
    assert asked[1] == "Where is it?"
    page.locator("#chat-new").click()
    page.locator("#talk .hint").wait_for()


def test_two_checkpoints_are_compared(page, demo: Demo) -> None:
    suggestion = page.locator("#suggestions button").nth(1)
    sync_api.expect(suggestion).to_have_text(re.compile(r"\w"), timeout=demo.patience_ms)
    known = suggestion.inner_text()
    tab(page, "Compare")
    type_into(page, "#compare-phrase", known)
    page.locator("#compared table").wait_for()
    assert page.locator("#compared .phrase").count() == 2
    assert re.search(r"IoU with the true box\s+0\.\d\d", page.locator("#compared").inner_text())
    assert "true" in boxes(page)
    page.locator("#known button").first.wait_for()


def test_a_set_is_browsed(page) -> None:
    tab(page, "Data")
    page.locator("#data-next").click()
    page.locator("#data-item").get_by_text("1 of 16").wait_for()
    first = boxes(page)
    page.locator("#data-next").click()
    page.locator("#data-item").get_by_text("2 of 16").wait_for()
    assert first and boxes(page) != first
    page.locator("#data-item .phrase").first.click()
    assert page.locator("#surface svg .mark.lit").count() == 1
    wanted = page.locator("#data-item .phrase").first.inner_text().split(";")[0]
    type_into(page, "#data-words", wanted)
    page.locator("#data-item").get_by_text(re.compile(r"^1 of \d$")).wait_for()
    page.get_by_text("What the build left out").click()
    type_into(page, "#drop-words", "img-7")
    page.get_by_text("expected a file of this name").wait_for()


def test_answers_are_exported(page, tmp_path: Path) -> None:
    type_into(page, "#phrases", "the crab, the <b>boat</b>")
    page.wait_for_function("document.querySelectorAll('#found .answer small').length == 4")
    saved = {}
    for button in ("save-picture", "save-json"):
        with page.expect_download() as download:
            page.locator(f".{button}").click()
        download.value.save_as(tmp_path / button)
        saved[button] = tmp_path / button
    with Image.open(saved["save-picture"]) as drawn:
        assert max(drawn.size) == 512
    answer = json.loads(saved["save-json"].read_text())
    assert {box["phrase"] for box in answer["boxes"]} == {"the crab", "the <b>boat</b>"}
    for box in answer["boxes"]:
        wide = zip(box["box_norm"], [answer["width"], answer["height"]] * 2, strict=True)
        assert box["box_px"] == pytest.approx([value * side for value, side in wide])
    page.locator(".copy-python").click()
    code = page.locator("#surface .python").input_value()
    compile(code, "snippet", "exec")
    assert "predictor.ground(" in code


def test_a_file_that_is_no_picture_is_explained(page, tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<html>")
    page.set_input_files("#upload input, input[type=file]", str(tmp_path / "page.png"))
    page.get_by_text("not_an_image").first.wait_for()


def test_without_words_the_page_says_what_brings_them(photos_page) -> None:
    page = photos_page
    assert page.locator("#credit").inner_text().startswith("Photo by its author on Flickr, CC BY")
    type_into(page, "#phrases", "the dog, a zebra")
    page.wait_for_function("document.querySelectorAll('#found .answer').length == 2")
    assert boxes(page) == ["the dog", "a zebra"]
    assert page.get_by_text("cloc-mllm demo --mllm photos").first.is_visible()
    draw(page, (0.2, 0.3), (0.7, 0.9))
    page.wait_for_selector("#named .closest")
    tab(page, "Chat")
    page.get_by_text("A chat needs a language model").wait_for()
    tab(page, "Compare")
    page.get_by_text("cloc-mllm demo --compare DIR").wait_for()
    tab(page, "Data")
    page.get_by_text("cloc-mllm demo --data DIR").wait_for()
    tab(page, "Refer")
    assert "Likeliest of 3000 names" in page.locator("#named").inner_text()


class Hand(NamedTuple):
    """One way to use a page: `mouse`, `touch` or `keys`."""

    page: Any
    way: str

    def press(self, button) -> None:
        if self.way == "keys":
            button.press("Enter")
        elif self.way == "touch":
            button.tap()
        else:
            button.click()

    def write(self, field: str, text: str) -> None:
        box = self.page.locator(field).get_by_role("textbox")
        if self.way != "keys":
            self.press(box)
        box.press_sequentially(text)
        box.press("Enter")

    def draw(self) -> None:
        """Draws another box, and waits until the server knows it."""
        clear = self.page.locator("#surface .clear")
        self.press(clear)
        self.page.locator("#named .hint").wait_for(state="attached")
        if self.way == "keys":
            self.page.locator("#surface .stage").focus()
            for key in ["ArrowLeft", "Enter", *["ArrowRight"] * 9, *["ArrowDown"] * 9, "Enter"]:
                self.page.keyboard.press(key)
        else:
            draw(self.page, (0.2, 0.3), (0.7, 0.8))
        self.page.locator("#named .closest").wait_for(state="attached")
        # the picture's own answer may come a moment after the names
        sync_api.expect(self.page.locator("#surface svg .asked")).to_have_count(1)
        assert boxes(self.page) == []


def use_ground(hand: Hand) -> None:
    hand.write("#phrases", "the crab, the boat")
    hand.page.wait_for_function("document.querySelectorAll('#found .answer small').length == 4")
    light_up(hand, "#found")


def use_refer(hand: Hand) -> None:
    hand.draw()
    assert hand.page.locator("#named .closest").is_visible()
    hand.write("#question", "Is it red?")
    hand.page.locator("#replies .said").wait_for()


def use_explore(hand: Hand) -> None:
    hand.write("#heat-phrase", "the crab")
    hand.page.locator("#surface .heat").wait_for()
    hand.draw()
    hand.press(hand.page.locator("#compare-encoders"))
    hand.page.wait_for_selector("#readings table")


def use_chat(hand: Hand) -> None:
    hand.draw()
    hand.write("#chat-question", "What is this?")
    hand.page.locator("#talk .said").wait_for()
    light_up(hand, "#talk")


def use_compare(hand: Hand) -> None:
    known = hand.page.locator("#suggestions button").nth(1).text_content().strip()
    hand.write("#compare-phrase", known)
    hand.page.locator("#compared table").wait_for()
    assert "true" in boxes(hand.page)
    light_up(hand, "#compared")
    hand.draw()
    assert hand.page.locator("#compared table").is_visible()  # the tab is not left


def use_data(hand: Hand) -> None:
    hand.press(hand.page.locator("#data-next"))
    hand.page.locator("#data-item").get_by_text("1 of 16").wait_for()
    light_up(hand, "#data-item")
    hand.draw()
    assert hand.page.locator("#data-item .phrase").first.is_visible()


def light_up(hand: Hand, answers: str) -> None:
    hand.press(hand.page.locator(f"{answers} .phrase").first)
    hand.page.locator(f"{answers} .phrase[aria-pressed=true]").wait_for()


TABS = {
    "Ground": use_ground,
    "Refer": use_refer,
    "Explore": use_explore,
    "Chat": use_chat,
    "Compare": use_compare,
    "Data": use_data,
}


@pytest.mark.parametrize(
    ("way", "theme"), [("mouse", "light"), ("touch", "light"), ("keys", "dark")]
)
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_tab_is_used_and_has_no_barriers(
    browser, demo: Demo, size: dict, way: str, theme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    found = {}
    with opened(browser, demo, size, theme, touch=way == "touch") as page:
        hand = Hand(page, way)
        for name, use in TABS.items():
            tab(page, name, hand.press)
            use(hand)
            if way != "mouse":  # which sees the page that touch sees
                found[name] = barriers(page, axe.Axe())
    assert not any(found.values()), found


def barriers(page, axe) -> list[str]:
    """The serious findings of axe, with what they are about, once nothing moves or fades."""
    page.wait_for_function("!document.querySelector('.pending, .generating')")
    page.wait_for_function("document.getAnimations().every(one => one.playState !== 'running')")
    return [
        f"{finding['id']}: {node['html'][:200]} {node['failureSummary']}"
        for finding in axe.run(page).response["violations"]
        if finding["impact"] in ("serious", "critical")
        for node in finding["nodes"]
    ]
