"""One file a source format; each reader yields validated records and accounts for every item."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.images import turn_of_boxes
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
    """Yields the record of these parts, or nothing where `validate_record` drops it."""
    text_id = "" if record_id is None else str(record_id)
    # width and height are the image file's: `validate_record` sets them
    record = validate_record(Record(text_id, image, 0, 0, captions, regions, source), drop_log)
    if record is not None:
        yield record


def name_to_id(file_name: Any) -> str:
    """Makes the id of an image known by its file alone: its path as listed, without suffix."""
    name = str(file_name or "")
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name


def as_list(value: Any) -> list[Any]:
    """Takes `value` if it is a list, else an empty one: annotations are not always as promised."""
    return value if isinstance(value, list) else []


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def group_rows(rows: Iterable[tuple[Any, Any]]) -> dict[str, list[Any]]:
    """Groups (name of the image, row) pairs by name; names and rows keep their order."""
    grouped: dict[str, list[Any]] = {}
    for name, row in rows:
        grouped.setdefault(str(name), []).append(row)
    return grouped


def regions_of_expressions(pairs: Sequence[tuple[Any, Box, Any]]) -> list[Region]:
    """Makes one region per distinct box.

    Its phrase is its first usable expression; `expressions` holds them all.

    Args:
        pairs: (the box as annotated, the same box normalised, an expression).
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


def boxes_from_xyxy(rows: Sequence[Any], width: Any, height: Any, image: bytes = b"") -> list[Box]:
    """Normalises pixel boxes xyxy of a picture of the stated `width` x `height`.

    Nothing is refused here: a row that is not four numbers, or a size that is not positive,
    becomes NaN.

    Args:
        image: its file. Where it says that the stated size is that before the EXIF turn, the
            boxes are turned, too (`turn_of_boxes`).
    """
    return _normalize(Boxes.pixels, rows, (width, height), image)


def boxes_from_xywh(rows: Sequence[Any], width: Any, height: Any, image: bytes = b"") -> list[Box]:
    """Does the same for boxes given as x, y, width, height."""
    return _normalize(Boxes.from_xywh_pixels, rows, (width, height), image)


def boxes_from_scaled(rows: Sequence[Any], scale: float = 1.0) -> list[Box]:
    """Does the same for xyxy boxes in 0..`scale` of the upright image's width and height."""
    return boxes_from_xyxy(rows, scale, scale)


def boxes_from_padded(rows: Sequence[Any], width: Any, height: Any) -> list[Box]:
    """Does the same for xyxy boxes in 0..1 of the image padded to a square, alike on both sides."""
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
    to_boxes: Callable[..., Boxes], rows: Sequence[Any], stated_wh: Sequence[Any], image: bytes
) -> list[Box]:
    numbers = [_four_numbers(row) for row in rows]
    size_wh = _numbers(stated_wh)
    if size_wh is None or not all(side > 0 for side in size_wh):
        return [_NO_BOX] * len(rows)
    boxes = to_boxes(numbers, *size_wh).to_normalized()
    turn = turn_of_boxes(image, (size_wh[0], size_wh[1])) if image else None
    if turn is not None:
        boxes = boxes.turned(turn)
    return [tuple(row) for row in boxes.xyxy.tolist()]


def _four_numbers(row: Any) -> list[float]:
    numbers = _numbers(row)
    return numbers if numbers is not None and len(numbers) == 4 else list(_NO_BOX)


def _numbers(values: Any) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
