"""Qwen-VL's JSON (Bai et al. 2023): referring expressions as lines, or conversations.

- Lines `{"image": "COCO_train2014_000000580957.jpg", "sent", "bbox": [x1, y1, x2, y2], "height",
  "width"}`, the files of its RefCOCO evaluation. Frame: xyxy in pixels of the `width` x `height`
  photo.
- Conversations `{"id", "conversations": [{"from": "user", "value": "Picture 1:
  <img>photo.jpg</img>\\nFind the dog"}, {"from": "assistant", "value": "<ref>the
  dog</ref><box>(120,85),(640,790)</box>"}]}`. Frame: xyxy in 0..1000 of the original photo's
  width and height.
"""

from __future__ import annotations

import re
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
from cloc_mllm.data.readers.chat_layouts import chat_readings
from cloc_mllm.data.readers.grounded_text import foreign_notation
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_rows
from cloc_mllm.data.values import id_key

SOURCE = "qwen-vl"
_SCALE = 1000.0
_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_GROUNDED = re.compile(r"<ref>(?P<phrase>.*?)</ref>\s*(?P<boxes>(?:<box>.*?</box>\s*)+)", re.DOTALL)
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
Row = dict[str, Any]


def read_qwen_vl(
    rows: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo.

    Each `<ref>` of a conversation gives one region per box; several boxes share a `group`. A
    question with its answer that has none is set aside, a `<box>` without a `<ref>` is dropped.

    Args:
        images: folder, tar or zip of the photos.
        drop_log: beside the reasons of `validate_record`: rows get `bad_row` (no object,
            no or several photos) and `other_layout` (boxes written otherwise), regions
            `box_without_phrase`.
    """
    rows_of = group_by_photo(_named_rows(rows, options, drop_log))
    ids = ids_of_names(rows_of)
    with open_photos(images, drop_log, options, single(rows_of)) as photos:
        for name, photo_rows in rows_of.items():
            photo = photos.find(name)
            regions, pairs = _to_regions(photo_rows, photo, drop_log)
            num_rows = len(photo_rows)
            yield from deliver(ids[name], photo, SOURCE, [], regions, drop_log, num_rows, pairs)


def _named_rows(
    path: str | Path, options: ReadOptions, drop_log: DropLog
) -> Iterator[tuple[str, Row]]:
    for item, row in read_rows(path, options.encoding):
        names = [row["image"]] if isinstance(row, dict) and "image" in row else []
        turns = _turns(as_dict(row))
        for text in turns:
            names += _IMAGE.findall(text)
        distinct = {id_key(name) for name in names}
        if len(distinct) != 1 or None in distinct:
            drop_log.add("row", item, "bad_row", f"images {sorted(map(str, distinct))}")
        elif layout := foreign_notation(turns, own=["<box>"]):
            drop_log.add("row", item, "other_layout", layout)
        else:
            yield str(names[0]), row


def _turns(row: Row) -> list[str]:
    texts = [as_dict(turn).get("value") for turn in as_list(row.get("conversations"))]
    return [text for text in texts if isinstance(text, str)]


def _to_regions(
    rows: list[Row], photo: Photo, drop_log: DropLog
) -> tuple[list[Region], list[set[int]]]:
    """The regions of a photo, and for each question with its answer which of them it gives."""
    referring: list[tuple[Any, Box, Any]] = []
    for row in rows:
        if "conversations" not in row:
            frame = photo.frame(row.get("width"), row.get("height"))
            (box,) = frame.from_xyxy([row.get("bbox")])
            referring.append((row.get("bbox"), box, row.get("sent")))
    regions, pairs = regions_of_expressions(referring), []
    for index, row in enumerate(rows):
        turns = _turns(row) if "conversations" in row else []
        for first in range(0, len(turns), 2):
            before = len(regions)
            for number, text in enumerate(turns[first : first + 2], first):
                regions += _grounded(text, photo, f"{photo.name}/{index}/{number}", drop_log)
            pairs.append(set(range(before, len(regions))))
    return regions, pairs


def _grounded(text: str, photo: Photo, item: str, drop_log: DropLog) -> list[Region]:
    regions = []
    for number, match in enumerate(_GROUNDED.finditer(text)):
        stated = _BOX.findall(match["boxes"])
        group = f"{item}/{number}" if len(stated) > 1 else ""
        boxes = photo.share_frame(_SCALE).from_xyxy(list(map(_NUMBER.findall, stated)))
        for box, found in zip(boxes, stated, strict=True):
            regions.append(Region(box=box, phrase=match["phrase"], group=group, found=found))
    rest = _GROUNDED.sub("", text)
    for found in _BOX.findall(rest):
        drop_log.add("region", item, "box_without_phrase", found)
    return regions


def looks_like_qwen_vl(place: Place) -> Iterator[Reading]:
    name = place.path.name
    if place.has_rows_with("image", "sent", "bbox"):
        why = f"the rows of {name} have image, sent, bbox"
        yield Reading(why, {"rows": place.path}, "pixels")
    yield from chat_readings(place, SOURCE)
