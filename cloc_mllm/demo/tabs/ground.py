"""Ground: words in, boxes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from cloc_mllm.demo import answers
from cloc_mllm.demo.engine import DemoEngine, parse_phrases
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.snippets import ground_code
from cloc_mllm.demo.stage import MODEL, Stage, required, visitor_errors
from cloc_mllm.demo.surface import show


def ground_tab(stage: Stage, first: Picture) -> None:
    """Builds the tab and its events."""
    phrases = gr.Textbox(
        label="What to look for",
        info="Several things: put commas between them.",
        placeholder=", ".join(first.suggestions[:2]),
        max_lines=1,
        elem_id="phrases",
    )
    button = gr.Button("Find", variant="primary", elem_id="find")
    suggestions = gr.Dataset(
        components=[phrases],
        samples=_samples(first),
        label="For example",
        elem_id="suggestions",
    )
    found = gr.HTML(answers.GROUND_HINT, elem_id="found", elem_classes="answers")
    if stage.engine.grounding is None:
        gr.HTML(answers.needs_language_model("An answer in words, or several boxes per phrase,"))

    def ask(picture: Picture | None, text: str | None) -> Iterator[tuple[Any, Any, str]]:
        yield from ground(stage.engine, picture, text)

    event: dict[str, Any] = {"fn": ask, "inputs": [stage.picture, phrases], **MODEL}
    event |= {"outputs": [stage.stroke, stage.surface, found]}
    button.click(**event, api_name="ground")
    phrases.submit(**event, api_visibility="private")
    suggestions.click(lambda row: row[0], suggestions, phrases, api_visibility="private").success(
        **event, api_visibility="private"
    )

    def reset(picture: Picture) -> tuple[Any, ...]:
        samples = _samples(picture)
        return gr.Dataset(samples=samples, visible=bool(samples)), "", answers.GROUND_HINT

    stage.on_picture(reset, [suggestions, phrases, found])


def ground(
    engine: DemoEngine, picture: Picture | None, text: str | None
) -> Iterator[tuple[Any, Any, str]]:
    """Yields the stroke, the surface and the answer; the surface changes with each new box."""
    with visitor_errors():
        picture = required(picture)
        phrases = parse_phrases(text or "")
        python = ground_code(engine, phrases)
        marks = None
        for grounding in engine.ground(picture, phrases):
            before, marks = marks, answers.marks_of(grounding)
            surface = gr.skip() if marks == before else show(picture, marks, python=python)
            yield None, surface, answers.grounding_html(grounding)


def _samples(picture: Picture) -> list[list[str]]:
    """Makes the examples to click; the first asks for two things at once."""
    one_each = list(picture.suggestions)
    both = [", ".join(one_each[:2])] if len(one_each) > 1 else []
    return [[text] for text in both + one_each]
