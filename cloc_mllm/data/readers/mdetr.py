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

from cloc_mllm.data.readers import (
    as_dict,
    as_list,
    boxes_from_xywh,
    deliver,
    group_rows,
    name_to_id,
    regions_of_expressions,
)
from cloc_mllm.data.readers.files import open_files, read_image, read_json
from cloc_mllm.data.records import Box, DropLog, Record, Region

SOURCE = "mdetr"
_REFERRING = "refcoco"  # how the dataset_name of referring expressions starts
Row = dict[str, Any]


def read_mdetr(
    annotations: str | Path, images: str | Path, *, drop_log: DropLog
) -> Iterator[Record]:
    """Yields one record per photo, from all "images" of its `file_name`.

    The caption of a referring "image" is an expression of its box. The caption of another is one of
    the record's, and each of its annotations is a region whose phrase is the spans it names.

    Args:
        images: folder, tar or zip of the photos.
        drop_log: beside the reasons of `validate_record`: regions get `bad_row` and
            `unknown_image`.
    """
    listing = as_dict(read_json(annotations))
    texts = [row for row in as_list(listing.get("images")) if isinstance(row, dict)]
    if not texts:
        raise ValueError(f"{annotations}: expected an object with a list of `images`, MDETR's JSON")
    boxes_of: dict[str, list[Row]] = {}
    for index, row in enumerate(as_list(listing.get("annotations"))):
        if isinstance(row, dict):
            boxes_of.setdefault(repr(row.get("image_id")), []).append(row)
        else:
            drop_log.add("region", f"annotation {index}", "bad_row")
    with open_files(images) as image_files:
        for name, rows in group_rows((row.get("file_name"), row) for row in texts).items():
            image = read_image(image_files, name)
            captions, regions = _parts(rows, image, boxes_of, drop_log)
            yield from deliver(name_to_id(name), image, SOURCE, captions, regions, drop_log)
    for orphans in boxes_of.values():
        for row in orphans:
            drop_log.add("region", str(row.get("id")), "unknown_image")


def _parts(
    texts: list[Row], image: bytes, boxes_of: dict[str, list[Row]], drop_log: DropLog
) -> tuple[list[Any], list[Region]]:
    captions: list[Any] = []
    regions: list[Region] = []
    referring: list[tuple[Any, Box, Any]] = []
    for text in texts:
        rows = boxes_of.pop(repr(text.get("id")), [])
        boxes = boxes_from_xywh(
            [row.get("bbox") for row in rows], text.get("width"), text.get("height"), image
        )
        caption = text.get("caption")
        if str(text.get("dataset_name")).startswith(_REFERRING):
            referring += [
                (row.get("bbox"), box, caption) for row, box in zip(rows, boxes, strict=True)
            ]
            if not rows:
                drop_log.add("expression", str(text.get("id")), "unknown_annotation")
        else:
            captions.append(caption)
            regions += [
                Region(box=box, phrase=_named(caption, row))
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
