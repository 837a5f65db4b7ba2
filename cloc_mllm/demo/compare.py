"""Two checkpoints on the same phrase, and how well each box fits a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cloc_mllm.box import Box
from cloc_mllm.demo.engine import DemoEngine, FoundBoxes, checked_phrase
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.geometry import elementwise_iou


class Contest(NamedTuple):
    """The answers of two checkpoints to one phrase.

    Attributes:
        names: of the checkpoints, and what they are.
        found: their answers.
        reference: the true box, where it is known.
        ious: the best IoU of each answer's boxes with the reference; None without one or the other.
    """

    phrase: str
    names: tuple[str, str]
    found: tuple[FoundBoxes, FoundBoxes]
    reference: Box | None
    ious: tuple[float | None, float | None]


def contest(engines: tuple[DemoEngine, DemoEngine], picture: Picture, phrase: str) -> Contest:
    """Asks two checkpoints where a phrase is: the language model where there is one, else CLOC."""
    phrase = checked_phrase(phrase)
    reference = dict(picture.references).get(phrase)
    first, second = (_answer(engine, picture, phrase) for engine in engines)
    return Contest(
        phrase,
        (_name(engines[0]), _name(engines[1])),
        (first, second),
        reference,
        (_best_iou(first.boxes, reference), _best_iou(second.boxes, reference)),
    )


def _answer(engine: DemoEngine, picture: Picture, phrase: str) -> FoundBoxes:
    *_, grounding = engine.ground(picture, [phrase])
    (found,) = grounding.found
    return found.language_model or found.cloc


def _name(engine: DemoEngine) -> str:
    cloc, language_model = engine.names
    return f"{cloc}, CLOC" if engine.grounding is None else f"{language_model}, language model"


def _best_iou(boxes: Sequence[Box], reference: Box | None) -> float | None:
    if reference is None or not boxes:
        return None
    return float(elementwise_iou(torch.tensor(boxes), torch.tensor([reference])).max())
