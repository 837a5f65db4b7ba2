"""The fields of a row from the values that any tool writes.

What has one meaning is taken (`"640"` for 640, one box for a list of one, null for nothing); the
rest is refused with what was expected and what came.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.values import id_key, number

_LARGEST = 1_000_000_000  # of a count or a side in pixels


def field_value(name: str, value: Any) -> Any:
    """The value of a field of `PredictionRow` or `ReferenceRow`; None where there is none.

    Raises:
        ValueError: says what is expected and what came.
    """
    is_blank = isinstance(value, str) and not value.strip() and name != "raw_text"
    if value is None or is_blank or value != value:  # NaN is how pandas writes nothing
        return None
    expected, convert = _FIELDS[name]
    found = convert(value)
    if found is None:
        raise ValueError(f"expected {expected.format(name)}, got {shown(value)!r}")
    return found


def column(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column; `doc.bbox` and `answers.0` also look inside objects and lists.

    Raises:
        KeyError: there is none.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, list) and re.fullmatch("[0-9]{1,4}", part) and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            raise KeyError(path)
    return value


def _text(value: Any) -> str | None:
    """A text, a number, the text of a list of one, or as JSON an answer that was parsed before."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], (str, list)):
            return _text(value[0])
        if any(isinstance(item, str) and math.isnan(number(item)) for item in value):
            return None  # several answers
    return json.dumps(value, ensure_ascii=False)


def _texts(value: Any) -> list[str] | None:
    parsed = _parsed(value) if isinstance(value, str) else value
    items = parsed if isinstance(parsed, list) else [value]
    texts = [item if isinstance(item, str) else id_key(item) for item in items]
    return None if None in texts else texts  # type: ignore[return-value]


def _number(value: Any) -> float | None:
    found = number(value)
    return None if math.isnan(found) else found


def _numbers(value: Any) -> list[float] | None:
    value = _parsed(value) if isinstance(value, str) else value
    found = [number(item) for item in value] if isinstance(value, list) else [math.nan]
    return None if any(map(math.isnan, found)) else found


def _whole(value: Any) -> int | None:
    found = number(value)
    return int(found) if 0 <= found <= _LARGEST and found.is_integer() else None


def _boxes(value: Any) -> list[list[float]] | None:
    """A list of boxes, or one box: `[0.2, 0.2, 0.5, 0.75]`, also as a text or without brackets."""
    if isinstance(value, str):
        text = value.strip()
        value = _parsed(text) if text.startswith("[") else re.split(r"\s*[,;]\s*|\s+", text)
    if not isinstance(value, list):
        return None
    boxes = [value] if value and not isinstance(value[0], list) else value
    found = [_numbers(box) for box in boxes]
    return None if any(box is None or len(box) != 4 for box in found) else found  # type: ignore[return-value]


def _object(value: Any) -> dict[str, Any] | None:
    value = _parsed(value) if isinstance(value, str) else value
    return value if isinstance(value, dict) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_Convert = Callable[[Any], Any]
_FIELDS: dict[str, tuple[str, _Convert]] = {
    **dict.fromkeys(("id", "image_id"), ("a text or a number in the column {}", id_key)),
    **dict.fromkeys(
        ("task", "prompt", "raw_text", "box_frame", "failure", "model", "kind"),
        ("one text in the column {}", _text),
    ),
    **dict.fromkeys(("labels", "choices"), ("a text or a list of texts in the column {}", _texts)),
    **dict.fromkeys(
        ("width", "height", "num_candidates", "num_distractors"),
        ("a whole number in the column {}", _whole),
    ),
    "boxes": ("JSON in the column {}: four numbers 0..1 of the original image per box", _boxes),
    "confidence": ("a number in the column {}", _number),
    "scores": ("JSON in the column {}: a list of numbers", _numbers),
    "settings": ("JSON in the column {}: an object", _object),
}
