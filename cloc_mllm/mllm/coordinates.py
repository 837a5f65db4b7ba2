"""Boxes as text, both ways. Nothing else writes box text; `evaluation.answers` reads others' too.

Box text is always in the original image's normalised frame, so padding never changes an answer.
A coordinate in 0..1 becomes the nearest of `num_bins` bins; bin 0 is 0.0, the last bin is 1.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cloc_mllm.data.conversations import NOT_THERE

IMAGE_TOKEN = "<image>"
REGION_TOKEN = "<region>"
BOX_TOKEN = "<box>"

XYXY = tuple[float, float, float, float]

_INTEGER_BINS = 1000
_NUMBER = "(0|[1-9][0-9]{0,9})"
_INTEGERS_BOX = rf"\[{_NUMBER}, {_NUMBER}, {_NUMBER}, {_NUMBER}\]"
_LOCATION = rf"<loc_{_NUMBER}>"
# the separator between the boxes of one answer
_PATTERNS = {
    "integers": (re.compile(_INTEGERS_BOX), re.compile(rf"{_INTEGERS_BOX}(?: {_INTEGERS_BOX})*")),
    "location_tokens": (re.compile(_LOCATION * 4), re.compile(rf"(?:{_LOCATION})+")),
}

_HEAD_BOX = re.compile(re.escape(BOX_TOKEN))


class PlacedBox(NamedTuple):
    """A box (xyxy, normalised to the original image) that a text writes in `[start, end)`."""

    start: int
    end: int
    box: XYXY


@dataclass(frozen=True)
class ParsedBoxes:
    """`boxes` (xyxy, normalised to the original image), or none of them and why.

    `failure` is None or one of `empty`, `not_there` (the answer `NOT_THERE`), `not_a_box` (anything
    but boxes, or text around them), `wrong_count` (location tokens not four a box), `out_of_range`,
    `inverted`, `zero_area`.
    """

    boxes: list[XYXY]
    failure: str | None = None


@dataclass(frozen=True)
class BoxFormat:
    """How a box is written: integers `[120, 43, 560, 890]`, or four location tokens
    `<loc_12><loc_4><loc_56><loc_89>`. Several boxes stand one after another (integers with a
    space between).

    With `head` that is how questions write them; an answer's box is one `<box>`, whose four numbers
    a head reads off the language model's hidden state (`mllm/answer_boxes.py`)."""

    kind: Literal["integers", "location_tokens"]
    num_bins: int = _INTEGER_BINS
    head: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _PATTERNS:
            raise ValueError(f"box format must be one of {sorted(_PATTERNS)}, got {self.kind!r}")
        if self.num_bins < 2:
            raise ValueError(f"a box format needs at least 2 bins, got {self.num_bins}")
        if self.kind == "integers":
            object.__setattr__(self, "num_bins", _INTEGER_BINS)

    def tokens(self) -> list[str]:
        """Tokens the tokenizer must get, in bin order; none for integers."""
        if self.kind == "integers":
            return []
        return [f"<loc_{index}>" for index in range(self.num_bins)]

    def bins(self, box: Sequence[float]) -> tuple[int, int, int, int]:
        """Nearest bins of a normalised xyxy box; a side thinner than a bin is widened to one.

        Raises `ValueError` for a box that is not finite, inverted, empty or outside 0..1.
        """
        x1, y1, x2, y2 = (float(value) for value in box)
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            raise ValueError(
                f"expected a normalised box with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, got "
                f"{tuple(box)}; clean it with geometry.clean_box first"
            )
        (left, right), (top, bottom) = self._side(x1, x2), self._side(y1, y2)
        return left, top, right, bottom

    def encode(self, box: Sequence[float]) -> str:
        """Normalised xyxy box -> its text. Raises like `bins`."""
        bins = self.bins(box)
        if self.kind == "integers":
            return f"[{', '.join(map(str, bins))}]"
        return "".join(f"<loc_{index}>" for index in bins)

    def answer(self, box: Sequence[float]) -> str:
        """The text that answers with a normalised box. Raises like `bins`."""
        text = self.encode(box)
        return BOX_TOKEN if self.head else text

    def parse(self, text: str, regressed: Sequence[Sequence[float]] = ()) -> ParsedBoxes:
        """The text of an answer -> boxes. Strict: the whole text must be boxes. Never raises.

        Args:
            regressed: what the head gave for each `<box>` of the text, normalised.
        """
        text = text.strip()
        if not text:
            return ParsedBoxes([], "empty")
        if text == NOT_THERE:
            return ParsedBoxes([], "not_there")
        if self.head:
            return _parse_regressed(text, regressed)
        one, whole = _PATTERNS[self.kind]
        if whole.fullmatch(text) is None:
            return ParsedBoxes([], "not_a_box")
        if self.kind == "location_tokens" and text.count("<") % 4:
            return ParsedBoxes([], "wrong_count")
        boxes = []
        for match in one.finditer(text):
            left, top, right, bottom = bins = tuple(int(number) for number in match.groups())
            failure = self._check(bins)
            if failure is not None:
                return ParsedBoxes([], failure)
            last = self.num_bins - 1
            boxes.append((left / last, top / last, right / last, bottom / last))
        return ParsedBoxes(boxes)

    def find(
        self, text: str, regressed: Sequence[Sequence[float]] = ()
    ) -> tuple[list[PlacedBox], list[str]]:
        """Boxes anywhere in a text, in their order, and why what looks like others is none.

        Args:
            regressed: as for `parse`.
        """
        one, whole = (_HEAD_BOX, _HEAD_BOX) if self.head else _PATTERNS[self.kind]
        found: list[PlacedBox] = []
        failures: list[str] = []
        for index, run in enumerate(whole.finditer(text)):
            parsed = self.parse(run.group(), regressed[index : index + 1])
            if parsed.failure is not None:
                failures.append(parsed.failure)
                continue
            matches = one.finditer(text, run.start(), run.end())
            for match, box in zip(matches, parsed.boxes, strict=True):
                found.append(PlacedBox(match.start(), match.end(), box))
        return found, failures

    def rewrite(self, text: str, write: Callable[[XYXY], str]) -> str:
        """The text with each box that parses written by `write`; all else stays as it is."""

        def written(match: re.Match[str]) -> str:
            parsed = self.parse(match.group())
            return match.group() if parsed.failure else write(parsed.boxes[0])

        return _PATTERNS[self.kind][0].sub(written, text)

    def _side(self, low: float, high: float) -> tuple[int, int]:
        last = self.num_bins - 1
        first, second = round(low * last), round(high * last)
        if first < second:
            return first, second
        # both ends are nearest to one bin: move the end that lies further from it
        if (high * last - second > first - low * last and second < last) or first == 0:
            return first, second + 1
        return first - 1, second

    def _check(self, bins: tuple[int, ...]) -> str | None:
        left, top, right, bottom = bins
        if max(bins) >= self.num_bins:
            return "out_of_range"
        if right < left or bottom < top:
            return "inverted"
        if right == left or bottom == top:
            return "zero_area"
        return None


def _parse_regressed(text: str, regressed: Sequence[Sequence[float]]) -> ParsedBoxes:
    if not regressed or text != BOX_TOKEN * len(regressed):
        return ParsedBoxes([], "not_a_box")
    boxes = []
    for box in regressed:
        x1, y1, x2, y2 = (min(max(float(value), 0.0), 1.0) for value in box)
        if not (x1 < x2 and y1 < y2):  # also a box that is not a number
            return ParsedBoxes([], "zero_area")
        boxes.append((x1, y1, x2, y2))
    return ParsedBoxes(boxes)
