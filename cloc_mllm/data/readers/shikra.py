"""Shikra's JSON lines (Chen et al. 2023).

A line is a referring expression `{"img_path", "expression", "bbox", "height", "width"}` or a
caption with marked phrases `{"image_id", "boxes", "sentence": "<ph_st>A woman<ph_ed> walks past
<ph_st>two cars<ph_ed>", "boxes_seq": [[0], [1, 2]]}`; `boxes_seq` names the boxes of each phrase.

Frame: xyxy in pixels of the original photo. A line may state the photo's size; else it is that of
the image file, which must then not be resized.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.images import upright_size
from cloc_mllm.data.readers import (
    as_list,
    boxes_from_xyxy,
    deliver,
    group_rows,
    name_to_id,
    regions_of_expressions,
)
from cloc_mllm.data.readers.files import open_files, read_image, read_rows
from cloc_mllm.data.records import Box, DropLog, Record, Region

SOURCE = "shikra"
_PHRASE = re.compile(r"<ph_st>(.*?)<ph_ed>", re.DOTALL)
_MARKS = re.compile(r"<ph_st>|<ph_ed>")
Row = dict[str, Any]


def read_shikra(rows: str | Path, images: str | Path, *, drop_log: DropLog) -> Iterator[Record]:
    """One record a photo. A phrase of several boxes makes a region of each, in one `group`.

    Args:
        rows: JSON lines, or a JSON list of such objects.
        images: folder, tar or zip of the photos.
        drop_log: beside the reasons of `validate_record`: expressions get `bad_row` (no object,
            or without a photo), regions `unknown_annotation` (`boxes_seq` names no box).
    """
    rows_of = group_rows(_named_rows(rows, drop_log))
    with open_files(images) as image_files:
        for name, photo_rows in rows_of.items():
            image = read_image(image_files, name)
            captions, regions = _parts(photo_rows, upright_size(image), name, drop_log)
            yield from deliver(name_to_id(name), image, SOURCE, captions, regions, drop_log)


def _named_rows(path: str | Path, drop_log: DropLog) -> Iterator[tuple[str, Row]]:
    for item, row in read_rows(path):
        name = None
        if isinstance(row, dict):
            name = row.get("img_path") or row.get("image_id")
        if name is None:
            drop_log.add("expression", item, "bad_row")
        else:
            yield str(name), row


def _parts(
    rows: list[Row], file_wh: tuple[int, int] | None, name: str, drop_log: DropLog
) -> tuple[list[Any], list[Region]]:
    captions: list[Any] = []
    regions: list[Region] = []
    referring: list[tuple[Any, Box, Any]] = []
    for index, row in enumerate(rows):
        size = file_wh or (None, None)
        if "width" in row and "height" in row:
            size = row["width"], row["height"]
        if "sentence" in row:
            sentence = row["sentence"]
            marked = isinstance(sentence, str)
            captions.append(_MARKS.sub("", sentence) if marked else sentence)
            boxes = boxes_from_xyxy(as_list(row.get("boxes")), *size)
            phrases = _PHRASE.findall(sentence) if marked else []
            item = f"{name}/caption {index}"
            regions += _phrase_regions(phrases, row.get("boxes_seq"), boxes, item, drop_log)
        else:
            (box,) = boxes_from_xyxy([row.get("bbox")], *size)
            referring.append((row.get("bbox"), box, row.get("expression")))
    return captions, regions_of_expressions(referring) + regions


def _phrase_regions(
    phrases: list[str], boxes_seq: Any, boxes: list[Box], item: str, drop_log: DropLog
) -> list[Region]:
    """A region for each box of each phrase; what `boxes_seq` leaves out is counted."""
    regions = []
    used = set()
    for number, indices in enumerate(as_list(boxes_seq)):
        for index in as_list(indices):
            if type(index) is not int or not 0 <= index < len(boxes):
                drop_log.add("region", item, "unknown_annotation")
                continue
            used.add(index)
            group = f"{item}/{number}" if len(indices) > 1 else ""
            phrase = phrases[number] if number < len(phrases) else ""
            regions.append(Region(box=boxes[index], phrase=phrase, group=group))
    for _ in range(len(boxes) - len(used)):
        drop_log.add("region", item, "box_without_phrase")
    return regions
