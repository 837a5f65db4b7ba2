"""RefCOCO, RefCOCO+ and RefCOCOg as JSON rows, one per referring expression.

A row is `{"img_id": "COCO_train2014_000000580957_4", "sents": "white dish in the top right
corner", "bbox": [x, y, width, height], "width": 640, "height": 428}`; the box is in pixels of a
`width` x `height` photo and the number after the photo's name counts its referents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import (
    DEFAULTS,
    ReadOptions,
    deliver,
    group_by_photo,
    open_photos,
    regions_of_expressions,
    single,
)
from cloc_mllm.data.readers.names import name_to_id
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record
from cloc_mllm.data.texts import read_json
from cloc_mllm.data.values import id_key

SOURCE = "refcoco"
_PHOTO_AND_REFERENT = re.compile(r"(?P<photo>.*_\d{12})_\d+")
_ROW_KEYS = ("img_id", "sents", "bbox", "width", "height")


def read_refcoco(
    rows: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo, in the order of the rows; rows with one box are one region.

    The phrase of a region is its first expression; `expressions` holds them all. A missing photo is
    dropped with its rows (`missing_image`), so delivered and dropped expressions add up to the rows
    of the file.

    Args:
        rows: the JSON file.
        images: folder, tar or zip of the photos; they may be resized, even squashed.
        drop_log: beside the reasons of `validate_record`, expressions get `bad_row` (not an
            object, or a key is missing).
    """
    rows_of = group_by_photo(_named_rows(rows, options, drop_log))
    with open_photos(images, drop_log, options, single(rows_of)) as photos:
        for name, photo_rows in rows_of.items():
            photo = photos.find(name)
            pairs = []
            for row in photo_rows:
                (box,) = photo.frame(row["width"], row["height"]).from_xywh([row["bbox"]])
                pairs.append((row["bbox"], box, row["sents"]))
            regions = regions_of_expressions(pairs)
            yield from deliver(name_to_id(name), photo, SOURCE, [], regions, drop_log)


def _named_rows(
    path: str | Path, options: ReadOptions, drop_log: DropLog
) -> Iterator[tuple[str, dict[str, Any]]]:
    table = read_json(path, options.encoding)
    if not isinstance(table, list):
        raise ValueError(f"{path}: expected a JSON list of rows with {', '.join(_ROW_KEYS)}")
    for index, row in enumerate(table):
        missing = [key for key in _ROW_KEYS if not isinstance(row, dict) or key not in row]
        name = None if missing else id_key(row["img_id"])
        if name is None:
            found = f"no {', '.join(missing)}" if missing else f"img_id {row['img_id']!r}"
            drop_log.add("expression", f"row {index}", "bad_row", found)
        else:
            yield photo_of(name), row


def photo_of(img_id: str) -> str:
    """Cuts `COCO_train2014_000000580957_4` to `COCO_train2014_000000580957`, the photo's name."""
    match = _PHOTO_AND_REFERENT.fullmatch(img_id)
    return match["photo"] if match else img_id


def looks_like_refcoco(place: Place) -> Iterator[Reading]:
    if place.has_rows_with(*_ROW_KEYS):
        why = f"the rows of {place.path.name} have {', '.join(_ROW_KEYS)}"
        yield Reading(why, {"rows": place.path}, "pixels", "xywh")
