"""What the tabs share: the engine, the picture, what is drawn on it, and errors as messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.strokes import Stroke

# Calls of the model wait for each other; what only shows something does not wait for them.
MODEL: dict[str, Any] = {"concurrency_id": "model"}
PRIVATE: dict[str, Any] = {"api_visibility": "private", **MODEL}


@dataclass
class Stage:
    """The picture that all tabs ask about.

    Args:
        picture: holds a `Picture`.
        stroke: holds the `Stroke` that was drawn last, or None.
        surface: the component that shows both.
        active_tab: holds the id of the tab that is open.
    """

    engine: DemoEngine
    picture: gr.State
    stroke: gr.State
    surface: gr.HTML
    active_tab: gr.State
    outputs_of_reset: list[Any] = field(default_factory=list)
    _resets: list[Callable[[Picture], Sequence[Any]]] = field(default_factory=list)

    def tab(self, label: str) -> gr.Tab:
        """Makes a tab that notes when it is opened."""
        name = label.lower()
        tab = gr.Tab(label, id=name)
        tab.select(lambda: name, None, self.active_tab, queue=False, api_visibility="private")
        return tab

    def on_picture(self, reset: Callable[[Picture], Sequence[Any]], outputs: list[Any]) -> None:
        """Registers what a tab shows when another picture is chosen."""
        self._resets.append(reset)
        self.outputs_of_reset += outputs

    def reset(self, picture: Picture) -> list[Any]:
        return [value for reset in self._resets for value in reset(picture)]


@contextmanager
def visitor_errors() -> Iterator[None]:
    """Shows a `ValueError` about a visitor's input as a message on the page."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise gr.Error(message[:1].upper() + message[1:], print_exception=False) from error


def required(picture: Picture | None) -> Picture:
    if picture is None:
        raise ValueError("choose a picture first: upload one or click an example")
    return picture


def required_stroke(stroke: Stroke | None) -> Stroke:
    if stroke is None:
        raise ValueError("draw on the picture first: a box, a point or a scribble")
    return stroke
