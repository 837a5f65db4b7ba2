"""An answer's text -> boxes, read strictly or leniently, always in the declared frame.

Strict: the whole answer is the declared notation and every box lies in its frame. Lenient: the
same frame, but the box may be written in other brackets, with text around it, with its corners
swapped, or partly beyond the edge, where it is cut. Neither tries another frame.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cloc_mllm.box import Box
from cloc_mllm.evaluation.answers.formats import SIGNED, AnswerFormat, Notation
from cloc_mllm.evaluation.answers.frames import Size

# Qwen2.5-VL says 644 on a picture 640 wide. A box with less of it inside was written in another
# frame than the declared one; uncut, it could not overlap a true box by IoU 0.5 either.
MIN_SHARE_INSIDE = 0.5

_GAP = r"(?:\s{0,8}[,;]\s{0,8}|\s{1,8})"  # bounded: no text takes long to search
_FOUR = _GAP.join([SIGNED] * 4)
_TWO = _GAP.join([SIGNED] * 2)
_PAIR = rf"[\[(]\s{{0,8}}{_TWO}\s{{0,8}}[\])]"
_UNBOUND = r"(?<![\w.-])", r"(?![\w.])"  # not a part of a longer number or name
# other ways to write a box, most certain first
_OTHER_NOTATIONS = [
    Notation(re.compile(rf"[\[({{]\s*{_FOUR}\s*[\])}}]"), None),
    Notation(re.compile(rf"{_PAIR}\s{{0,8}}(?:,|to|-)?\s{{0,8}}{_PAIR}"), None),
    Notation(re.compile(_UNBOUND[0] + _FOUR + _UNBOUND[1]), None),
]


@dataclass(frozen=True)
class Reading:
    """`boxes` (xyxy, 0..1 of the original image, first is the answer), or none of them and why.

    `failure` is None or one of `empty`, `not_a_box` (not in the declared notation; leniently: no
    four numbers), `no_box` (an empty list), `out_of_range`, `inverted`, `zero_area`.
    """

    boxes: list[Box]
    failure: str | None = None


def read_strict(declared: AnswerFormat, text: str, size: Size | None = None) -> Reading:
    """Reads an answer that is nothing but boxes in the declared format. Never raises on a text.

    Args:
        size: width and height that pixels count in, for frames of pixels.
    """
    text = text.strip()
    if not text:
        return Reading([], "empty")
    written = declared.notation.numbers(text)
    if not written:
        return Reading([], "not_a_box" if written is None else "no_box")
    boxes = []
    for numbers in written:
        box = declared.coordinates.fractions(numbers, size)
        failure = (
            "out_of_range" if declared.coordinates.overshoot(numbers, size) > 0 else _problem(box)
        )
        if failure is not None:
            return Reading([], failure)
        boxes.append(box)
    return Reading(boxes)


def read_lenient(declared: AnswerFormat, text: str, size: Size | None = None) -> Reading:
    """Reads the boxes that can be found in an answer; a reasoning part is skipped, then the first
    usable box (inside the answer tags if there are any) is the answer. Never raises on a text.

    Args:
        size: width and height that pixels count in, for frames of pixels.
    """
    text = text.rpartition("</think>")[2]
    text = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if not text:
        return Reading([], "empty")
    others = [] if declared.coordinates.kind == "patches" else _OTHER_NOTATIONS
    found = (notation.found(text) for notation in [declared.notation, *others])
    written = next((numbers for numbers in found if numbers), [])
    readings = [_lenient_box(declared, numbers, size) for numbers in written]
    boxes = [box for box, _ in readings if box is not None]
    if boxes:
        return Reading(boxes)
    return Reading([], readings[0][1] if readings else "not_a_box")


def _lenient_box(
    declared: AnswerFormat, numbers: Sequence[float], size: Size | None
) -> tuple[Box | None, str | None]:
    x1, y1, x2, y2 = declared.coordinates.fractions(numbers, size)
    written = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    if _problem(written):
        return None, "zero_area"
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in written)
    if _area((x1, y1, x2, y2)) < MIN_SHARE_INSIDE * _area(written):
        return None, "out_of_range"
    return (x1, y1, x2, y2), None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _problem(box: Box) -> str | None:
    x1, y1, x2, y2 = box
    if x2 < x1 or y2 < y1:
        return "inverted"
    return "zero_area" if x2 == x1 or y2 == y1 else None
