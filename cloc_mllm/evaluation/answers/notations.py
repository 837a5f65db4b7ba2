"""Notations of boxes: regular expressions of one box and of a whole answer, and JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

from cloc_mllm.data.values import number

INTEGER = r"(0|[1-9][0-9]{0,9})"
DECIMAL = r"([0-9]{1,10}(?:\.[0-9]{1,20})?)"
# as anyone may write a number: "200", .2, 1.28e2; bounded, so that no text takes long to search
ANY_NUMBER = (
    r"[\"']?([-+]?(?:[0-9]{1,10}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][-+]?[0-9]{1,2})?)[\"']?"
)
GAP = r"(?:\s{0,8}[,;、]\s{0,8}|\s{1,8})"
FOUR = GAP.join([ANY_NUMBER] * 4)
REF = "<ref>[^<]*</ref>"
LINK = r"<p>[^<]*</p>\s*"  # our own, of mllm.coordinates
QWEN_REF = r"<\|object_ref_start\|>[^<]*<\|object_ref_end\|>"
# words about a box, whose brackets are none: <ref>sign [12, 3]</ref>, "label": "sign [12, 3]"
_LABEL = re.compile(
    rf"{REF}|{LINK}|{QWEN_REF}|<phrase>[^<]*</phrase>|"
    r"[\"'](?:label|name|object|phrase|description|category|class|text|text_content|caption|title)"
    r"[\"']\s{0,8}:\s{0,8}(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')"
)
_FENCE = re.compile(r"```(?:json)?(.*)```", re.DOTALL)


@dataclass(frozen=True)
class Notation:
    """A notation of boxes.

    Args:
        box: one box anywhere in a text, with its numbers as groups.
        whole: an entire answer; where it is None, only commas and spaces may stand around boxes.
        key: of JSON answers: an object with this key, or a list of such, bare or in a code fence.
    """

    box: re.Pattern[str]
    whole: re.Pattern[str] | None = None
    key: str = ""

    def numbers(self, text: str) -> list[list[float]] | None:
        """The numbers of each box of an answer that is nothing but the notation; else None."""
        if self.key:
            return _json_numbers(text, self.key)
        if self.whole is not None:
            return self.found(without_labels(text)) if self.whole.fullmatch(text) else None
        found = self.found(text)
        return found if found and not self.box.sub("", text).strip(" \t\r\n,;") else None

    def found(self, text: str) -> list[list[float]]:
        """The numbers of each box anywhere in a text."""
        boxes = [list(map(number, match.groups())) for match in self.box.finditer(text)]
        return [box for box in boxes if not any(map(math.isnan, box))]


def without_labels(text: str) -> str:
    return _LABEL.sub(" ", text)


def boxes_in(box: str, whole: str) -> Notation:
    """A notation of two regular expressions; `BOX` in `whole` stands for one box."""
    return Notation(re.compile(box), re.compile(whole.replace("BOX", box)))


def bracketed(one_number: str, opening: str = "[", closing: str = "]") -> Notation:
    """Four numbers in brackets, a linked phrase before them or none; several boxes with a comma, a
    semicolon or nothing between."""
    numbers = ", ?".join([one_number] * 4)
    box = re.escape(opening) + numbers + re.escape(closing)
    return boxes_in(box, rf"(?:{LINK})?BOX(?:[,;]?\s*(?:{LINK})?BOX)*")


def in_json(key: str) -> Notation:
    """JSON objects that hold their box under a key."""
    return Notation(_after_key(re.escape(key)), key=key)


def _after_key(key: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?<!\w)[\"']?{key}[\"']?\s{{0,8}}[:=]\s{{0,8}}[\"']?[\[(]{{1,2}}\s{{0,8}}{FOUR}\s{{0,8}}[\])]"
    )


# the names under which models put a box
ANY_KEY = Notation(
    _after_key("(?:bbox_2d|box_2d|bboxes|bbox|boxes|box|bounding_?[bB]ox|coordinates|coords|xyxy)")
)


def label(opening: str, closing: str) -> str:
    """The words that may stand before a box: anything but tags and brackets, or brackets that hold
    a letter: `the man (left)`."""
    o, c = re.escape(opening), re.escape(closing)
    return rf"(?:[^<>{o}{c}]|{o}(?=[^{o}{c}]*?[^\W\d_])[^<>{o}{c}]*{c})*"


def _json_numbers(text: str, key: str) -> list[list[float]] | None:
    fenced = _FENCE.fullmatch(text)
    try:
        data = json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    items = data if isinstance(data, list) else [data]
    boxes = [item.get(key) if isinstance(item, dict) else None for item in items]
    written = [list(map(_as_float, box)) for box in boxes if _is_box(box)]
    return written if len(written) == len(items) else None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _is_box(value: Any) -> TypeGuard[list[float]]:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value)
    )


def _as_float(value: float) -> float:
    """A whole number too large for a float is infinite: out of every frame."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
