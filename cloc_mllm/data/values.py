"""Ids, numbers and containers as annotation files write them. Ids are compared by `id_key`."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from cloc_mllm.data.drop_log import shown

_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0*)?", re.ASCII)


def id_key(value: Any) -> str | None:
    """Spells an id: `1`, `"1"`, `1.0`, `"1.0"` and `" 1 "` are one id, `"1"`.

    A text with leading zeros stays as it is: "007" is not 7.

    Returns:
        None for what is no id: nothing, an empty text, true and false, NaN, lists and objects.
    """
    if isinstance(value, str):
        text = value.strip(" \t\r\n\ufeff")
        whole = _WHOLE.fullmatch(text)
        return (whole[1] if whole else text) or None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else value
    return str(value)


def by_id(rows: Iterable[dict[str, Any]], key: str, where: str) -> dict[str, dict[str, Any]]:
    """Indexes rows by their `id`; rows without one are left out.

    Args:
        key: what an id stands for (`file_name`, `name`); two rows of one id must agree on it.
        where: file and list, for the message.

    Raises:
        ValueError: one id stands for two things; both are named.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if (row_id := id_key(row.get("id"))) is None:
            continue
        first = found.setdefault(row_id, row)
        if first.get(key) != row.get(key):
            raise ValueError(
                f"{where}: expected one {key} per id, but id {row_id} has "
                f"{shown(first.get(key))} and {shown(row.get(key))}; number them anew, or read "
                "the files that were joined one by one"
            )
    return found


def number(value: Any) -> float:
    """Reads a number: a number, or a text such as `12`, `1.28e2`, `.2` or full-width digits.

    Returns:
        NaN for everything that states no finite number, true and false included.
    """
    if isinstance(value, str):
        text = unicodedata.normalize("NFKC", value).strip()
        value = math.nan if "_" in text else text  # Python would read 1_000
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return found if math.isfinite(found) else math.nan


def numbers(values: Any, count: int) -> list[float]:
    """Reads a list of exactly `count` numbers; all are NaN where it is none."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return [math.nan] * count
    return [number(value) for value in values]


def size_of(width: Any, height: Any) -> tuple[float, float] | None:
    """Reads a stated size; None where one is missing, null, 0, negative or no number."""
    size = number(width), number(height)
    return size if size[0] > 0 and size[1] > 0 else None


def as_list(value: Any) -> list[Any]:
    """Takes `value` if it is a list, else an empty one: annotations are not always as promised."""
    return value if isinstance(value, list) else []


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
