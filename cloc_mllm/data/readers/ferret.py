"""Ferret's training JSON (You et al. 2023): conversations with `<bbox_location0>` marks.

`[{"image", "image_w", "image_h", "conversations": [{"from", "value": "What is <bbox_location0>?"},
...], "box_x1y1x2y2": [[[x1, y1, x2, y2]], []]}]`: a list of boxes for each turn. (Ferret-Bench
writes its boxes into the text, 0..1 of the original image: `llava.py` reads it.)

Frame: xyxy in pixels of the original `image_w` x `image_h` image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_list,
    deliver,
    group_by_photo,
    open_photos,
    single,
)
from cloc_mllm.data.readers.grounded_text import BOX, ground_turns
from cloc_mllm.data.readers.llava import Said, named_rows, regions_said, turns_of
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.records import DropLog, Record

SOURCE = "ferret"
_MARK = re.compile(r"<bbox_location(\d{1,4})>")
Row = dict[str, Any]


def read_ferret(
    rows: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image from all rows that name it, its regions as `read_llava` does.

    Args:
        drop_log: beside the reasons of `validate_record`: rows get `bad_row` and
            `other_layout`, regions `box_without_phrase` (a box that no mark stands for) and
            `unknown_annotation` (a mark without a box); pairs that give no region are set aside.
    """
    rows_of = group_by_photo(named_rows(rows, options, drop_log, own_marks=["<bbox_location"]))
    ids = ids_of_names(rows_of)
    with open_photos(images, drop_log, options, single(rows_of)) as photos:
        for name, image_rows in rows_of.items():
            photo = photos.find(name)
            said = [_said_of_boxes(row, photo, drop_log) for row in image_rows]
            regions, pairs = regions_said(said, drop_log)
            num_rows = len(image_rows)
            yield from deliver(ids[name], photo, SOURCE, [], regions, drop_log, num_rows, pairs)


def _said_of_boxes(row: Row, photo: Photo, drop_log: DropLog) -> Said:
    turns = turns_of(row)
    listed = as_list(row.get("box_x1y1x2y2"))
    used: list[Any] = []
    marked = []
    for number, turn in enumerate(turns):
        boxes = as_list(listed[number]) if number < len(listed) else []
        wanted = [int(index) for index in _MARK.findall(turn)]
        for index in wanted:
            if index >= len(boxes):
                found = f"<bbox_location{index}>, of {len(boxes)} boxes of the turn"
                drop_log.add("region", photo.name, "unknown_annotation", found)
        for index, box in enumerate(boxes):
            if index not in wanted:
                drop_log.add("region", photo.name, "box_without_phrase", box)
        known = {f"<bbox_location{index}>" for index in wanted if index < len(boxes)}
        used += [boxes[index] for index in wanted if index < len(boxes)]
        marked.append(_mark_boxes(turn, known))
    for extra in listed[len(turns) :]:
        for box in as_list(extra):
            drop_log.add("region", photo.name, "box_without_phrase", box)
    boxes = photo.frame(row.get("image_w"), row.get("image_h")).from_xyxy(used)
    of_boxes = [
        (repr(used[index]), boxes[index], grounding)
        for grounding in ground_turns(marked)
        for index in range(grounding.first, grounding.first + grounding.num_boxes)
    ]
    return Said(len(turns), of_boxes)


def _mark_boxes(turn: str, known: set[str]) -> str:
    return _MARK.sub(lambda mark: BOX if mark[0] in known else "", turn.replace(BOX, ""))
