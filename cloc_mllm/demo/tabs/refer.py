"""Refer: a region in, words out."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from cloc_mllm.demo import answers
from cloc_mllm.demo.engine import MAX_PHRASE_CHARS, DemoEngine, parse_names
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.snippets import refer_code
from cloc_mllm.demo.stage import PRIVATE, Stage, required, required_stroke, visitor_errors
from cloc_mllm.demo.strokes import Stroke, read_stroke
from cloc_mllm.demo.surface import show

# drawings and clearings are taken in the order in which they came
_STROKES = "strokes"

Talk = tuple[tuple[str, str], ...]


def refer_tab(stage: Stage, tabs: gr.Tabs) -> None:
    """Builds the tab and its events."""
    named = gr.HTML(answers.REFER_HINT, elem_id="named", elem_classes="answers")
    names = gr.Textbox(
        label="Names to choose from (optional)",
        placeholder="a dog, a pony, a camel, ...",
        info="Commas between them; empty means the model's own list. Enter ranks them for the "
        "same region.",
        max_lines=1,
        elem_id="names",
    )
    talk, replies = _questions(stage)

    def draw(picture: Picture | None, event: gr.EventData) -> tuple[Any, ...]:
        with visitor_errors():
            picture = required(picture)
            stroke = read_stroke(event._data, picture.image.size)
        opened = gr.Tabs(selected="refer") if event._data.get("typing") else gr.skip()
        python = refer_code(stage.engine, stroke, picture.image.size, ())
        return stroke, show(picture, stroke=stroke, python=python), "", (), opened

    def clear(picture: Picture | None) -> tuple[Any, ...]:
        with visitor_errors():
            return None, show(required(picture)), answers.REFER_HINT, "", ()

    def ask_names(
        picture: Picture | None, stroke: Stroke | None, text: str | None
    ) -> Iterator[str]:
        yield from name(stage.engine, picture, stroke, text)

    def ask_unless_gone(
        picture: Picture | None, stroke: Stroke | None, text: str | None
    ) -> Iterator[Any]:
        # while this waited, the drawing may have been cleared or taken along by a chat
        yield from [gr.skip()] if stroke is None else ask_names(picture, stroke, text)

    rank: dict[str, Any] = {"inputs": [stage.picture, stage.stroke, names]}
    rank |= {"outputs": named, **PRIVATE}
    # by default a stroke is lost while the one before it is still being answered
    stage.surface.drawn(
        draw,
        stage.picture,
        [stage.stroke, stage.surface, replies, talk, tabs],
        trigger_mode="multiple",
        show_progress="hidden",
        api_visibility="private",
        concurrency_id=_STROKES,
    ).success(ask_unless_gone, **rank, trigger_mode="multiple")
    names.submit(ask_names, **rank)
    stage.surface.cleared(
        clear,
        stage.picture,
        [stage.stroke, stage.surface, named, replies, talk],
        trigger_mode="multiple",
        show_progress="hidden",
        api_visibility="private",
        concurrency_id=_STROKES,
    )
    stage.on_picture(lambda _: (answers.REFER_HINT, "", ()), [named, replies, talk])


def _questions(stage: Stage) -> tuple[gr.State, gr.HTML]:
    """Builds the field for questions about the region; returns the talk and where it is shown."""
    has_language_model = stage.engine.grounding is not None
    question = gr.Textbox(
        label="Ask about this region",
        placeholder="What is this?",
        info="The region stays; ask as often as you like.",
        max_length=MAX_PHRASE_CHARS,
        max_lines=1,
        elem_id="question",
        visible=has_language_model,
    )
    replies = gr.HTML("", elem_id="replies", elem_classes="answers")
    talk = gr.State(())  # question and answer of each turn about this region
    if not has_language_model:
        gr.HTML(answers.needs_language_model("Asking about a region in words"))

    def ask(
        picture: Picture | None, stroke: Stroke | None, text: str | None, before: Talk | None
    ) -> Iterator[tuple[Talk, str, Any]]:
        yield from reply(stage.engine, picture, stroke, text, before)

    inputs = [stage.picture, stage.stroke, question, talk]
    # a question that is asked while another is answered waits for its turn
    outputs = [talk, replies, question]
    question.submit(ask, inputs, outputs, trigger_mode="multiple", **PRIVATE)
    return talk, replies


def name(
    engine: DemoEngine, picture: Picture | None, stroke: Stroke | None, text: str | None
) -> Iterator[str]:
    """Yields what is in the region, as it is written."""
    with visitor_errors():
        picture, stroke = required(picture), required_stroke(stroke)
        for named in engine.name(picture, stroke, parse_names(text or "")):
            yield answers.named_html(named)


def reply(
    engine: DemoEngine,
    picture: Picture | None,
    stroke: Stroke | None,
    question: str | None,
    before: Talk | None,
) -> Iterator[tuple[Talk, str, Any]]:
    """Yields the talk about the region so far, its HTML, and an empty field for what comes next."""
    with visitor_errors():
        picture, stroke = required(picture), required_stroke(stroke)
        field: Any = ""
        for text in engine.ask_about(picture, stroke, question or ""):
            talk = (*(before or ()), (question or "", text))
            yield talk, "".join(map(_turn, talk)), field
            field = gr.skip()  # once emptied, the field is the visitor's again


def _turn(turn: tuple[str, str]) -> str:
    asked, said = map(escape, turn)
    return f"<p class='asked'>{asked}</p><p class='said'>{said}</p>"
