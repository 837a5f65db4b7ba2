"""The layout and events of the Gradio page; questions are in `engine`, pixels in `pictures`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from cloc_mllm.demo import answers
from cloc_mllm.demo.engine import MAX_PHRASE_CHARS, DemoEngine, parse_names
from cloc_mllm.demo.guard import RequestGuard
from cloc_mllm.demo.pictures import (
    Picture,
    clear_box,
    click,
    draw,
    example_pictures,
    open_picture,
)

MAX_UPLOAD = "20mb"
_NUM_EXAMPLES = 8
_MAX_WAITING = 32
_MAX_SESSIONS = 64
_ONE_HOUR_S = 3600

_INTRO = """# Find it, name it
Type what to look for, or click two corners of a box on the picture to ask what is in it.
Everything runs on this machine.
"""
_CLOC_ONLY = """Only CLOC is loaded: its own head draws the boxes and ranks the names.
For answers by a language model start with `--model scenes` (built-in drawings) or `--mllm DIR`."""


def build_page(engine: DemoEngine) -> gr.Blocks:
    """Builds the page. It may generate the example pictures, which takes a moment.

    The examples are photos for a model that has a list of phrases, as the one for photos does.
    """
    kind: Literal["scenes", "photos"] = "scenes" if engine.cloc.phrases is None else "photos"
    handlers = Handlers(engine, example_pictures(_NUM_EXAMPLES, kind))
    first = handlers.examples[0]
    with gr.Blocks(
        title="cloc-mllm demo",
        analytics_enabled=False,
        delete_cache=(_ONE_HOUR_S, _ONE_HOUR_S),
    ) as page:
        gr.Markdown(_INTRO)
        picture = gr.State(first, time_to_live=_ONE_HOUR_S)
        with gr.Row(elem_id="choose"):
            upload_button, gallery = _picture_choice(handlers.examples)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                canvas = _canvas(first)
            with gr.Column(scale=2, min_width=320):
                if engine.grounding is None:
                    gr.Markdown(_CLOC_ONLY, elem_id="cloc-only")
                with gr.Tabs() as tabs:
                    with gr.Tab("Find it", id="find"):
                        phrase, find_button, suggestions, found = _find_tab(first)
                    with gr.Tab("Name it", id="name"):
                        named, names, clear_button = _name_tab()

        # choosing another picture changes all of these
        shown = [picture, canvas, suggestions, phrase, found, named]
        upload_button.upload(handlers.upload, upload_button, shown, api_name="set_picture")
        gallery.select(handlers.choose_example, None, shown, api_visibility="private")

        ask: dict[str, Any] = {"fn": handlers.find, "inputs": [picture, phrase]}
        ask |= {"outputs": [picture, canvas, found], "concurrency_id": "model"}
        find_button.click(**ask, api_name="find")
        phrase.submit(**ask, api_visibility="private")
        suggestions.click(_first_cell, suggestions, phrase, api_visibility="private").success(
            **ask, api_visibility="private"
        )

        ask = {"fn": handlers.name, "inputs": [picture, names]}
        ask |= {"outputs": named, "concurrency_id": "model", "api_visibility": "private"}
        drawn = [picture, canvas, named, tabs]
        # by default a click is lost while the one before it is still being answered
        canvas.select(
            handlers.click,
            picture,
            drawn,
            trigger_mode="multiple",
            show_progress="hidden",
            api_visibility="private",
        ).success(**ask, trigger_mode="multiple")
        names.submit(**ask)
        clear_button.click(handlers.clear_box, picture, drawn, api_visibility="private")
    page.queue(max_size=_MAX_WAITING, api_open=False, default_concurrency_limit=1)
    return page


def serve(page: gr.Blocks, *, host: str, port: int, share: bool = False, block: bool = True) -> str:
    """Serves a page until it is interrupted, or in the background if not `block`.

    Returns:
        the address of the page.

    Raises:
        ValueError: the port is taken.
    """
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=not block,
            show_error=False,  # visitors still see a gr.Error, but no other message
            max_file_size=MAX_UPLOAD,
            allowed_paths=[],
            state_session_capacity=_MAX_SESSIONS,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=gr.themes.Soft(primary_hue="blue", font=["system-ui", "sans-serif"]),
            css=answers.STYLE,
            app_kwargs={"middleware": [Middleware(RequestGuard)]},
            quiet=not block,
        )
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}; try another --port") from error
    return address


def _picture_choice(examples: list[Picture]) -> tuple[gr.UploadButton, gr.Gallery]:
    upload = gr.UploadButton(
        "Upload a picture",
        file_types=[".jpg", ".jpeg", ".png", ".webp"],
        elem_id="upload",
        size="md",
        scale=0,
        min_width=170,
    )
    gallery = gr.Gallery(
        [example.image for example in examples],
        label="Example pictures",
        show_label=False,
        container=False,
        elem_id="examples",
        columns=_NUM_EXAMPLES,
        rows=1,
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
    )
    return upload, gallery


def _canvas(first: Picture) -> gr.Image:
    return gr.Image(
        first.image,
        label="Picture",
        show_label=False,
        elem_id="picture",
        buttons=["download", "fullscreen"],
        interactive=False,
        alt_text="the chosen picture, with the boxes found or drawn on it",
    )


def _find_tab(first: Picture) -> tuple[gr.Textbox, gr.Button, gr.Dataset, gr.HTML]:
    phrase = gr.Textbox(
        label="What to look for",
        placeholder=first.suggestions[0],
        max_length=MAX_PHRASE_CHARS,
        max_lines=1,
        elem_id="phrase",
    )
    button = gr.Button("Find it", variant="primary", elem_id="find")
    suggestions = gr.Dataset(
        components=[phrase],
        samples=[[text] for text in first.suggestions],
        label="For example",
        elem_id="suggestions",
    )
    return phrase, button, suggestions, gr.HTML(answers.FIND_HINT, elem_id="found")


def _name_tab() -> tuple[gr.HTML, gr.Textbox, gr.Button]:
    named = gr.HTML(answers.NAME_HINT, elem_id="named")
    names = gr.Textbox(
        label="Names to choose from (optional)",
        placeholder="crab, boat, ...",
        info="Separated by commas; empty means the model's own list. Press Enter to compare again.",
        max_lines=1,
        elem_id="names",
    )
    return named, names, gr.Button("Clear box", elem_id="clear-box")


class Handlers:
    """The actions of the page's events, as plain methods on the engine and a `Picture`."""

    def __init__(self, engine: DemoEngine, examples: list[Picture]) -> None:
        self.engine = engine
        self.examples = examples

    def upload(self, path: str) -> tuple[Any, ...]:
        with visitor_errors():
            return _show(open_picture(path))

    def choose_example(self, event: gr.SelectData) -> tuple[Any, ...]:
        index = event.index if isinstance(event.index, int) else 0
        return _show(self.examples[index % len(self.examples)])

    def find(self, picture: Picture | None, phrase: str | None) -> tuple[Picture, Image.Image, str]:
        with visitor_errors():
            found = self.engine.find(_required(picture), phrase or "")
        picture = clear_box(_required(picture))
        return picture, draw(picture, answers.found_outlines(found)), answers.found_html(found)

    def click(
        self, picture: Picture | None, event: gr.SelectData
    ) -> tuple[Picture, Image.Image, str, gr.Tabs]:
        with visitor_errors():
            x, y = _point(event.index)
            picture = click(_required(picture), x, y)
        hint = answers.SECOND_CLICK_HINT if picture.corner else "<p class='hint'>Looking…</p>"
        return picture, draw(picture), hint, gr.Tabs(selected="name")

    def name(self, picture: Picture | None, names: str | None) -> str:
        with visitor_errors():
            picture = _required(picture)
            if picture.corner is not None:
                return answers.SECOND_CLICK_HINT
            if picture.box is None:
                return answers.NAME_HINT
            return answers.named_html(self.engine.name(picture, parse_names(names or "")))

    def clear_box(self, picture: Picture | None) -> tuple[Picture, Image.Image, str, gr.Tabs]:
        with visitor_errors():
            picture = clear_box(_required(picture))
        return picture, draw(picture), answers.NAME_HINT, gr.Tabs(selected="name")


@contextmanager
def visitor_errors() -> Iterator[None]:
    """Shows a `ValueError` about a visitor's input as a message on the page."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise gr.Error(message[:1].upper() + message[1:], print_exception=False) from error


def _show(picture: Picture) -> tuple[Any, ...]:
    suggestions = gr.Dataset(
        samples=[[text] for text in picture.suggestions], visible=bool(picture.suggestions)
    )
    return picture, picture.image, suggestions, "", answers.FIND_HINT, answers.NAME_HINT


def _required(picture: Picture | None) -> Picture:
    if picture is None:
        raise ValueError("choose a picture first: upload one or click an example")
    return picture


def _point(index: Any) -> tuple[float, float]:
    """Reads the pixel of a click event, which comes from the network and may hold anything."""
    numbers = isinstance(index, list | tuple) and len(index) == 2
    if not numbers or not all(isinstance(value, int | float) for value in index):
        raise ValueError("the click has no position; click inside the picture")
    return float(index[0]), float(index[1])


def _first_cell(row: list[str]) -> str:
    return row[0]
