"""The texts of conversation files -> pieces of turns: each notation of boxes, and its frame.

| notation | looks like | frame |
|---|---|---|
| brackets | `[0.33, 0.26, 0.86, 0.75]` | what the user declares |
| JSON answers | `{"bbox_2d": [120, 85, 640, 790]}`, `{"point_2d": [12, 40]}` | the same |
| marks of Qwen-VL | `<ref>the dog</ref><box>(120,85),(640,790)</box>` | 0..1000 |
| marks of InternVL | `<ref>the dog</ref><box>[[120, 85, 640, 790]]</box>` | 0..1000 |
| marks of Qwen2-VL | `<|object_ref_start|>the dog<|object_ref_end|><|box_start|>...` | 0..1000 |

Numbers in brackets are a box only where they can be one: the chat has an image, they are four, they
stand in no code, and in frames of 0..1 one of them has a decimal point, or they are all of an
answer. Everything else stays as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from cloc_mllm.box import Box
from cloc_mllm.data.chats import Piece, Point, image_mark, words
from cloc_mllm.data.readers.boxes import FAR_BORDER
from cloc_mllm.data.readers.photos import Photo
from cloc_mllm.data.values import number

# padded: 0..1 of the image padded to a square; original: 0..1 of the image itself; pixels: of the
# image file; hundredths, thousandths: 0..100, 0..1000 of its width and height
Frame = Literal["padded", "original", "pixels", "hundredths", "thousandths"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|[-+]?inf(?:inity)?"
_NUMBERS = re.compile(_NUMBER, re.IGNORECASE)
_COMMA = "[,\uff0c]"  # and the full-width one of Chinese texts
_TWO = rf"\s*(?:{_NUMBER})\s*{_COMMA}\s*(?:{_NUMBER})\s*"
_FOUR = rf"\[{_TWO}{_COMMA}{_TWO}\]"
_CODE = r"(?P<code>```.*?(?:```|\Z)|`[^`\n]+`)"
_BRACKETS = re.compile(rf"{_CODE}|{_FOUR}", re.DOTALL | re.IGNORECASE)
# boxes in the eyes of other tools, too
_NEXT = rf"(?:\s*[,;\uff0c\uff1b]\s*|\s+)(?:{_NUMBER})"
_ANY_FOUR = rf"[\[({{<]\s*(?:{_NUMBER}){_NEXT}{_NEXT}{_NEXT}\s*[\])}}>]"
_FOUR_NUMBERS = re.compile(
    rf"{_CODE}|{_ANY_FOUR}|\({_TWO}\)\s*,?\s*\({_TWO}\)", re.DOTALL | re.IGNORECASE
)
_ONLY_BRACKETS = re.compile(rf"\s*(?:{_FOUR}[\s,.;\uff0c\u3002]*)+", re.IGNORECASE)
# a phrase holds no mark, and one that is never closed is not sought to the end of each text
_PHRASE = r"(?:(?!</?ref>|<\|object_ref).){0,2000}?"
_BOX = "<box>[^<]*</box>"
_REF2, _END2 = r"<\|object_ref_start\|>", r"<\|object_ref_end\|>"
_BOX2 = r"<\|box_start\|>[^<]*<\|box_end\|>"
_MARKED = re.compile(
    rf"(?:<ref>(?P<ref>{_PHRASE})</ref>\s*)?(?P<boxes>{_BOX}(?:\s*{_BOX})*)"
    rf"|<ref>(?P<alone>{_PHRASE})</ref>"
    rf"|(?:{_REF2}(?P<ref2>{_PHRASE}){_END2}\s*)?(?P<boxes2>{_BOX2}(?:\s*{_BOX2})*)"
    rf"|{_REF2}(?P<alone2>{_PHRASE}){_END2}",
    re.DOTALL,
)
_ONE_MARKED = re.compile(r"(?:<box>|<\|box_start\|>)([^<]*)<")
_JSON = re.compile(
    r'(?<="bbox_2d")(?P<b>\s*:\s*)\[[^\[\]]*\]|(?<="point_2d")(?P<p>\s*:\s*)\[[^\[\]]*\]'
)
_IMAGE = re.compile(r"<image>")
_IMAGE_OR_NAME = re.compile(r"<image>|<img>(?P<name>[^<]*)</img>")


class TextFault(ValueError):
    """A turn whose places cannot be read: a key of `REASONS`, and what was found."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(found)
        self.reason = reason
        self.found = found


class Match(NamedTuple):
    """A place that a text writes as `text[start:end]`."""

    start: int
    end: int
    piece: Piece


def cut_at(text: str, matches: Sequence[Match]) -> Iterator[Piece]:
    """Yields the words and the places of a text in their order."""
    done = 0
    for start, end, piece in matches:
        if start > done:
            yield words(text[done:start])
        yield piece
        done = end
    if done < len(text):
        yield words(text[done:])


def lift(pieces: Sequence[Piece], find: Callable[[str], Sequence[Match]]) -> list[Piece]:
    """Cuts the words of pieces where `find` finds places; other pieces stay."""
    lifted: list[Piece] = []
    for piece in pieces:
        lifted += cut_at(piece.text, find(piece.text)) if piece.kind == "words" else [piece]
    return lifted


def cut_at_images(text: str, first: int, *, named: bool = False) -> list[Piece]:
    """Cuts a text where images stand.

    Args:
        first: the number of the next image.
        named: images also stand as `<img>NAME</img>`.
    """
    marks = (_IMAGE_OR_NAME if named else _IMAGE).finditer(text)
    found = [
        Match(mark.start(), mark.end(), image_mark(first + index, mark.group()))
        for index, mark in enumerate(marks)
    ]
    return list(cut_at(text, found))


def image_names_in(text: str) -> list[str]:
    """Lists the names of `<img>NAME</img>`."""
    return [match["name"] for match in _IMAGE_OR_NAME.finditer(text) if match["name"] is not None]


def boxes_in(photo: Photo, frame: Frame, rows: Sequence[Any]) -> tuple[Box, ...]:
    """Normalises boxes xyxy of the frame; NaN for what is no box."""
    if frame == "padded":
        return tuple(photo.frame().from_padded(rows))
    if frame == "pixels":
        return tuple(photo.frame().from_xyxy(rows))
    return tuple(photo.share_frame(FAR_BORDER[frame]).from_xyxy(rows))


def points_in(photo: Photo, frame: Frame, rows: Sequence[Any]) -> tuple[Point, ...]:
    """Normalises points xy of the frame; NaN for what is no point."""
    corners = [[*row, *row] for row in rows]
    return tuple((x, y) for x, y, _, _ in boxes_in(photo, frame, corners))


def place(text: str, image: int, photo: Photo, frame: Frame, stated: Sequence[Any]) -> Piece:
    """A place of boxes (four numbers) and points (two numbers); others become NaN."""
    points = [row for row in stated if len(row) == 2]
    boxes = [row for row in stated if len(row) != 2]
    return Piece(
        "place",
        text,
        image,
        boxes=boxes_in(photo, frame, boxes),
        points=points_in(photo, frame, points),
    )


def find_brackets(
    text: str, image: int, photo: Photo, frame: Frame, *, is_answer: bool
) -> list[Match]:
    """Finds `[x1, y1, x2, y2]`; see above for what is none."""
    is_all = is_answer and _ONLY_BRACKETS.fullmatch(text) is not None
    needs_point = frame in ("padded", "original") and not is_all
    return [
        Match(m.start(), m.end(), place(m.group(), image, photo, frame, [_numbers(m.group())]))
        for m in _BRACKETS.finditer(text)
        if not m["code"] and (not needs_point or _has_fraction(m.group()))
    ]


def num_brackets(text: str) -> int:
    """Counts four numbers in brackets of any kind, with commas, semicolons or blanks between them,
    and `(two, ..), (two, ..)`, but not in code."""
    return sum(not match["code"] for match in _FOUR_NUMBERS.finditer(text))


def stated_numbers(text: str) -> list[list[float]]:
    """Lists the finite numbers of brackets of four and of JSON answers, not of code and marks."""
    text = _MARKED.sub(" ", text)
    brackets = [match.group() for match in _BRACKETS.finditer(text) if not match["code"]]
    answers = [match.group() for match in _JSON.finditer(text)]
    found = [_numbers(written) for written in (*brackets, *answers)]
    return [[value for value in numbers if math.isfinite(value)] for numbers in found]


def find_marked(text: str, image: int, photo: Photo | None) -> list[Match]:
    """Finds the marks of Qwen-VL, InternVL and Qwen2-VL.

    Args:
        photo: None where no image is shown up to then.
    """
    matches = []
    for match in _MARKED.finditer(text):
        phrase = match["ref"] or match["ref2"] or match["alone"] or match["alone2"] or ""
        written = match["boxes"] or match["boxes2"] or ""
        piece = Piece("place", match.group(), phrase=phrase)
        if written:
            if photo is None:
                raise TextFault("unknown_image", f"{match.group()}, before any image")
            stated = [row for text in _ONE_MARKED.findall(written) for row in _rows_of(text)]
            piece = place(match.group(), image, photo, "thousandths", stated)
            piece = Piece("place", match.group(), image, phrase, piece.boxes, piece.points)
        matches.append(Match(match.start(), match.end(), piece))
    return matches


def find_json(text: str, image: int, photo: Photo | None, frame: Frame | None) -> list[Match]:
    """Finds the lists behind `"bbox_2d":` and `"point_2d":`."""
    matches = []
    for match in _JSON.finditer(text):
        start = match.start() + len(match["b"] if match["b"] is not None else match["p"])
        written = text[start : match.end()]
        if photo is None:
            raise TextFault("unknown_image", f"{written}, before any image")
        if frame is None:
            raise TextFault("undeclared_frame", f"{written} in a JSON answer")
        stated = [_numbers(written)]
        wanted = 4 if match["b"] is not None else 2
        if len(stated[0]) != wanted:
            stated = [[float("nan")] * wanted]
        matches.append(Match(start, match.end(), place(written, image, photo, frame, stated)))
    return matches


def _numbers(text: str) -> list[float]:
    return [number(found) for found in _NUMBERS.findall(text)]


def _rows_of(text: str) -> list[list[float]]:
    """The boxes inside of `<box>`: groups of four numbers; two are a point; else one bad box."""
    found = _numbers(text)
    if len(found) == 2:
        return [found]
    if not found or len(found) % 4:
        return [[float("nan")] * 4]
    return [found[start : start + 4] for start in range(0, len(found), 4)]


def _has_fraction(text: str) -> bool:
    return any(mark in text.lower() for mark in (".", "e-", "nan", "inf"))
