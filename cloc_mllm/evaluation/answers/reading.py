"""An answer's text -> boxes, read strictly or leniently, always in the declared frame.

Strict: the whole answer is the declared notation and every box lies in its frame. Lenient: the
same frame, but the box may be written in other brackets, with text around it, with its corners
swapped, or partly beyond the edge, where it is cut. Neither tries another frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cloc_mllm.box import Box
from cloc_mllm.data.values import number
from cloc_mllm.evaluation.answers.formats import AnswerFormat
from cloc_mllm.evaluation.answers.frames import Coordinates, Size
from cloc_mllm.evaluation.answers.notations import (
    ANY_KEY,
    ANY_NUMBER,
    FOUR,
    GAP,
    Notation,
    without_labels,
)

# Qwen2.5-VL says 644 on a picture 640 wide. A box with less of it inside was written in another
# frame than the declared one; uncut, it could not overlap a true box by IoU 0.5 either.
MIN_SHARE_INSIDE = 0.5

_THOUGHT = "(?:think|thinking|thought|reasoning)"
_THOUGHT_START = re.compile(rf"<{_THOUGHT}>|◁think▷", re.IGNORECASE)
_THOUGHT_END = re.compile(rf"</{_THOUGHT}>|◁/think▷", re.IGNORECASE)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # digits, brackets, commas

_PAIR = rf"[\[(]\s{{0,8}}{ANY_NUMBER}{GAP}{ANY_NUMBER}\s{{0,8}}[\])]"
# other ways to write a box, most certain first
_BRACKETS = Notation(re.compile(rf"[\[({{]\s*{FOUR}\s*[\])}}]"))
_PAIRS = Notation(re.compile(rf"{_PAIR}\s{{0,8}}(?:,|to|-)?\s{{0,8}}{_PAIR}"))
_BARE = re.compile(rf"(?<![\w.-]){FOUR}(?!\w|[.-][\w.])")  # no part of a longer number or name
_SIDES = {
    **dict.fromkeys(("x1", "x_1", "xmin", "x_min", "left"), "x1"),
    **dict.fromkeys(("y1", "y_1", "ymin", "y_min", "top"), "y1"),
    **dict.fromkeys(("x2", "x_2", "xmax", "x_max", "right"), "x2"),
    **dict.fromkeys(("y2", "y_2", "ymax", "y_max", "bottom"), "y2"),
}
_NAMED = re.compile(
    rf"(?<!\w)({'|'.join(_SIDES)})[\"']?\s{{0,8}}[:=]\s{{0,8}}{ANY_NUMBER}(?!\w|[.-][\w.]|\s?%)",
    re.IGNORECASE,
)


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
        if not declared.coordinates.is_inside(numbers, size):
            return Reading([], "out_of_range")
        box = _cut(declared.coordinates.fractions(numbers, size))
        failure = _problem(box)
        if failure is not None:
            return Reading([], failure)
        boxes.append(box)
    return Reading(boxes)


def read_lenient(declared: AnswerFormat, text: str, size: Size | None = None) -> Reading:
    """Reads the boxes that can be found in an answer. Never raises on a text.

    A reasoning part is skipped, also one without end. The first usable box, inside the answer tags
    if there are any, is the answer; a box in the declared notation or under a key such as `bbox`
    goes before other brackets, and those of a label are none. A number that the end of the text
    cuts off is none.

    Args:
        size: width and height that pixels count in, for frames of pixels.
    """
    text = _THOUGHT_START.split(_THOUGHT_END.split(text)[-1])[0]
    text = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    if not text:
        return Reading([], "empty")
    for coordinates, found in _found(declared, text.translate(_FULL_WIDTH)):
        if found:
            readings = [_lenient_box(coordinates, numbers, size) for numbers in found]
            boxes = [box for box, _ in readings if box is not None]
            return Reading(boxes) if boxes else Reading([], readings[0][1])
    return Reading([], "not_a_box")


def _found(declared: AnswerFormat, text: str) -> Iterable[tuple[Coordinates, list[list[float]]]]:
    """The numbers of each box by each notation, the surest first, and their frame."""
    coordinates, notation = declared.coordinates, declared.notation
    if coordinates.kind == "patches":
        yield coordinates, notation.found(text)
        return
    if notation.key:
        yield coordinates, notation.found(text)
    yield coordinates, ANY_KEY.found(text)
    text = without_labels(text)
    yield coordinates, notation.found(text)
    yield replace(coordinates, order="xyxy"), _named(text)
    yield coordinates, _BRACKETS.found(text)
    yield coordinates, _PAIRS.found(text)
    bare = (match for match in _BARE.finditer(text) if not _is_cut_off(match))
    yield coordinates, [[number(group) for group in match.groups()] for match in bare]


def _named(text: str) -> list[list[float]]:
    """Boxes whose corners have names: `x1: 200, y1: 200, x2: 500, y2: 750`, in any order."""
    boxes, corners = [], dict[str, float]()
    for match in _NAMED.finditer(text):
        side = _SIDES[match[1].lower()]
        if side in corners:
            corners = {}
        if not _is_cut_off(match):
            corners[side] = number(match[2])
        if len(corners) == 4:
            boxes.append([corners[name] for name in ("x1", "y1", "x2", "y2")])
            corners = {}
    return boxes


def _is_cut_off(match: re.Match[str]) -> bool:
    """Whether the last number may go on where the text ends: within brackets, or at its point."""
    text = match.string
    if match.end() < len(text):
        return False
    *others, last = match.groups()
    is_open = sum(map(text.count, "[({")) > sum(map(text.count, "])}"))
    return is_open or (last.endswith(".") and any("." in other[:-1] for other in others))


def _lenient_box(
    coordinates: Coordinates, numbers: Sequence[float], size: Size | None
) -> tuple[Box | None, str | None]:
    x1, y1, x2, y2 = coordinates.fractions(numbers, size)
    written = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    if _problem(written):
        return None, "zero_area"
    box = _cut(written)
    return (
        (box, None) if _area(box) >= MIN_SHARE_INSIDE * _area(written) else (None, "out_of_range")
    )


def _cut(box: Box) -> Box:
    """Cut at the image's edge; -0.0 becomes 0.0."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) + 0.0 for value in box)
    return x1, y1, x2, y2


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _problem(box: Box) -> str | None:
    x1, y1, x2, y2 = box
    if x2 < x1 or y2 < y1:
        return "inverted"
    return "zero_area" if x2 == x1 or y2 == y1 else None
