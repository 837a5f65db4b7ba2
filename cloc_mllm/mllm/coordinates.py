"""Writes boxes as text and reads them back.

Nothing else writes box text; `evaluation.answers` also reads the formats of other models. Box text
is always in the normalised frame of the original image, so padding never changes an answer. A
coordinate in 0..1 becomes the nearest of `num_bins` bins; bin 0 is 0.0 and the last bin is 1.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cloc_mllm.data.wordings import NOT_THERE

IMAGE_TOKEN = "<image>"
REGION_TOKEN = "<region>"
BOX_TOKEN = "<box>"

XYXY = tuple[float, float, float, float]

_INTEGER_BINS = 1000
_NUMBER = "(0|[1-9][0-9]{0,9})"
_INTEGERS_BOX = rf"\[{_NUMBER}, {_NUMBER}, {_NUMBER}, {_NUMBER}\]"
_LOCATION = rf"<loc_{_NUMBER}>"
# by kind: one box, and a whole answer of boxes
_PATTERNS = {
    "integers": (re.compile(_INTEGERS_BOX), re.compile(rf"{_INTEGERS_BOX}(?: {_INTEGERS_BOX})*")),
    "location_tokens": (re.compile(_LOCATION * 4), re.compile(rf"(?:{_LOCATION})+")),
}
_POINTS = {
    "integers": re.compile(rf"\[{_NUMBER}, {_NUMBER}\]"),
    "location_tokens": re.compile(_LOCATION * 2),
}

_HEAD_BOX = re.compile(re.escape(BOX_TOKEN))
# a phrase that is linked to the boxes behind it
_LINK = re.compile(rf"<p>([^<>]*)</p>\s*(?=\[|<loc_|{BOX_TOKEN})")


class PlacedBox(NamedTuple):
    """A box that a text writes as `text[start:end]`: xyxy, normalised to the original image."""

    start: int
    end: int
    box: XYXY


@dataclass(frozen=True)
class ParsedBoxes:
    """The boxes of an answer, or why it has none.

    Attributes:
        boxes: xyxy, normalised to the original image; empty if there is a failure.
        failure: None, or one of `empty`, `not_there` (the answer is `NOT_THERE`), `not_a_box`
            (anything but boxes, or text around them), `wrong_count` (the number of location tokens
            is no multiple of four), `out_of_range`, `inverted`, `zero_area`.
    """

    boxes: list[XYXY]
    failure: str | None = None


@dataclass(frozen=True)
class BoxFormat:
    """The notation of boxes.

    Attributes:
        kind: `integers` are `[120, 43, 560, 890]`, several boxes with a space between them;
            `location_tokens` are `<loc_12><loc_4><loc_56><loc_89>`, several without a space.
        num_bins: the number of values of a coordinate; always 1000 for integers.
        head: questions write boxes by `kind`, but each box of an answer is one `<box>` token, and
            a head reads its four numbers off the language model's hidden state
            (`mllm/answer_boxes.py`).
    """

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
        """Lists the tokens that the tokenizer needs, in the order of bins; none for integers."""
        if self.kind == "integers":
            return []
        return [f"<loc_{index}>" for index in range(self.num_bins)]

    @property
    def separator(self) -> str:
        """What stands between boxes that `encode` writes."""
        return " " if self.kind == "integers" else ""

    @property
    def answer_separator(self) -> str:
        """What stands between boxes that `answer` writes."""
        return "" if self.head else self.separator

    def bins(self, box: Sequence[float]) -> tuple[int, int, int, int]:
        """Returns the nearest bins of a normalised xyxy box; a side is at least one bin long.

        Raises:
            ValueError: the box is not finite, inverted, empty or outside 0..1.
        """
        x1, y1, x2, y2 = (float(value) for value in box)
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            raise ValueError(
                f"expected a normalised box with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, got "
                f"{tuple(box)}; clean it with box.clip_box first"
            )
        (left, right), (top, bottom) = self._side(x1, x2), self._side(y1, y2)
        return left, top, right, bottom

    def encode(self, box: Sequence[float]) -> str:
        """Writes a normalised xyxy box as text. Raises what `bins` raises."""
        bins = self.bins(box)
        if self.kind == "integers":
            return f"[{', '.join(map(str, bins))}]"
        return "".join(f"<loc_{index}>" for index in bins)

    def answer(self, box: Sequence[float]) -> str:
        """Writes the answer whose only box is this normalised one. Raises what `bins` raises."""
        text = self.encode(box)
        return BOX_TOKEN if self.head else text

    def answers(self, boxes: Sequence[Sequence[float]]) -> str:
        """Writes the answer that these normalised boxes are. Raises what `bins` raises."""
        return self.answer_separator.join(map(self.answer, boxes))

    def link(self, phrase: str, boxes: Sequence[Sequence[float]]) -> str:
        """Writes a phrase of a caption with its boxes: `<p>two crabs</p>BOXES`."""
        return self.linked(phrase, self.answers(boxes))

    @staticmethod
    def linked(phrase: str, places: str) -> str:
        """Writes a phrase and the text of its places: `<p>PHRASE</p>PLACES`."""
        return f"<p>{phrase}</p>{places}"

    def in_order(self, boxes: Iterable[XYXY]) -> list[XYXY]:
        """Sorts boxes as answers list them: from left to right, then from top to bottom.

        Boxes that are written alike come once. Raises what `bins` raises.
        """
        by_bins: dict[tuple[int, ...], XYXY] = {}
        for box in boxes:
            by_bins.setdefault(self.bins(box), box)
        return [by_bins[bins] for bins in sorted(by_bins)]

    def encode_point(self, point: tuple[float, float]) -> str:
        """Writes a normalised xy point as two numbers; also a model with a box head writes them.

        Raises:
            ValueError: the point is not finite or outside 0..1.
        """
        if not all(0 <= value <= 1 for value in point):
            raise ValueError(f"expected a point x, y in 0..1, got {tuple(point)}")
        x, y = (round(value * (self.num_bins - 1)) for value in point)
        return f"[{x}, {y}]" if self.kind == "integers" else f"<loc_{x}><loc_{y}>"

    def parse_point(self, text: str) -> tuple[float, float] | None:
        """Reads an answer that is one point, normalised; None if it is anything else."""
        match = _POINTS[self.kind].fullmatch(text.strip())
        numbers = [int(number) for number in match.groups()] if match else []
        if not numbers or max(numbers) >= self.num_bins:
            return None
        x, y = numbers
        return x / (self.num_bins - 1), y / (self.num_bins - 1)

    def parse(self, text: str, regressed: Sequence[Sequence[float]] = ()) -> ParsedBoxes:
        """Reads the boxes of an answer, which must be boxes and nothing else. Never raises.

        Phrases that are linked to boxes (`link`) may stand before them.

        Args:
            regressed: what the head read for each `<box>` of the text, normalised.
        """
        text = text.strip()
        if not text:
            return ParsedBoxes([], "empty")
        if text == NOT_THERE:
            return ParsedBoxes([], "not_there")
        text = _LINK.sub("", text)
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
        """Finds the boxes anywhere in a text. Two location tokens alone are a point, and no box.

        Args:
            regressed: as for `parse`.

        Returns:
            the boxes in their order, and for what looks like other boxes the reasons it is none.
        """
        one, whole = (_HEAD_BOX, _HEAD_BOX) if self.head else _PATTERNS[self.kind]
        found: list[PlacedBox] = []
        failures: list[str] = []
        for index, run in enumerate(whole.finditer(text)):
            if _POINTS[self.kind].fullmatch(run.group()):
                continue
            parsed = self.parse(run.group(), regressed[index : index + 1])
            if parsed.failure is not None:
                failures.append(parsed.failure)
                continue
            matches = one.finditer(text, run.start(), run.end())
            for match, box in zip(matches, parsed.boxes, strict=True):
                found.append(PlacedBox(match.start(), match.end(), box))
        return found, failures

    def rewrite(self, text: str, write: Callable[[XYXY], str]) -> str:
        """Replaces each box of a text that parses by what `write` makes of it."""

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


def linked_phrases(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Lists the phrase that each box of a text is linked to (`BoxFormat.link`); "" for none.

    Args:
        spans: where the boxes stand, `text[start:end]` each, in their order.
    """
    phrase_at = {match.end(): match[1] for match in _LINK.finditer(text)}
    phrases: list[str] = []
    last_end = None
    for start, end in spans:
        follows = last_end is not None and not text[last_end:start].strip()
        phrases.append(phrase_at.get(start, phrases[-1] if follows else ""))
        last_end = end
    return phrases


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
