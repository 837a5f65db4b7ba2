"""Objects365 and others as JSON lines, one per image: odgt, and ODVG of Grounding DINO's trainers.

- ODVG: `{"filename", "width", "height", "detection": {"instances": [{"bbox": [x1, y1, x2, y2],
  "category"}]}}`, or `"grounding": {"caption", "regions": [{"bbox", "phrase"}]}`, or both.
- odgt (CrowdHuman's and Objects365's tools): `{"ID" (or "fpath"), "width", "height", "gtboxes":
  [{"tag", "box" (or "fbox"): [x, y, width, height]}]}`.

Objects365 as one JSON file (`zhiyuan_objv2_train.json`) is COCO's layout: `build coco` reads it.

Frame: pixels of the original image; xyxy in ODVG, xywh in odgt. A row that states no size takes
the size of the image file, which must then not be resized.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.images import upright_size
from cloc_mllm.data.readers import (
    as_dict,
    as_list,
    boxes_from_xywh,
    boxes_from_xyxy,
    deliver,
    name_to_id,
)
from cloc_mllm.data.readers.files import open_files, read_image, read_rows
from cloc_mllm.data.records import DropLog, Record, Region

SOURCE = "odgt"
_NAMES = ("filename", "fpath", "ID")
_IGNORED_TAG = "mask"  # CrowdHuman: a place where people were not annotated
Row = dict[str, Any]


def read_odgt(rows: str | Path, images: str | Path, *, drop_log: DropLog) -> Iterator[Record]:
    """Yields one record per row, with one region per instance, phrase or tagged box.

    The phrase of an instance is its category.

    Args:
        images: folder, tar or zip of the images.
        drop_log: beside the reasons of `validate_record`, records get `bad_row`, regions
            `bad_row` and `ignored` (the tag `mask`).
    """
    with open_files(images) as image_files:
        for item, row in read_rows(rows):
            name = next((row[key] for key in _NAMES if as_dict(row).get(key)), None)
            if name is None:
                drop_log.add("record", item, "bad_row")
                continue
            image = read_image(image_files, str(name))
            size = (row.get("width"), row.get("height"))
            if None in size:
                size = upright_size(image) or size
            caption = as_dict(row.get("grounding")).get("caption")
            captions = [] if caption is None else [caption]
            regions = _to_regions(row, size, image, item, drop_log)
            yield from deliver(name_to_id(name), image, SOURCE, captions, regions, drop_log)


def _to_regions(
    row: Row, size: tuple[Any, Any], image: bytes, item: str, drop_log: DropLog
) -> list[Region]:
    regions = []
    instances = _objects(as_dict(row.get("detection")).get("instances"), item, drop_log)
    boxes = boxes_from_xyxy([thing.get("bbox") for thing in instances], *size, image)
    for thing, box in zip(instances, boxes, strict=True):
        category = thing.get("category", "")
        regions.append(Region(box=box, phrase=category, category=category))
    phrases = _objects(as_dict(row.get("grounding")).get("regions"), item, drop_log)
    boxes = boxes_from_xyxy([thing.get("bbox") for thing in phrases], *size, image)
    for thing, box in zip(phrases, boxes, strict=True):
        regions.append(Region(box=box, phrase=thing.get("phrase", "")))
    tagged = []
    for thing in _objects(row.get("gtboxes"), item, drop_log):
        if thing.get("tag") == _IGNORED_TAG:
            drop_log.add("region", item, "ignored")
        else:
            tagged.append(thing)
    rows = [thing.get("box", thing.get("fbox")) for thing in tagged]
    for thing, box in zip(tagged, boxes_from_xywh(rows, *size, image), strict=True):
        tag = thing.get("tag", "")
        regions.append(Region(box=box, phrase=tag, category=tag))
    return regions


def _objects(value: Any, item: str, drop_log: DropLog) -> list[Row]:
    objects = []
    for thing in as_list(value):
        if isinstance(thing, dict):
            objects.append(thing)
        else:
            drop_log.add("region", item, "bad_row")
    return objects
