"""The declared answer formats: how a box is written, and what its numbers mean."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from cloc_mllm.evaluation.answers.frames import Coordinates

_INTEGER = r"(0|[1-9][0-9]{0,9})"
_DECIMAL = r"([0-9]{1,10}(?:\.[0-9]{1,20})?)"
SIGNED = r"(-?[0-9]{1,10}(?:\.[0-9]{1,20})?)"
_BOX_KEY = "bbox_2d"


@dataclass(frozen=True)
class Notation:
    """Regular expressions: `box` is one box with its numbers as groups, `whole` an entire answer.

    JSON answers have no `whole`: objects with a `bbox_2d`, one or a list of them, bare or in a
    code fence.
    """

    box: re.Pattern[str]
    whole: re.Pattern[str] | None

    def numbers(self, text: str) -> list[list[float]] | None:
        """The numbers of each box of an answer that is nothing but the notation; else None."""
        if self.whole is None:
            return _json_numbers(text)
        if self.whole.fullmatch(text) is None:
            return None
        return self.found(text)

    def found(self, text: str) -> list[list[float]]:
        """The numbers of each box anywhere in a text."""
        return [[float(number) for number in match.groups()] for match in self.box.finditer(text)]


@dataclass(frozen=True)
class AnswerFormat:
    """A declared format: its name, what its numbers mean (`meaning`, `coordinates`), an example."""

    name: str
    meaning: str
    example: str
    coordinates: Coordinates
    notation: Notation


def _json_numbers(text: str) -> list[list[float]] | None:
    if text.startswith("```") and text.endswith("```"):
        text = text.strip("`").removeprefix("json")
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    items = data if isinstance(data, list) else [data]
    boxes = [item.get(_BOX_KEY) if isinstance(item, dict) else None for item in items]
    written = [list(map(_as_float, box)) for box in boxes if _is_box(box)]
    return written if len(written) == len(items) else None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _is_box(value: object) -> TypeGuard[list[float]]:
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
        return float("inf") if value > 0 else float("-inf")


def _notation(box: str, whole: str) -> Notation:
    """`BOX` in `whole` stands for one box."""
    return Notation(re.compile(box), re.compile(whole.replace("BOX", box)))


def _brackets(number: str) -> Notation:
    return _notation(rf"\[{number}, ?{number}, ?{number}, ?{number}\]", r"BOX(?:[,;]?\s*BOX)*")


_BRACKETS = rf"\[{_INTEGER}, ?{_INTEGER}, ?{_INTEGER}, ?{_INTEGER}\]"
_CORNERS = rf"\({_INTEGER}, ?{_INTEGER}\), ?\({_INTEGER}, ?{_INTEGER}\)"
_LOC_PADDED = r"<loc([0-9]{4})>" * 4
_LOC = rf"<loc_{_INTEGER}>" * 4
_PATCHES = r"<patch_index_([0-9]{4})>" * 2
_JSON = Notation(
    re.compile(rf'"{_BOX_KEY}":\s*\[\s*' + r"\s*,\s*".join([SIGNED] * 4) + r"\s*\]"), None
)

_OF_1000 = Coordinates("bins", divisor=1000, largest=1000)
_IN_1000 = "n / 1000 of the original image"
_AS_SEEN = "pixels of the image as the model saw it (--resized_size, or in each row's settings)"
_LOCATION_TOKENS = "location-tokens"
_INTEGERS, _DECIMALS = _brackets(_INTEGER), _brackets(_DECIMAL)


def _location_tokens(num_bins: int) -> AnswerFormat:
    last = num_bins - 1
    example = "".join(f"<loc_{round(value * last)}>" for value in (0.2, 0.2, 0.5, 0.75))
    return AnswerFormat(
        f"{_LOCATION_TOKENS}-{num_bins}",
        f"{num_bins} bins a side, x first: n / {last} (-N for any number of bins N)",
        example,
        Coordinates("bins", divisor=last, largest=last),
        _notation(_LOC, "(?:BOX)+"),
    )


# fmt: off
_ALL = [
    AnswerFormat(
        "0-1", "fractions of the original image (LLaVA, Shikra)",
        "[0.2, 0.2, 0.5, 0.75]", Coordinates("bins"), _DECIMALS),
    AnswerFormat(
        "0-999", "n / 999 of the original image (ours, written as integers)",
        "[200, 200, 500, 749]", Coordinates("bins", divisor=999, largest=999), _INTEGERS),
    AnswerFormat("0-1000", _IN_1000, "[200, 200, 500, 750]", _OF_1000, _INTEGERS),
    AnswerFormat(
        "pixels", "pixels of the original image (width and height in the references)",
        "[128, 96, 320, 360]", Coordinates("pixels"), _DECIMALS),
    AnswerFormat(
        "resized-pixels", _AS_SEEN, "[128, 96, 320, 360]", Coordinates("resized"), _DECIMALS),
    AnswerFormat(
        "cloc", "our shipped model: 100 location tokens, x first: n / 99",
        "<loc_20><loc_20><loc_50><loc_74>", Coordinates("bins", divisor=99, largest=99),
        _notation(_LOC, "(?:BOX)+")),
    _location_tokens(1000),
    AnswerFormat(
        "qwen-vl", _IN_1000, "<ref>the crab</ref><box>(200,200),(500,750)</box>", _OF_1000,
        _notation(_CORNERS, r"(?:(?:<ref>)?[^<>()]*(?:</ref>)?(?:<box>)?BOX(?:</box>)?)+")),
    AnswerFormat(
        "qwen2-vl", _IN_1000,
        "<|object_ref_start|>the crab<|object_ref_end|><|box_start|>(200,200),(500,750)<|box_end|>",
        _OF_1000,
        _notation(
            _CORNERS,
            r"(?:(?:<\|object_ref_start\|>)?[^<>()]*(?:<\|object_ref_end\|>)?"
            r"(?:<\|box_start\|>)?BOX(?:<\|box_end\|>)?)+")),
    AnswerFormat(
        "qwen2.5-vl", _AS_SEEN, '[{"bbox_2d": [128, 96, 320, 360], "label": "the crab"}]',
        Coordinates("resized"), _JSON),
    AnswerFormat(
        "json-pixels", "as qwen2.5-vl, but pixels of the original image",
        '[{"bbox_2d": [128, 96, 320, 360], "label": "the crab"}]', Coordinates("pixels"), _JSON),
    AnswerFormat(
        "qwen3-vl", _IN_1000, '[{"bbox_2d": [200, 200, 500, 750], "label": "the crab"}]',
        _OF_1000, _JSON),
    AnswerFormat(
        "internvl", _IN_1000, "<ref>the crab</ref><box>[[200, 200, 500, 750]]</box>", _OF_1000,
        _notation(
            _BRACKETS,
            r"(?:(?:<ref>)?[^<>\[\]]*(?:</ref>)?(?:<box>)?\[BOX(?:, ?BOX)*\](?:</box>)?)+")),
    AnswerFormat(
        "paligemma", "1024 bins a side, y first: n / 1024",
        "<loc0205><loc0205><loc0768><loc0512> the crab",
        Coordinates("bins", divisor=1024, largest=1023, y_first=True),
        _notation(_LOC_PADDED, r"BOX[^<>;]*(?:;\s*BOX[^<>;]*)*")),
    AnswerFormat(
        "florence-2", "1000 bins a side, x first, middle of the bin: (n + 0.5) / 1000",
        "the crab<loc_200><loc_200><loc_500><loc_750>",
        Coordinates("bins", divisor=1000, largest=999, shift=0.5),
        _notation(_LOC, r"[^<>]*(?:BOX)+(?:[^<>]+(?:BOX)+)*")),
    AnswerFormat(
        "kosmos-2", "first and last patch of a grid of 32 x 32, middle of the patch",
        "<phrase>the crab</phrase><object><patch_index_0198><patch_index_0752></object>",
        Coordinates("patches", largest=1023),
        _notation(
            _PATCHES,
            r"(?:<grounding>)?(?:[^<>]*(?:<phrase>[^<>]*</phrase>)?<object>BOX"
            r"(?:</delimiter_of_multi_objects/>BOX)*</object>)+[^<>]*")),
    AnswerFormat(
        "ferret", _IN_1000, "the crab [200, 200, 500, 750].",
        Coordinates("bins", divisor=1000, largest=999),
        _notation(_BRACKETS, r"(?:[^\[\]]*BOX)+\.?")),
]
# fmt: on
FORMATS: dict[str, AnswerFormat] = {item.name: item for item in _ALL}


def answer_format(name: str) -> AnswerFormat:
    """The format of a name; `location-tokens-N` exists for every number of bins N.

    Raises:
        ValueError: an unknown name; the message lists all.
    """
    tokens = re.fullmatch(rf"{_LOCATION_TOKENS}-([1-9][0-9]{{0,5}})", name)
    if tokens and int(tokens[1]) > 1:
        return _location_tokens(int(tokens[1]))
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown format {name!r}{hint}; expected one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def describe_formats(formats: Sequence[AnswerFormat] = tuple(_ALL)) -> str:
    """Name, meaning of the numbers and an example of each, as a text."""
    lines = [f"{item.name}\n    {item.meaning}\n    {item.example}" for item in formats]
    return "\n".join(lines)
