"""COCO (Lin et al. 2014): an instances JSON, an optional captions JSON, and the images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.drop_log import Kind
from cloc_mllm.data.readers import boxes_from_xywh
from cloc_mllm.data.readers.files import open_files, read_image, read_json
from cloc_mllm.data.records import DropLog, Record, Region, validate_record

SOURCE = "coco"
Annotation = dict[str, Any]


def read_coco(
    instances: str | Path,
    images: str | Path,
    *,
    captions: str | Path | None = None,
    keep_crowd: bool = False,
    drop_log: DropLog,
) -> Iterator[Record]:
    """One record an image of `instances`; a region an annotation, its phrase the category's name.

    Args:
        instances: JSON with `images`, `annotations` (`bbox` is xywh in pixels), `categories`.
        images: folder, tar or zip of the files that `images[].file_name` names.
        captions: JSON whose `annotations` hold `image_id` and `caption`.
        keep_crowd: keep boxes around a crowd (`iscrowd` 1); by default they are dropped.
        drop_log: beside the reasons of `validate_record`, regions get `crowd`,
            `unknown_category` and `unknown_image`, captions get `unknown_image`.
    """
    listing = _read_table(instances, "images", "annotations", "categories")
    names = {repr(row.get("id")): row.get("name") for row in listing["categories"]}
    annotations_of = _by_image(listing["annotations"])
    captions_of = _by_image(_read_table(captions, "annotations")["annotations"] if captions else [])
    with open_files(images) as image_files:
        for image in listing["images"]:
            # taken out, so that an image listed twice cannot count its annotations twice
            key = repr(image.get("id"))
            annotations = annotations_of.pop(key, [])
            record = Record(
                id="" if image.get("id") is None else str(image["id"]),
                image=read_image(image_files, str(image.get("file_name", ""))),
                width=0,  # of the image file: set by validate_record
                height=0,
                captions=[row.get("caption", "") for row in captions_of.pop(key, [])],
                regions=_to_regions(image, annotations, names, keep_crowd, drop_log),
                source=SOURCE,
            )
            valid = validate_record(record, drop_log)
            if valid is not None:
                yield valid
    _log_orphans("region", annotations_of, drop_log)
    _log_orphans("caption", captions_of, drop_log)


def _to_regions(
    image: Annotation,
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
    boxes = boxes_from_xywh(usable, image.get("width"), image.get("height"))
    return [
        Region(box=box, phrase=phrase, category=phrase)
        for box, phrase in zip(boxes, phrases, strict=True)
    ]


def _by_image(rows: list[Annotation]) -> dict[str, list[Annotation]]:
    """Rows by `repr` of their image id: whatever JSON value that is, it can be a key."""
    grouped: dict[str, list[Annotation]] = defaultdict(list)
    for row in rows:
        grouped[repr(row.get("image_id"))].append(row)
    return grouped


def _log_orphans(kind: Kind, rows_of: dict[str, list[Annotation]], drop_log: DropLog) -> None:
    for rows in rows_of.values():
        for row in rows:
            drop_log.add(kind, str(row.get("id")), "unknown_image")


def _read_table(path: str | Path, *keys: str) -> dict[str, list[Annotation]]:
    table = read_json(path)
    for key in keys:
        rows = table.get(key) if isinstance(table, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: expected a COCO object with a list of objects {key!r}")
    return table
