"""One file a source format; each reader yields validated records and accounts for every item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cloc_mllm.data.records import Box
from cloc_mllm.geometry import Boxes

_NO_BOX: Box = (float("nan"),) * 4  # what `validate_record` counts as `not_finite`


def boxes_from_xyxy(rows: Sequence[Any], width: Any, height: Any) -> list[Box]:
    """Annotated pixel boxes xyxy of a `width` x `height` image -> normalised boxes.

    Nothing is refused here: a row that is not four numbers, or an image size that is not
    positive, becomes NaN.
    """
    return _normalize(Boxes.pixels, rows, width, height)


def boxes_from_xywh(rows: Sequence[Any], width: Any, height: Any) -> list[Box]:
    """The same for boxes given as x, y, width, height."""
    return _normalize(Boxes.from_xywh_pixels, rows, width, height)


def _normalize(
    to_boxes: Callable[..., Boxes], rows: Sequence[Any], width: Any, height: Any
) -> list[Box]:
    numbers = [_four_numbers(row) for row in rows]
    size_wh = _numbers([width, height])
    if size_wh is None or not min(size_wh) > 0:
        return [_NO_BOX] * len(rows)
    return [tuple(row) for row in to_boxes(numbers, *size_wh).to_normalized().xyxy.tolist()]


def _four_numbers(row: Any) -> list[float]:
    numbers = _numbers(row)
    return numbers if numbers is not None and len(numbers) == 4 else list(_NO_BOX)


def _numbers(values: Any) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
