"""RefCOCO, RefCOCO+ and RefCOCOg as JSON rows, one per referring expression.

A row is `{"img_id": "COCO_train2014_000000580957_4", "sents": "white dish in the top right
corner", "bbox": [x, y, width, height], "width": 640, "height": 428}`; the box is in pixels of a
`width` x `height` photo and the number after the photo's name counts its referents.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import boxes_from_xywh
from cloc_mllm.data.readers.files import open_files, read_image, read_json
from cloc_mllm.data.records import DropLog, Record, Region, clean_text, validate_record

SOURCE = "refcoco"
_PHOTO_AND_REFERENT = re.compile(r"(?P<photo>.*_\d{12})_\d+")
_ROW_KEYS = ("img_id", "sents", "bbox", "width", "height")


def read_refcoco(rows: str | Path, images: str | Path, *, drop_log: DropLog) -> Iterator[Record]:
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
    rows_of = _by_photo(rows, drop_log)
    with open_files(images) as image_files:
        for photo, photo_rows in rows_of.items():
            image = read_image(image_files, photo)
            record = Record(
                id=photo,
                image=image,
                width=0,  # of the image file: set by validate_record
                height=0,
                captions=[],
                regions=_to_regions(photo_rows, image),
                source=SOURCE,
            )
            valid = validate_record(record, drop_log)
            if valid is not None:
                yield valid


def _by_photo(path: str | Path, drop_log: DropLog) -> dict[str, list[dict[str, Any]]]:
    table = read_json(path)
    if not isinstance(table, list):
        raise ValueError(f"{path}: expected a JSON list of rows with {', '.join(_ROW_KEYS)}")
    rows_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for index, row in enumerate(table):
        if not isinstance(row, dict) or not all(key in row for key in _ROW_KEYS):
            drop_log.add("expression", f"row {index}", "bad_row")
            continue
        rows_of[photo_of(str(row["img_id"]))].append(row)
    return rows_of


def photo_of(img_id: str) -> str:
    """Cuts `COCO_train2014_000000580957_4` to `COCO_train2014_000000580957`, the photo's name."""
    match = _PHOTO_AND_REFERENT.fullmatch(img_id)
    return match["photo"] if match else img_id


def _to_regions(rows: list[dict[str, Any]], image: bytes) -> list[Region]:
    rows_of_box: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:  # as text, because NaN is not equal to itself
        rows_of_box[str((row["bbox"], row["width"], row["height"]))].append(row)
    regions = []
    for same_box in rows_of_box.values():
        first = same_box[0]
        (box,) = boxes_from_xywh([first["bbox"]], first["width"], first["height"], image)
        expressions = [row["sents"] for row in same_box]
        phrase = next((text for text in expressions if clean_text(text)[0]), "")
        regions.append(Region(box=box, phrase=phrase, expressions=expressions))
    return regions
