"""COCO (Lin et al. 2014) and LVIS (Gupta et al. 2019): an instances JSON, perhaps a captions JSON,
and the images.

LVIS differs in three things: version 1 names a photo by `coco_url` alone, a category has a
`frequency` and a name with underscores (`aerosol_can`), and no annotation is a crowd.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cloc_mllm.data.drop_log import Kind
from cloc_mllm.data.readers import boxes_from_xywh
from cloc_mllm.data.readers.files import open_files, read_image, read_json
from cloc_mllm.data.records import DropLog, Record, Region, validate_record

SOURCE = "coco"
LVIS_SOURCE = "lvis"
Annotation = dict[str, Any]


def read_coco(
    instances: str | Path,
    images: str | Path,
    *,
    captions: str | Path | None = None,
    keep_crowd: bool = False,
    ids: Collection[str] | None = None,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image of `instances`, with one region per annotation.

    The phrase of a region is the name of its category.

    Args:
        instances: JSON with `images`, `annotations` (`bbox` is xywh in pixels), `categories`.
        images: folder, tar or zip of the files that `images[].file_name` (LVIS: `coco_url`) names.
        captions: JSON whose `annotations` hold `image_id` and `caption`.
        keep_crowd: keep boxes around a crowd (`iscrowd` 1); by default they are dropped.
        ids: image ids to read, as text; by default all.
        drop_log: beside the reasons of `validate_record`, regions get `crowd`,
            `unknown_category` and `unknown_image`, captions get `unknown_image`.
    """
    listing = read_table(instances, "images", "annotations", "categories")
    names = {repr(row.get("id")): class_name(row.get("name")) for row in listing["categories"]}
    is_lvis = any("frequency" in row for row in listing["categories"])
    annotations_of = group_by_image(listing["annotations"])
    captions_of = group_by_image(
        read_table(captions, "annotations")["annotations"] if captions else []
    )
    with open_files(images) as image_files:
        for image in listing["images"]:
            # taken out, so that an image listed twice cannot count its annotations twice
            key = repr(image.get("id"))
            annotations, texts = annotations_of.pop(key, []), captions_of.pop(key, [])
            if ids is not None and str(image.get("id")) not in ids:
                continue
            data = read_image(image_files, _file_name(image, is_lvis))
            record = Record(
                id="" if image.get("id") is None else str(image["id"]),
                image=data,
                width=0,  # of the image file: set by validate_record
                height=0,
                captions=[row.get("caption", "") for row in texts],
                regions=_to_regions(image, data, annotations, names, keep_crowd, drop_log),
                source=LVIS_SOURCE if is_lvis else SOURCE,
            )
            valid = validate_record(record, drop_log)
            if valid is not None:
                yield valid
    _log_orphans("region", annotations_of, drop_log)
    _log_orphans("caption", captions_of, drop_log)


def class_name(name: Any) -> Any:
    """Turns `bow_(weapon)` into `bow (weapon)`; leaves what is no text to `validate_record`."""
    return name.replace("_", " ") if isinstance(name, str) else name


def _file_name(image: Annotation, is_lvis: bool) -> str:
    """Finds the file name of a photo.

    LVIS 0.5 calls a photo `COCO_val2014_x.jpg`, but its URL ends in COCO 2017's `x.jpg`.
    """
    url, name = image.get("coco_url"), image.get("file_name")
    return PurePosixPath(str((is_lvis and url) or name or "")).name


def _to_regions(
    image: Annotation,
    data: bytes,
    annotations: list[Annotation],
    names: dict[str, Any],
    keep_crowd: bool,
    drop_log: DropLog,
) -> list[Region]:
    usable, phrases = [], []
    for row in annotations:
        category = repr(row.get("category_id"))
        if category not in names:
            drop_log.add("region", str(row.get("id")), "unknown_category")
        elif row.get("iscrowd") and not keep_crowd:
            drop_log.add("region", str(row.get("id")), "crowd")
        else:
            usable.append(row.get("bbox"))
            phrases.append(names[category])
    boxes = boxes_from_xywh(usable, image.get("width"), image.get("height"), data)
    return [
        Region(box=box, phrase=phrase, category=phrase)
        for box, phrase in zip(boxes, phrases, strict=True)
    ]


def group_by_image(rows: list[Annotation]) -> dict[str, list[Annotation]]:
    """Groups rows by the `repr` of their image id, so that any JSON value can be a key."""
    grouped: dict[str, list[Annotation]] = defaultdict(list)
    for row in rows:
        grouped[repr(row.get("image_id"))].append(row)
    return grouped


def _log_orphans(kind: Kind, rows_of: dict[str, list[Annotation]], drop_log: DropLog) -> None:
    for rows in rows_of.values():
        for row in rows:
            drop_log.add(kind, str(row.get("id")), "unknown_image")


def read_table(path: str | Path, *keys: str) -> dict[str, list[Annotation]]:
    """Reads a JSON object with a list of objects under each key; ValueError for any other."""
    table = read_json(path)
    for key in keys:
        rows = table.get(key) if isinstance(table, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: expected a COCO object with a list of objects {key!r}")
    return table
