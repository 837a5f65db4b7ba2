"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO as published (Kazemzadeh 2014, Yu 2016, Mao 2016, Liu
2023).

`refs(unc).p` is a pickle of refs `{"ref_id", "ann_id", "image_id", "file_name", "category_id",
"split", "sentences": [{"sent", "raw", "sent_id", "tokens"}]}`; the box of a ref stands in
`instances.json` (COCO's layout) under its `ann_id`. gRefCOCO's `grefs(unc).json` has the same rows
as JSON, each `ann_id` a list: several boxes that the sentences name together, or `[-1]` for nothing
that is there.

Frame: `bbox` is xywh in pixels of the original COCO photo, whose size `images[]` states.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    open_photos,
    single,
)
from cloc_mllm.data.readers.boxes import xywh_of_annotation
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.readers.plain_pickle import read_plain_pickle
from cloc_mllm.data.records import DropLog, Record, Region, clean_text
from cloc_mllm.data.texts import read_json
from cloc_mllm.data.values import by_id, id_key

SOURCE = "refer"
Row = dict[str, Any]
Table = dict[str, Row]


def read_refer(
    refs: str | Path,
    instances: str | Path,
    images: str | Path,
    *,
    split: str = "",
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo, with one region per ref, or a group of them.

    The phrase of a region is its first sentence; `expressions` holds them all. Refs without a box
    are set aside (`no_target`).

    Args:
        refs: `refs(unc).p`, `refs(umd).p`, ..., read as plain containers only; or
            `grefs(unc).json`.
        instances: `instances.json` beside it.
        images: folder, tar or zip of the photos.
        split: `train`, `val`, `testA`, ...; by default all. Refs of other splits are set aside.
        drop_log: beside the reasons of `validate_record`, regions and their expressions get
            `bad_row`, `unknown_annotation` and `unknown_image`.

    Raises:
        ValueError: the file holds no list of refs or would run code, or there is no such split.
    """
    table = read_refs(refs, options.encoding)
    listing = as_dict(read_json(instances, options.encoding))
    pictures = by_id(_objects(listing, "images"), "file_name", f"{instances}, images")
    annotations = by_id(_objects(listing, "annotations"), "image_id", f"{instances}, annotations")
    categories = by_id(_objects(listing, "categories"), "name", f"{instances}, categories")
    refs_of: dict[str | None, list[Row]] = {}
    for row in _chosen(table, split, refs, drop_log):
        refs_of.setdefault(id_key(row.get("image_id")), []).append(row)
    names = single(pictures[key].get("file_name") for key in refs_of if key in pictures)
    with open_photos(images, drop_log, options, names) as photos:
        for key, rows in refs_of.items():
            picture = pictures.get(key or "")
            if picture is None:
                for row in rows:
                    _drop(row, "unknown_image", f"image_id {row.get('image_id')!r}", drop_log)
                continue
            photo = photos.find(picture.get("file_name"))
            regions = _to_regions(rows, picture, photo, (annotations, categories), drop_log)
            yield from deliver(key, photo, SOURCE, [], regions, drop_log)


def read_refs(path: str | Path, encoding: str = "") -> list[Any]:
    """Reads the list of refs of a pickle or a JSON file.

    Raises:
        ValueError: the file holds no list, or would run code.
    """
    is_json = Path(path).suffix == ".json"
    table = read_json(path, encoding) if is_json else read_plain_pickle(path)
    if not isinstance(table, list):
        raise ValueError(f"{path}: expected a list of refs, got {type(table).__name__}")
    return table


def has_no_target(row: Row) -> bool:
    """Whether a ref of gRefCOCO names nothing that is in its photo."""
    return as_list(row.get("ann_id")) == [-1]


def _objects(listing: Row, key: str) -> list[Row]:
    return [row for row in as_list(listing.get(key)) if isinstance(row, dict)]


def _chosen(table: list[Any], split: str, refs: str | Path, drop_log: DropLog) -> Iterator[Row]:
    splits = sorted({str(row.get("split")) for row in table if isinstance(row, dict)})
    if split and table and split not in splits:
        raise ValueError(f"{refs} has no split {split!r}; it has {', '.join(splits) or 'none'}")
    for index, row in enumerate(table):
        if not isinstance(row, dict):
            drop_log.add("region", f"ref {index}", "bad_row", row)
        elif split and row.get("split") != split:
            drop_log.put_aside("region", "other_split")
            drop_log.put_aside("expression", "other_split", len(sentences(row)))
        elif has_no_target(row):
            drop_log.put_aside("region", "no_target")
            drop_log.put_aside("expression", "no_target", len(sentences(row)))
        else:
            yield row


def _to_regions(
    rows: list[Row], picture: Row, photo: Photo, tables: tuple[Table, Table], drop_log: DropLog
) -> list[Region]:
    annotations, categories = tables
    usable = []
    for row in rows:
        ids = row["ann_id"] if isinstance(row.get("ann_id"), list) else [row.get("ann_id")]
        known = [annotations[key] for i in ids if (key := id_key(i) or "") in annotations]
        if known and len(known) == len(ids):
            usable += [(row, annotation) for annotation in known]
        else:
            _drop(row, "unknown_annotation", f"ann_id {row.get('ann_id')!r}", drop_log)
    frame = photo.frame(picture.get("width"), picture.get("height"))
    boxes = frame.from_xywh([xywh_of_annotation(annotation) for _, annotation in usable])
    regions = []
    for (row, annotation), box in zip(usable, boxes, strict=True):
        texts = sentences(row)
        together = isinstance(row.get("ann_id"), list)
        kind = (annotation if together else row).get("category_id")
        category = categories.get(id_key(kind) or "", {}).get("name", "")
        group = f"ref {row.get('ref_id')}" if together and len(row["ann_id"]) > 1 else ""
        phrase = next((text for text in texts if clean_text(text)[0]), "")
        found = {"ref_id": row.get("ref_id"), "bbox": annotation.get("bbox")}
        regions.append(Region(box, phrase, 1.0, texts, category, group, found=found))
    return regions


def sentences(row: Row) -> list[Any]:
    """Lists the sentences of a ref."""
    return [as_dict(sentence).get("sent") for sentence in as_list(row.get("sentences"))]


def _drop(row: Row, reason: str, found: str, drop_log: DropLog) -> None:
    item = f"ref {row.get('ref_id')}"
    drop_log.add("region", item, reason, found)
    drop_log.add("expression", item, reason, found, count=len(sentences(row)))


def looks_like_refer(place: Place) -> Iterator[Reading]:
    """A pickle `refs(...).p`, which is not opened to look at, or rows of gRefCOCO's refs."""
    name = place.path.name
    if name.startswith("refs") and name.endswith(".p"):
        why = f"{name} is called as RefCOCO's refs are published"
    elif place.has_rows_with("ref_id", "ann_id", "sentences"):
        why = f"the rows of {name} have ref_id, ann_id and sentences as gRefCOCO's refs"
    else:
        return
    instances = place.sibling("instances.json")
    if instances is None:
        lacks = "--instances, the instances.json that is published with it"
        yield Reading(why, {"refs": place.path}, lacks=lacks)
    else:
        yield Reading(why, {"refs": place.path, "instances": instances}, "pixels", "xywh")
