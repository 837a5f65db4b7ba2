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

from cloc_mllm.data.readers import (
    as_dict,
    as_list,
    boxes_from_scaled,
    boxes_from_xyxy,
    deliver,
    group_rows,
    name_to_id,
    regions_of_expressions,
)
from cloc_mllm.data.readers.files import open_files, read_image, read_rows
from cloc_mllm.data.records import Box, DropLog, Record, Region

SOURCE = "qwen-vl"
_SCALE = 1000.0
_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_GROUNDED = re.compile(r"<ref>(?P<phrase>.*?)</ref>\s*(?P<boxes>(?:<box>.*?</box>\s*)+)", re.DOTALL)
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
Row = dict[str, Any]


def read_qwen_vl(rows: str | Path, images: str | Path, *, drop_log: DropLog) -> Iterator[Record]:
    """Yields one record per photo.

    Each `<ref>` of a conversation gives one region per box; several boxes share a `group`. Turns
    without a box are noted, a `<box>` without a `<ref>` is dropped.

    Args:
        images: folder, tar or zip of the photos.
        drop_log: beside the reasons of `validate_record`: expressions get `bad_row` (no object,
            no or several photos), regions `box_without_phrase`.
    """
    rows_of = group_rows(_named_rows(rows, drop_log))
    with open_files(images) as image_files:
        for name, photo_rows in rows_of.items():
            image = read_image(image_files, name)
            regions = _to_regions(photo_rows, name, image, drop_log)
            yield from deliver(name_to_id(name), image, SOURCE, [], regions, drop_log)


def _named_rows(path: str | Path, drop_log: DropLog) -> Iterator[tuple[str, Row]]:
    for item, row in read_rows(path):
        names = [row["image"]] if isinstance(row, dict) and "image" in row else []
        for text in _turns(as_dict(row)):
            names += _IMAGE.findall(text)
        if len(set(map(str, names))) != 1:
            drop_log.add("expression", item, "bad_row")
        else:
            yield str(names[0]), row


def _turns(row: Row) -> list[str]:
    texts = [as_dict(turn).get("value") for turn in as_list(row.get("conversations"))]
    return [text for text in texts if isinstance(text, str)]


def _to_regions(rows: list[Row], name: str, image: bytes, drop_log: DropLog) -> list[Region]:
    referring: list[tuple[Any, Box, Any]] = []
    regions: list[Region] = []
    for index, row in enumerate(rows):
        if "conversations" in row:
            for number, text in enumerate(_turns(row)):
                regions += _grounded(text, f"{name}/{index}/{number}", drop_log)
        else:
            size = (row.get("width"), row.get("height"))
            (box,) = boxes_from_xyxy([row.get("bbox")], *size, image)
            referring.append((row.get("bbox"), box, row.get("sent")))
    return regions_of_expressions(referring) + regions


def _grounded(text: str, item: str, drop_log: DropLog) -> list[Region]:
    regions = []
    for number, match in enumerate(_GROUNDED.finditer(text)):
        corners = [_NUMBER.findall(numbers) for numbers in _BOX.findall(match["boxes"])]
        group = f"{item}/{number}" if len(corners) > 1 else ""
        for box in boxes_from_scaled(corners, _SCALE):
            regions.append(Region(box=box, phrase=match["phrase"], group=group))
    rest = _GROUNDED.sub("", text)
    for _ in _BOX.findall(rest):
        drop_log.add("region", item, "box_without_phrase")
    if not regions and not _BOX.search(rest):
        drop_log.note("turns without a box")
    return regions
