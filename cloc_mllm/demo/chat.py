"""A chat of several turns about one picture, whose answers may mention boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cloc_mllm.box import Box
from cloc_mllm.data.wordings import REGION_TOKEN
from cloc_mllm.demo.engine import DemoEngine, checked_phrase, usable_boxes
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.chat import Chat, answer_chat
from cloc_mllm.inference.results import Answer
from cloc_mllm.inference.sampling import Sampling
from cloc_mllm.mllm.coordinates import BoxFormat

MAX_TURNS = 20
_MAX_NEW_TOKENS = 128


class Mention(NamedTuple):
    """A box in an answer, written at `text[start:end]`."""

    start: int
    end: int
    box: Box
    score: float


@dataclass(frozen=True)
class Turn:
    """A question and its answer, as far as it is written.

    Args:
        box: the region that the question is about; None for the whole picture.
        mentions: the boxes of the finished answer.
    """

    question: str
    box: Box | None
    text: str = ""
    mentions: tuple[Mention, ...] = ()


def chat(
    engine: DemoEngine,
    picture: Picture,
    turns: Sequence[Turn],
    question: str,
    stroke: Stroke | None,
) -> Iterator[Turn]:
    """Yields the next turn while the language model writes it.

    Args:
        turns: those before, about the same picture.
        stroke: a region that the question is about.

    Raises:
        ValueError: there is no language model, the question cannot be asked, or the chat is too
            long for the model.
    """
    grounding = engine.grounding
    if grounding is None:
        raise ValueError("a chat needs a language model")
    if len(turns) >= MAX_TURNS:
        raise ValueError(f"this chat has {len(turns)} turns; start a new one")
    box = None if stroke is None else stroke.box(picture.image.size)
    turn = Turn(checked_phrase(question), box)

    def work(say: Callable[[str], None]) -> Answer:
        image, _ = engine.encode(picture)
        assert image.grounding is not None
        asked = [*turns, turn]
        boxes = [one.box for one in asked if one.box is not None]
        request = Chat(
            _messages(asked, grounding.processor.coordinates),
            [image.grounding],
            [Boxes.normalized(boxes)] if boxes else [],
        )
        return answer_chat(grounding, request, Sampling(_MAX_NEW_TOKENS), say)

    pieces = engine.streamed(work)
    try:
        while True:
            turn = replace(turn, text=turn.text + next(pieces))
            yield turn
    except StopIteration as end:
        yield replace(turn, text=end.value.text, mentions=_mentions(end.value))


def _messages(turns: Sequence[Turn], box_format: BoxFormat) -> list[dict[str, Any]]:
    """Writes turns as the processor takes them; the last one has no answer yet."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        text = turn.question
        if turn.box is not None:
            text += f" {box_format.encode(turn.box)} {REGION_TOKEN}"
        content = [{"type": "text", "text": text}]
        if not messages:
            content = [{"type": "image"}, *content]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.text}]})
    return messages[:-1]


def _mentions(answer: Answer) -> tuple[Mention, ...]:
    rows = zip(answer.spans, answer.boxes.xyxy, answer.scores.tolist(), strict=True)
    return tuple(
        Mention(start, end, box, score)
        for (start, end), row, score in rows
        for box in usable_boxes(Boxes.normalized(row[None]))
    )
