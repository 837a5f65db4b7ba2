"""MDETR's JSON (Kamath et al. 2021): COCO's layout in which an "image" is a photo with a text.

`images[]` hold `file_name, width, height, caption, dataset_name`, `annotations[]` hold `image_id,
bbox` and `tokens_positive`, the spans `[start, end]` of the caption that name the box. In the
RefCOCO files (`finetune_refcoco_train.json`) a caption is a referring expression; in the others
(`final_flickr_separateGT_train.json`, `final_mixed_train.json`) it describes the photo.

Frame: `bbox` is xywh in pixels of the original photo, whose size the "image" states.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.box import Box
from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    group_by_photo,
    open_photos,
    regions_of_expressions,
    single,
)
from cloc_mllm.data.readers.boxes import xywh_of_annotation
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_json
from cloc_mllm.data.values import by_id, id_key

SOURCE = "mdetr"
_NUM_SAMPLED = 1000  # annotations that are looked at to tell what they hold
_REFERRING = "refcoco"  # how the dataset_name of referring expressions starts
Row = dict[str, Any]


def read_mdetr(
    annotations: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo, from all "images" of its `file_name`.

    The caption of a referring "image" is an expression of its box. The caption of another is one of
    the record's, and each of its annotations is a region whose phrase is the spans it names.

    Args:
        images: folder, tar or zip of the photos.
        drop_log: beside the reasons of `validate_record`: regions get `bad_row` and
            `unknown_image`.
    """
    listing = as_dict(read_json(annotations, options.encoding))
    texts = [row for row in as_list(listing.get("images")) if isinstance(row, dict)]
    if not texts:
        raise ValueError(f"{annotations}: expected an object with a list of `images`, MDETR's JSON")
    by_id(texts, "file_name", f"{annotations}, images")
    boxes_of: dict[str | None, list[Row]] = {}
    for index, row in enumerate(as_list(listing.get("annotations"))):
        if isinstance(row, dict):
            boxes_of.setdefault(id_key(row.get("image_id")), []).append(row)
        else:
            drop_log.add("region", f"annotation {index}", "bad_row", row)
    texts_of = group_by_photo((row.get("file_name"), row) for row in texts)
    ids = ids_of_names(texts_of)
    with open_photos(images, drop_log, options, single(texts_of)) as photos:
        for name, rows in texts_of.items():
            photo = photos.find(name)
            captions, regions = _parts(rows, photo, boxes_of, drop_log)
            yield from deliver(ids[name], photo, SOURCE, captions, regions, drop_log)
    for orphans in boxes_of.values():
        for row in orphans:
            found = f"image_id {row.get('image_id')!r}"
            drop_log.add("region", f"annotation {row.get('id')}", "unknown_image", found)


def _parts(
    texts: list[Row], photo: Photo, boxes_of: dict[str | None, list[Row]], drop_log: DropLog
) -> tuple[list[Any], list[Region]]:
    captions: list[Any] = []
    regions: list[Region] = []
    referring: list[tuple[Any, Box, Any]] = []
    for text in texts:
        rows = boxes_of.pop(id_key(text.get("id")), [])
        frame = photo.frame(text.get("width"), text.get("height"))
        boxes = frame.from_xywh([xywh_of_annotation(row) for row in rows])
        caption = text.get("caption")
        if str(text.get("dataset_name")).startswith(_REFERRING):
            referring += [
                (row.get("bbox"), box, caption) for row, box in zip(rows, boxes, strict=True)
            ]
            if not rows:
                drop_log.add("expression", str(text.get("id")), "unknown_annotation", caption)
        else:
            captions.append(caption)
            regions += [
                Region(box=box, phrase=_named(caption, row), found=row.get("bbox"))
                for row, box in zip(rows, boxes, strict=True)
            ]
    return captions, regions_of_expressions(referring) + regions


def _named(caption: Any, row: Row) -> str:
    """Joins the parts of the caption that an annotation names, in order."""
    if not isinstance(caption, str):
        return ""
    parts = []
    for span in as_list(row.get("tokens_positive")):
        if isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span):
            parts.append(caption[max(0, span[0]) : max(0, span[1])])
    return " ".join(parts)


def looks_like_mdetr(place: Place) -> Iterator[Reading]:
    rows = as_list(place.table.get("annotations"))
    if any("tokens_positive" in as_dict(row) for row in rows[:_NUM_SAMPLED]):
        why = f"{place.path.name} has COCO's lists, with captions and tokens_positive"
        yield Reading(why, {"annotations": place.path}, "pixels", "xywh")
