"""What the tabs share: the engine, the picture, what is drawn on it, and errors as messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from cloc_mllm.demo.answers import credit_html
from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.demo.surface import Mark, show

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
        credit: the component below it that names the licence of an example.
    """

    engine: DemoEngine
    picture: gr.State
    stroke: gr.State
    surface: gr.HTML
    credit: gr.HTML
    _outputs: list[Any] = field(default_factory=list)
    _resets: list[Callable[[Picture], Sequence[Any]]] = field(default_factory=list)

    def on_picture(self, reset: Callable[[Picture], Sequence[Any]], outputs: list[Any]) -> None:
        """Registers what a tab shows when another picture is chosen."""
        self._resets.append(reset)
        self._outputs += outputs

    @property
    def outputs(self) -> list[Any]:
        """The components that `choose` gives values for; complete once all tabs are built."""
        return [self.surface, self.picture, self.stroke, self.credit, *self._outputs]

    def choose(self, picture: Picture, marks: Sequence[Mark] = ()) -> tuple[Any, ...]:
        """Shows another picture on all tabs."""
        values = [value for reset in self._resets for value in reset(picture)]
        return show(picture, marks), picture, None, credit_html(picture), *values


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
