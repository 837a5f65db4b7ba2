"""Objects365 and others as JSON lines, one per image: odgt, and ODVG of Grounding DINO's trainers.

- ODVG: `{"filename", "width", "height", "detection": {"instances": [{"bbox": [x1, y1, x2, y2],
  "category"}]}}`, or `"grounding": {"caption", "regions": [{"bbox", "phrase"}]}`, or both. A
  phrase may have a list of boxes. GroundingCap-1M (LLMDet, Fu et al. 2025) adds `"conversations":
  [{"value": question}, {"value": a long caption}]`.
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

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.readers import (
    DEFAULTS,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    open_photos,
    single,
)
from cloc_mllm.data.readers.boxes import BoxFrame
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_rows
from cloc_mllm.data.values import id_key

SOURCE = "odgt"
_NAMES = ("filename", "fpath", "ID")
_IGNORED_TAG = "mask"  # CrowdHuman: a place where people were not annotated
Row = dict[str, Any]


def read_odgt(
    rows: str | Path,
    images: str | Path,
    *,
    keep_ignored: bool = False,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per row, with one region per instance, phrase or tagged box.

    The phrase of an instance is its category.

    Args:
        images: folder, tar or zip of the images.
        keep_ignored: keep places that were not annotated (the tag `mask`); by default they are set
            aside.
        drop_log: beside the reasons of `validate_record`, records and regions get `bad_row`.
    """

    # rows of a large set do not fit into memory, their names do
    ids = ids_of_names(_name(row) for _, row in read_rows(rows, options.encoding))
    with open_photos(images, drop_log, options, single(ids)) as photos:
        for item, row in read_rows(rows, options.encoding):
            name = _name(row)
            if name is None:
                drop_log.add("record", item, "bad_row", f"no {' or '.join(_NAMES)}: {shown(row)}")
                continue
            photo = photos.find(name)
            frame = photo.frame(row.get("width"), row.get("height"))
            caption = as_dict(row.get("grounding")).get("caption")
            captions = [] if caption is None else [caption]
            captions += _long_caption(row)
            regions = _to_regions(row, frame, item, keep_ignored, drop_log)
            yield from deliver(ids[name], photo, SOURCE, captions, regions, drop_log)


def _name(row: Any) -> str | None:
    named = (id_key(as_dict(row).get(key)) for key in _NAMES)
    return next(filter(None, named), None)


def _to_regions(
    row: Row, frame: BoxFrame, item: str, keep_ignored: bool, drop_log: DropLog
) -> list[Region]:
    instances = _objects(as_dict(row.get("detection")).get("instances"), item, drop_log)
    phrases = _objects(as_dict(row.get("grounding")).get("regions"), item, drop_log)
    tagged = _objects(row.get("gtboxes"), item, drop_log)
    if not keep_ignored:
        num_all = len(tagged)
        tagged = [thing for thing in tagged if thing.get("tag") != _IGNORED_TAG]
        drop_log.put_aside("region", "ignored", num_all - len(tagged))
    phrases = [part for thing in phrases for part in _of_one_box(thing)]
    named = [(thing.get("category", ""), True) for thing in instances]
    named += [(_one_text(thing.get("phrase", "")), False) for thing in phrases]
    named += [(thing.get("tag", ""), True) for thing in tagged]
    boxes = frame.from_xyxy([thing.get("bbox") for thing in [*instances, *phrases]])
    boxes += frame.from_xywh([thing.get("box", thing.get("fbox")) for thing in tagged])
    return [
        Region(
            box=box,
            phrase=name,
            category=name if is_class else "",
            group=thing.get("group", ""),
            found=thing,
        )
        for box, (name, is_class), thing in zip(
            boxes, named, [*instances, *phrases, *tagged], strict=True
        )
    ]


def _of_one_box(thing: Row) -> list[Row]:
    """A phrase once for each of its boxes, which are then a group."""
    boxes = as_list(thing.get("bbox"))
    if not boxes or not isinstance(boxes[0], list):
        return [thing]
    group = _one_text(thing.get("phrase", "")) if len(boxes) > 1 else ""
    return [{**thing, "bbox": box, "group": group} for box in boxes]


def _one_text(phrase: Any) -> Any:
    """Joins the parts of a phrase that its caption has in several places."""
    if isinstance(phrase, list) and all(isinstance(part, str) for part in phrase):
        return " ".join(phrase)
    return phrase


def _long_caption(row: Row) -> list[Any]:
    """GroundingCap's caption of the whole image."""
    turns = [as_dict(turn) for turn in as_list(row.get("conversations"))]
    return [turns[1]["value"]] if len(turns) > 1 and turns[1].get("value") else []


def _objects(value: Any, item: str, drop_log: DropLog) -> list[Row]:
    objects = []
    for thing in as_list(value):
        if isinstance(thing, dict):
            objects.append(thing)
        else:
            drop_log.add("region", item, "bad_row", thing)
    return objects


def looks_like_odgt(place: Place) -> Iterator[Reading]:
    for key in ("detection", "grounding"):
        if place.has_rows_with("filename", key):
            why = f"the rows of {place.path.name} have filename and {key}, as ODVG"
            yield Reading(why, {"rows": place.path}, "pixels")
            return
    if place.has_rows_with("gtboxes"):
        why = f"the rows of {place.path.name} have gtboxes, as odgt"
        yield Reading(why, {"rows": place.path}, "pixels", "xywh")
