"""One file a source format; each reader yields validated records and accounts for every item.

What all formats share is decided once, in one module per question:

| question | module |
|---|---|
| which ids are one, what is a number | `data.values` |
| which file a name means | `names`, `files` |
| what became of each image | `photos` |
| what the numbers of a box are of | `boxes` |
| which encoding a text is in, what YAML, JSON, CSV and XML hold | `data.texts` |
| what becomes a record | `data.records.validate_record` |
| what is lost, and what would have been right | `data.drop_log`, `data.reasons` |

A reader opens its images with `open_photos`, finds each with `find`, takes boxes through the
`frame` of the photo, and gives the parts of a record to `deliver`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from cloc_mllm.box import Box
from cloc_mllm.data.drop_log import Drop, DropLog
from cloc_mllm.data.readers.boxes import boxes_from_xywh, boxes_from_xyxy
from cloc_mllm.data.readers.photos import (
    DEFAULTS,
    Photo,
    ReadOptions,
    group_by_photo,
    open_photos,
    single,
)
from cloc_mllm.data.records import Record, Region, clean_text, drop_record, validate_record
from cloc_mllm.data.values import as_dict, as_list

__all__ = [
    "DEFAULTS",
    "Photo",
    "ReadOptions",
    "as_dict",
    "as_list",
    "boxes_from_xywh",
    "boxes_from_xyxy",
    "deliver",
    "group_by_photo",
    "open_photos",
    "regions_of_expressions",
    "single",
]


def deliver(  # noqa: PLR0913  the parts of a record
    record_id: Any,
    image: Photo | bytes,
    source: str,
    captions: list[Any],
    regions: list[Region],
    drop_log: DropLog,
    num_rows: int = 0,
    pairs: Sequence[set[int]] = (),
) -> Iterator[Record]:
    """Yields the record of these parts, or nothing where it cannot be used, which is counted.

    Args:
        image: what `Photos.find` gave, or the bytes of an image file.
        num_rows: how many rows of a conversation file the record is made from.
        pairs: for each question with its answer in these rows, which of `regions` it gives.
    """
    text_id = "" if record_id is None else str(record_id)
    data = image if isinstance(image, bytes) else image.data
    # width and height are the image file's: `validate_record` sets them
    record = Record(text_id, data, 0, 0, captions, regions, source)
    if drop_log.watch is not None:
        drop_log.watch(data, [r.box for r in regions], [r.phrase for r in regions])
    num_before = len(drop_log.drops)
    valid = None
    if isinstance(image, Photo) and image.fault:
        drop_record(record, image.fault, image.found, drop_log)
    else:
        max_side = image.options.max_side if isinstance(image, Photo) else 0
        valid = validate_record(record, drop_log, max_side)
    _count_pairs(text_id, pairs, drop_log.drops[num_before:], drop_log)
    if valid is not None:
        drop_log.delivered["row"] += num_rows
        yield valid
    else:
        reasons = (drop.reason for drop in drop_log.drops[num_before:] if drop.kind == "record")
        drop_log.add("row", text_id, next(reasons), count=num_rows)


def _count_pairs(
    record_id: str, pairs: Sequence[set[int]], drops: Sequence[Drop], drop_log: DropLog
) -> None:
    """Counts the pairs of which a region is kept, drops those of which none is, and sets the others
    aside.

    Args:
        drops: what the validation of the record dropped.
    """
    faults = {drop.item: drop.reason for drop in drops if drop.kind == "region"}
    for number, regions in enumerate(pairs):
        of = [faults.get(f"{record_id}/{index}") for index in sorted(regions)]
        if not of:
            drop_log.put_aside("pair", "no_region")
        elif all(of):
            drop_log.add("pair", f"{record_id}/{number}", str(of[0]))
        else:
            drop_log.delivered["pair"] += 1


def regions_of_expressions(pairs: Sequence[tuple[Any, Box, Any]]) -> list[Region]:
    """Makes one region per distinct box.

    Its phrase is its first usable expression; `expressions` holds them all.

    Args:
        pairs: (the box as annotated, the same box normalised, an expression).
    """
    same_box: dict[str, list[tuple[Any, Box, Any]]] = {}
    for pair in pairs:  # as text, because NaN is not equal to itself
        has_numbers = not any(map(math.isnan, pair[1]))
        same_box.setdefault(repr(pair[1] if has_numbers else pair[0]), []).append(pair)
    regions = []
    for group in same_box.values():
        expressions = [text for _, _, text in group]
        phrase = next((text for text in expressions if clean_text(text)[0]), "")
        regions.append(
            Region(box=group[0][1], phrase=phrase, expressions=expressions, found=group[0][0])
        )
    return regions
