"""Chat: several turns about the picture, with the boxes of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from cloc_mllm.data.drawing import region_color
from cloc_mllm.demo import answers
from cloc_mllm.demo.chat import Turn, chat
from cloc_mllm.demo.engine import MAX_PHRASE_CHARS
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.stage import PRIVATE, Stage, required, visitor_errors
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.demo.surface import Mark, css_color, show

_HINT = (
    "<p class='hint'>Ask about the picture, or about a region: what you draw goes with the next "
    "question. Boxes in answers appear on the picture.</p>"
)

Turns = tuple[Turn, ...]


def chat_tab(stage: Stage) -> None:
    """Builds the tab and its events; without a language model, the sentence that says so."""
    if stage.engine.grounding is None:
        gr.HTML(answers.needs_language_model("A chat"))
        return
    talk = gr.HTML(_HINT, elem_id="talk", elem_classes="answers")
    question = gr.Textbox(
        label="Your question",
        placeholder="What is in the image?",
        max_length=MAX_PHRASE_CHARS,
        max_lines=1,
        elem_id="chat-question",
    )
    with gr.Row():
        send = gr.Button("Ask", variant="primary", elem_id="chat-send", min_width=120)
        new = gr.Button("New chat", elem_id="chat-new", min_width=120)
    turns = gr.State(())

    def ask(
        picture: Picture | None, stroke: Stroke | None, before: Turns | None, text: str | None
    ) -> Iterator[tuple[Any, ...]]:
        with visitor_errors():
            picture, before = required(picture), before or ()
            shown: list[Mark] = marks_of(before)
            field: Any = ""
            drawn: Any = None  # the drawing went with the question
            for turn in chat(stage.engine, picture, before, text or "", stroke):
                after = (*before, turn)
                marks = marks_of(after)
                surface = gr.skip() if marks == shown else show(picture, marks)
                yield after, surface, talk_html(after), field, drawn
                # once emptied, the field and the pen are the visitor's again
                shown, field, drawn = marks, gr.skip(), gr.skip()

    event: dict[str, Any] = {"fn": ask, **PRIVATE}
    event |= {"inputs": [stage.picture, stage.stroke, turns, question]}
    event |= {"outputs": [turns, stage.surface, talk, question, stage.stroke]}
    # a question that is asked while another is answered waits for its turn
    send.click(**event, trigger_mode="multiple")
    question.submit(**event, trigger_mode="multiple")
    new.click(lambda: ((), _HINT), None, [turns, talk], **PRIVATE)
    stage.on_picture(lambda _: ((), _HINT), [turns, talk])


def marks_of(turns: Turns) -> list[Mark]:
    """Lists the boxes of all turns: those that were asked about, and those that answers mention."""
    marks = []
    for group, (box, score) in enumerate(_boxes(turns)):
        by = "you" if score is None else answers.LANGUAGE_MODEL
        mark = Mark(box, region_color(group), str(group + 1), group, score is None)
        marks.append(mark._replace(phrase=str(group + 1), by=by, score=score))
    return marks


def talk_html(turns: Turns) -> str:
    """Writes the chat; each box is a numbered button in the colour of its box."""
    parts, group = [], 0
    for turn in turns:
        asked = escape(turn.question)
        if turn.box is not None:
            asked += f" {_button(group)}"
            group += 1
        said, place = "", 0
        for mention in turn.mentions:
            said += escape(turn.text[place : mention.start]) + _button(group)
            place, group = mention.end, group + 1
        said += escape(turn.text[place:])
        parts.append(f"<p class='asked'>{asked}</p><p class='said'>{said or '…'}</p>")
    return "".join(parts)


def _boxes(turns: Turns) -> list[tuple[Any, float | None]]:
    boxes: list[tuple[Any, float | None]] = []
    for turn in turns:
        if turn.box is not None:
            boxes.append((turn.box, None))
        boxes += [(mention.box, mention.score) for mention in turn.mentions]
    return boxes


def _button(group: int) -> str:
    color = css_color(region_color(group))
    return (
        f"<button type='button' class='phrase' data-group='{group}' aria-pressed='false' "
        f"style='--group:{color}' aria-label='box {group + 1}'>▭ {group + 1}</button>"
    )
