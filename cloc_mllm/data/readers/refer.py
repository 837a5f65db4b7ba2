"""RefCOCO, RefCOCO+ and RefCOCOg as published (Kazemzadeh 2014, Yu 2016, Mao 2016).

`refs(unc).p` is a pickle of refs `{"ref_id", "ann_id", "image_id", "file_name", "category_id",
"split", "sentences": [{"sent", "raw", "sent_id", "tokens"}]}`; the box of a ref stands in
`instances.json` (COCO's layout) under its `ann_id`.

Frame: `bbox` is xywh in pixels of the original COCO photo, whose size `images[]` states.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import as_dict, as_list, boxes_from_xywh, deliver, group_rows
from cloc_mllm.data.readers.files import open_files, read_image, read_json
from cloc_mllm.data.readers.plain_pickle import read_plain_pickle
from cloc_mllm.data.records import DropLog, Record, Region, clean_text

SOURCE = "refer"
Row = dict[str, Any]


def read_refer(
    refs: str | Path,
    instances: str | Path,
    images: str | Path,
    *,
    split: str = "",
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo, with one region per ref.

    The phrase of a region is its first sentence; `expressions` holds them all.

    Args:
        refs: `refs(unc).p`, `refs(umd).p`, ...; read as plain containers only.
        instances: `instances.json` beside it.
        images: folder, tar or zip of the photos.
        split: `train`, `val`, `testA`, ...; by default all. Refs of other splits are noted.
        drop_log: beside the reasons of `validate_record`, regions and their expressions get
            `bad_row`, `unknown_annotation` and `unknown_image`.

    Raises:
        ValueError: the file holds no list of refs or would run code, or there is no such split.
    """
    table = read_plain_pickle(refs)
    if not isinstance(table, list):
        raise ValueError(f"{refs}: expected a list of refs, got {type(table).__name__}")
    listing = as_dict(read_json(instances))
    photos = {repr(row.get("id")): row for row in _objects(listing, "images")}
    annotations = {repr(row.get("id")): row for row in _objects(listing, "annotations")}
    names = {repr(row.get("id")): row.get("name") for row in _objects(listing, "categories")}
    refs_of = group_rows(_chosen(table, split, refs, drop_log))
    with open_files(images) as image_files:
        for key, rows in refs_of.items():
            photo = photos.get(key)
            if photo is None:
                for row in rows:
                    _drop(row, "unknown_image", drop_log)
                continue
            image = read_image(image_files, str(photo.get("file_name", "")))
            regions = _to_regions(rows, photo, image, annotations, names, drop_log)
            yield from deliver(photo.get("id"), image, SOURCE, [], regions, drop_log)


def _objects(listing: Row, key: str) -> list[Row]:
    return [row for row in as_list(listing.get(key)) if isinstance(row, dict)]


def _chosen(
    table: list[Any], split: str, refs: str | Path, drop_log: DropLog
) -> Iterator[tuple[str, Row]]:
    splits = sorted({str(row.get("split")) for row in table if isinstance(row, dict)})
    if split and table and split not in splits:
        raise ValueError(f"{refs} has no split {split!r}; it has {', '.join(splits) or 'none'}")
    for index, row in enumerate(table):
        if not isinstance(row, dict):
            drop_log.add("region", f"ref {index}", "bad_row")
        elif split and row.get("split") != split:
            drop_log.note("refs of other splits")
        else:
            yield repr(row.get("image_id")), row


def _to_regions(
    rows: list[Row],
    photo: Row,
    image: bytes,
    annotations: dict[str, Row],
    names: dict[str, Any],
    drop_log: DropLog,
) -> list[Region]:
    usable = []
    for row in rows:
        annotation = annotations.get(repr(row.get("ann_id")))
        if annotation is None:
            _drop(row, "unknown_annotation", drop_log)
        else:
            usable.append((row, annotation.get("bbox")))
    rows_px = [box for _, box in usable]
    boxes = boxes_from_xywh(rows_px, photo.get("width"), photo.get("height"), image)
    regions = []
    for (row, _), box in zip(usable, boxes, strict=True):
        texts = _texts(row)
        category = names.get(repr(row.get("category_id")), "")
        phrase = next((text for text in texts if clean_text(text)[0]), "")
        regions.append(Region(box=box, phrase=phrase, expressions=texts, category=category))
    return regions


def _texts(row: Row) -> list[Any]:
    return [as_dict(sentence).get("sent") for sentence in as_list(row.get("sentences"))]


def _drop(row: Row, reason: str, drop_log: DropLog) -> None:
    item = f"ref {row.get('ref_id')}"
    drop_log.add("region", item, reason)
    for _ in _texts(row):
        drop_log.add("expression", item, reason)
