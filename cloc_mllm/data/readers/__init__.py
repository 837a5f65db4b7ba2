"""One file a source format; each reader yields validated records and accounts for every item."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.readers.files import IMAGE_SUFFIXES
from cloc_mllm.data.records import Box, Record, Region, clean_text, validate_record
from cloc_mllm.geometry import Boxes

_NO_BOX: Box = (float("nan"),) * 4  # what `validate_record` counts as `not_finite`


def deliver(
    record_id: Any,
    image: bytes,
    source: str,
    captions: list[Any],
    regions: list[Region],
    drop_log: DropLog,
) -> Iterator[Record]:
    """The record of these parts, validated: one, or none where `validate_record` drops it."""
    text_id = "" if record_id is None else str(record_id)
    # width and height are the image file's: `validate_record` sets them
    record = validate_record(Record(text_id, image, 0, 0, captions, regions, source), drop_log)
    if record is not None:
        yield record


def name_to_id(file_name: Any) -> str:
    """The id of an image known by its file alone: the path as it is listed, without suffix."""
    name = str(file_name or "")
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name


def as_list(value: Any) -> list[Any]:
    """`value` if it is a list, else nothing: annotations are not always what they should be."""
    return value if isinstance(value, list) else []


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def group_rows(rows: Iterable[tuple[Any, Any]]) -> dict[str, list[Any]]:
    """(name of the image, row) pairs -> rows by name, names and rows in their order."""
    grouped: dict[str, list[Any]] = {}
    for name, row in rows:
        grouped.setdefault(str(name), []).append(row)
    return grouped


def regions_of_expressions(pairs: Sequence[tuple[Any, Box, Any]]) -> list[Region]:
    """(annotated box, the same normalised, expression) -> a region for each distinct box.

    Its phrase is its first usable expression, `expressions` holds them all.
    """
    same_box: dict[str, list[tuple[Any, Box, Any]]] = {}
    for pair in pairs:  # as text, because NaN is not equal to itself
        same_box.setdefault(repr(pair[0]), []).append(pair)
    regions = []
    for group in same_box.values():
        expressions = [text for _, _, text in group]
        phrase = next((text for text in expressions if clean_text(text)[0]), "")
        regions.append(Region(box=group[0][1], phrase=phrase, expressions=expressions))
    return regions


def boxes_from_xyxy(rows: Sequence[Any], width: Any, height: Any) -> list[Box]:
    """Annotated pixel boxes xyxy of a `width` x `height` image -> normalised boxes.

    Nothing is refused here: a row that is not four numbers, or an image size that is not
    positive, becomes NaN.
    """
    return _normalize(Boxes.pixels, rows, width, height)


def boxes_from_xywh(rows: Sequence[Any], width: Any, height: Any) -> list[Box]:
    """The same for boxes given as x, y, width, height."""
    return _normalize(Boxes.from_xywh_pixels, rows, width, height)


def boxes_from_scaled(rows: Sequence[Any], scale: float = 1.0) -> list[Box]:
    """The same for xyxy boxes in 0..`scale` of the original image's width and height."""
    return boxes_from_xyxy(rows, scale, scale)


def boxes_from_padded(rows: Sequence[Any], width: Any, height: Any) -> list[Box]:
    """The same for xyxy boxes in 0..1 of the image padded to a square on both sides alike."""
    numbers = [_four_numbers(row) for row in rows]
    size_wh = _numbers([width, height])
    if size_wh is None or not all(side > 0 for side in size_wh):
        return [_NO_BOX] * len(rows)
    side = max(size_wh)
    left, top = (side - size_wh[0]) / 2, (side - size_wh[1]) / 2
    moved = [
        (x1 * side - left, y1 * side - top, x2 * side - left, y2 * side - top)
        for x1, y1, x2, y2 in numbers
    ]
    return boxes_from_xyxy(moved, width, height)


def _normalize(
    to_boxes: Callable[..., Boxes], rows: Sequence[Any], width: Any, height: Any
) -> list[Box]:
    numbers = [_four_numbers(row) for row in rows]
    size_wh = _numbers([width, height])
    if size_wh is None or not all(side > 0 for side in size_wh):
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
