"""The declared answer formats: how a box is written, and what its numbers mean."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from cloc_mllm.data.texts import is_yaml, read_json, read_yaml
from cloc_mllm.data.values import number
from cloc_mllm.evaluation.answers.frames import Coordinates, Order, Size
from cloc_mllm.evaluation.answers.notations import (
    ANY_NUMBER,
    DECIMAL,
    INTEGER,
    LINK,
    QWEN_REF,
    REF,
    Notation,
    boxes_in,
    bracketed,
    in_json,
    label,
)

_EXAMPLE_BOX, _EXAMPLE_SIZE = (0.2, 0.2, 0.5, 0.75), (640.0, 480.0)


@dataclass(frozen=True)
class AnswerFormat:
    """A declared format.

    Args:
        meaning: what the numbers mean, in words.
        template: an answer, with a `%` conversion for each number; "" if it cannot be written.
    """

    name: str
    meaning: str
    template: str
    coordinates: Coordinates
    notation: Notation

    def write(self, box: Sequence[float], size: Size | None = None) -> str:
        """An answer that names this box: xyxy, 0..1 of the original image.

        Args:
            size: width and height that pixels count in, for frames of pixels.
        """
        return self.template % tuple(self.coordinates.numbers(box, size)) if self.template else ""

    @property
    def example(self) -> str:
        return self.write(_EXAMPLE_BOX, _EXAMPLE_SIZE)


_CORNERS = rf"\({INTEGER}, ?{INTEGER}\), ?\({INTEGER}, ?{INTEGER}\)"
_BRACKETS = ", ?".join([INTEGER] * 4).join((r"\[", r"\]"))
_LOC_PADDED = r"<loc([0-9]{4})>" * 4
_LOC = rf"<loc_{INTEGER}>" * 4
_PATCHES = r"<patch_index_([0-9]{4})>" * 2
_JSON = in_json("bbox_2d")
_INTEGERS, _DECIMALS = bracketed(INTEGER), bracketed(DECIMAL)

_FOUR = "[%s, %s, %s, %s]"
_JSON_TEMPLATE = '[{"bbox_2d": [%s, %s, %s, %s], "label": "the crab"}]'
_LOC_TEMPLATE = "<loc_%s><loc_%s><loc_%s><loc_%s>"
_OF_1000 = Coordinates("bins", divisor=1000, largest=1000)
_IN_1000 = "n / 1000 of the original image"
_AS_SEEN = "pixels of the image as the model saw it (--resized_size, or in each row's settings)"
_LOCATION_TOKENS = "location-tokens"


def _location_tokens(num_bins: int) -> AnswerFormat:
    last = num_bins - 1
    return AnswerFormat(
        f"{_LOCATION_TOKENS}-{num_bins}",
        f"{num_bins} bins a side, x first: n / {last} (-N for any number of bins N)",
        _LOC_TEMPLATE,
        Coordinates("bins", divisor=last, largest=last),
        boxes_in(_LOC, f"(?:(?:{LINK})?BOX)+"),
    )


# fmt: off
_ALL = [
    AnswerFormat(
        "0-1", "fractions of the original image (LLaVA, Shikra)", _FOUR,
        Coordinates("bins"), _DECIMALS),
    AnswerFormat(
        "0-999", "n / 999 of the original image (ours, written as integers)", _FOUR,
        Coordinates("bins", divisor=999, largest=999), _INTEGERS),
    AnswerFormat("0-1000", _IN_1000, _FOUR, _OF_1000, _INTEGERS),
    AnswerFormat(
        "pixels", "pixels of the original image (width and height in the references)", _FOUR,
        Coordinates("pixels"), _DECIMALS),
    AnswerFormat("resized-pixels", _AS_SEEN, _FOUR, Coordinates("resized"), _DECIMALS),
    AnswerFormat(
        "cloc", "our shipped model: 100 location tokens, x first: n / 99", _LOC_TEMPLATE,
        Coordinates("bins", divisor=99, largest=99), boxes_in(_LOC, f"(?:(?:{LINK})?BOX)+")),
    _location_tokens(1000),
    AnswerFormat(
        "gemini", f"{_IN_1000}, y first: [y1, x1, y2, x2]",
        '[{"box_2d": [%s, %s, %s, %s], "label": "the crab"}]',
        Coordinates("bins", divisor=1000, largest=1000, order="yxyx"), in_json("box_2d")),
    AnswerFormat(
        "qwen-vl", _IN_1000, "<ref>the crab</ref><box>(%s,%s),(%s,%s)</box>", _OF_1000,
        boxes_in(_CORNERS, rf"(?:(?:{REF}|{label('(', ')')})(?:<box>)?BOX(?:</box>)?)+")),
    AnswerFormat(
        "qwen2-vl", _IN_1000,
        "<|object_ref_start|>the crab<|object_ref_end|><|box_start|>(%s,%s),(%s,%s)<|box_end|>",
        _OF_1000,
        boxes_in(
            _CORNERS,
            rf"(?:(?:{QWEN_REF}|{label('(', ')')})"
            r"(?:<\|box_start\|>)?BOX(?:<\|box_end\|>)?)+")),
    AnswerFormat("qwen2.5-vl", _AS_SEEN, _JSON_TEMPLATE, Coordinates("resized"), _JSON),
    AnswerFormat(
        "json-pixels", "as qwen2.5-vl, but pixels of the original image", _JSON_TEMPLATE,
        Coordinates("pixels"), _JSON),
    AnswerFormat("qwen3-vl", _IN_1000, _JSON_TEMPLATE, _OF_1000, _JSON),
    AnswerFormat(
        "internvl", _IN_1000, "<ref>the crab</ref><box>[[%s, %s, %s, %s]]</box>", _OF_1000,
        boxes_in(
            _BRACKETS,
            rf"(?:(?:{REF}|{label('[', ']')})(?:<box>)?\[BOX(?:, ?BOX)*\](?:</box>)?)+")),
    AnswerFormat(
        "paligemma", "1024 bins a side, y first: n / 1024",
        "<loc%04d><loc%04d><loc%04d><loc%04d> the crab",
        Coordinates("bins", divisor=1024, largest=1023, order="yxyx"),
        boxes_in(_LOC_PADDED, r"BOX[^<>;]*(?:;\s*BOX[^<>;]*)*")),
    AnswerFormat(
        "florence-2", "1000 bins a side, x first, middle of the bin: (n + 0.5) / 1000",
        f"the crab{_LOC_TEMPLATE}",
        Coordinates("bins", divisor=1000, largest=999, shift=0.5),
        boxes_in(_LOC, r"[^<>]*(?:BOX)+(?:[^<>]+(?:BOX)+)*")),
    AnswerFormat(
        "kosmos-2", "first and last patch of a grid of 32 x 32, middle of the patch",
        "<phrase>the crab</phrase><object><patch_index_%04d><patch_index_%04d></object>",
        Coordinates("patches", largest=1023),
        boxes_in(
            _PATCHES,
            r"(?:<grounding>)?(?:[^<>]*(?:<phrase>[^<>]*</phrase>)?<object>BOX"
            r"(?:</delimiter_of_multi_objects/>BOX)*</object>)+[^<>]*")),
    AnswerFormat(
        "ferret", _IN_1000, f"the crab {_FOUR}.", Coordinates("bins", divisor=1000, largest=999),
        boxes_in(_BRACKETS, rf"(?:{label('[', ']')}BOX)+\.?")),
]
# fmt: on
FORMATS: dict[str, AnswerFormat] = {item.name: item for item in _ALL}


def answer_format(name: str) -> AnswerFormat:
    """Returns a built-in format by its name, or the one that a user defines.

    Args:
        name: one of `FORMATS`; `location-tokens-N` for any number of bins N; a definition as JSON,
            such as `{"order": "yxyx", "scale": 1000, "key": "box_2d"}`, or the path of a `.json` or
            `.yaml` file that holds one; see `own_format`.

    Raises:
        ValueError: an unknown name, which lists all, or a wrong definition.
    """
    tokens = re.fullmatch(rf"{_LOCATION_TOKENS}-([1-9][0-9]{{0,5}})", name)
    if tokens and int(tokens[1]) > 1:
        return _location_tokens(int(tokens[1]))
    if name.lstrip().startswith("{"):
        try:
            return own_format(json.loads(name), name)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"format {name}: no valid JSON ({error})") from error
    if is_yaml(name) or name.lower().endswith(".json"):
        return own_format(read_yaml(name) if is_yaml(name) else read_json(name), name)
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"unknown format {name!r}{hint}; expected one of: {', '.join(FORMATS)}; or one of your "
            'own, as JSON or a file: {"order": "yxyx", "scale": 1000, "key": "box_2d"}'
        )
    return FORMATS[name]


def own_format(definition: Any, name: str) -> AnswerFormat:
    """Makes a format of a definition.

    Args:
        definition: `scale` (a number s: n / s of the original image, so 1 for fractions; `pixels`
            of the original image; `resized-pixels` of the image as the model saw it), `order`
            (`xyxy`, the default, `yxyx`, `xywh` or `cxcywh`), and one of `key` (JSON objects with
            the box under this key), `brackets` (two alike in length, such as `()` or `[[]]`, or a
            list of the texts before and after; the default is `[]`) and `pattern` (a regular
            expression of one box, with four groups).
        name: for messages and reports.

    Raises:
        ValueError: says which value is wrong and what is expected.
    """
    where = f"format {name}"
    known = ("order", "scale", "key", "brackets", "pattern")
    if not isinstance(definition, dict) or not definition.keys() <= set(known):
        raise ValueError(f"{where}: expected an object with scale and some of {', '.join(known)}")
    order = definition.get("order", "xyxy")
    if order not in get_args(Order):
        raise ValueError(f"{where}: order must be {', '.join(get_args(Order))}, got {order!r}")
    coordinates, meaning = _own_coordinates(definition.get("scale"), order, where)
    notation, template = _own_notation(definition, where)
    return AnswerFormat(name, meaning, template, coordinates, notation)


def _own_coordinates(scale: Any, order: Order, where: str) -> tuple[Coordinates, str]:
    if scale == "pixels":
        return Coordinates("pixels", order=order), f"{order}, pixels of the original image"
    if scale == "resized-pixels":
        return Coordinates("resized", order=order), f"{order}, {_AS_SEEN}"
    if not (value := number(scale)) > 0:
        raise ValueError(
            f"{where}: scale must be a positive number (1 for fractions, 1000 for thousandths), "
            f"pixels or resized-pixels, got {scale!r}"
        )
    coordinates = Coordinates("bins", divisor=value, largest=value, order=order)
    return coordinates, f"{order}, n / {value:g} of the original image"


def _own_notation(definition: dict[str, Any], where: str) -> tuple[Notation, str]:
    """The notation and its template."""
    given = [name for name in ("key", "brackets", "pattern") if name in definition]
    if len(given) > 1:
        raise ValueError(f"{where}: expected one of key, brackets and pattern, got {given}")
    if "pattern" in definition:
        return Notation(_own_pattern(definition["pattern"], where)), ""
    if "key" in definition:
        key = definition["key"]
        if not isinstance(key, str) or not key:
            raise ValueError(f"{where}: key must be a text, got {key!r}")
        return in_json(key), f"[{{{_escaped(json.dumps(key))}: {_FOUR}}}]"
    brackets = definition.get("brackets", "[]")
    if isinstance(brackets, str) and len(brackets) % 2 == 0:
        brackets = [brackets[: len(brackets) // 2], brackets[len(brackets) // 2 :]]
    texts = isinstance(brackets, list) and all(isinstance(b, str) and b for b in brackets)
    if not texts or len(brackets) != 2:
        raise ValueError(
            f"{where}: brackets must be two alike in length, such as () or [[]], or a list of the "
            f"texts before and after the numbers, got {definition['brackets']!r}"
        )
    opening, closing = brackets
    template = f"{_escaped(opening)}%s, %s, %s, %s{_escaped(closing)}"
    return bracketed(ANY_NUMBER, opening, closing), template


def _own_pattern(pattern: Any, where: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: pattern is no regular expression ({error})") from error
    if compiled.groups != 4:
        raise ValueError(
            f"{where}: pattern must have four groups, the numbers in their order, got "
            f"{compiled.groups}"
        )
    return compiled


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def describe_formats(formats: Sequence[AnswerFormat] = tuple(_ALL)) -> str:
    """Name, meaning of the numbers and an example of each, as a text."""
    lines = [f"{item.name}\n    {item.meaning}\n    {item.example}" for item in formats]
    return "\n".join(lines)
