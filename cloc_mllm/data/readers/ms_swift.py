"""ms-swift's grounding rows: messages with `<ref-object>` and `<bbox>` marks, and `objects`.

`{"messages": [{"role": "user", "content": "<image>Find <ref-object>."}, {"role": "assistant",
"content": "<bbox>"}], "images": ["a.jpg"], "objects": {"ref": ["the dog"], "bbox": [[x1, y1, x2,
y2]], "bbox_type": "real", "image_id": [0]}}`.

Frame: `bbox_type` declares it: `real` (the default) is pixels of the original image, `norm1` 0..1
of it, `norm1000` 0..1000 of it. Pixels are of the image file, so it must not be resized.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.images import upright_size
from cloc_mllm.data.readers import (
    as_dict,
    as_list,
    boxes_from_scaled,
    boxes_from_xyxy,
    deliver,
    group_rows,
    name_to_id,
)
from cloc_mllm.data.readers.files import open_files, read_image, read_rows
from cloc_mllm.data.readers.grounded_text import BOX, Grounding, ground_turns
from cloc_mllm.data.readers.llava import regions_said
from cloc_mllm.data.records import Box, DropLog, Record

SOURCE = "ms-swift"
_BOX_MARK, _REF_MARK, _IMAGE_MARK = "<bbox>", "<ref-object>", "<image>"
_SCALES = {"norm1": 1.0, "norm1000": 1000.0}
Row = dict[str, Any]
Size = tuple[Any, Any]


def read_ms_swift(rows: str | Path, images: str | Path, *, drop_log: DropLog) -> Iterator[Record]:
    """One record an image, from all rows that name it; regions as `read_llava` makes them.

    Args:
        drop_log: beside the reasons of `validate_record`: expressions get `bad_row` (no object,
            another `bbox_type`, or several images), regions `box_without_phrase` (a box no mark
            stands for), `point` (two numbers) and `unknown_annotation` (a mark without a box).
    """
    with open_files(images) as image_files:
        for name, image_rows in group_rows(_named_rows(rows, drop_log)).items():
            image = read_image(image_files, name)
            size = upright_size(image) or (None, None)
            said: list[tuple[str, Box, Grounding]] = []
            for row in image_rows:
                said += _said_of_boxes(row, size, name, drop_log)
            yield from deliver(name_to_id(name), image, SOURCE, [], regions_said(said), drop_log)


def _named_rows(path: str | Path, drop_log: DropLog) -> Iterator[tuple[str, Row]]:
    for item, row in read_rows(path):
        names = [_file_of(image) for image in as_list(as_dict(row).get("images"))]
        kind = as_dict(as_dict(row).get("objects")).get("bbox_type") or "real"
        if len(names) == 1 and names[0] and kind in ("real", *_SCALES):
            yield names[0], row
        else:
            drop_log.add("expression", item, "bad_row")


def _file_of(image: Any) -> str:
    found = image.get("path") if isinstance(image, dict) else image
    return found if isinstance(found, str) else ""


def _said_of_boxes(
    row: Row, size: Size, name: str, drop_log: DropLog
) -> list[tuple[str, Box, Grounding]]:
    objects = as_dict(row.get("objects"))
    numbers = as_list(objects.get("bbox"))
    turns = _turns(row, as_list(objects.get("ref")))
    num_marks = sum(turn.count(BOX) for turn in turns)
    for _ in numbers[num_marks:]:
        drop_log.add("region", name, "box_without_phrase")
    for _ in range(num_marks - len(numbers)):
        drop_log.add("region", name, "unknown_annotation")
    boxes = _boxes(numbers, objects.get("bbox_type") or "real", size)
    said = []
    for grounding in ground_turns(turns):
        for index in range(grounding.first, grounding.first + grounding.num_boxes):
            if index >= len(numbers):
                continue
            if len(as_list(numbers[index])) == 2:
                drop_log.add("region", name, "point")
            else:
                said.append((repr(numbers[index]), boxes[index], grounding))
    return said


def _turns(row: Row, refs: list[Any]) -> list[str]:
    """Question and answer in turn, the system's message left out, marks filled in."""
    left = iter(refs)
    turns = []
    for message in as_list(row.get("messages")):
        role, content = as_dict(message).get("role"), as_dict(message).get("content")
        if role == "system":
            continue
        text = content if isinstance(content, str) else ""
        pieces = text.replace(BOX, "").replace(_IMAGE_MARK, "").split(_REF_MARK)
        filled = pieces[0]
        for piece in pieces[1:]:
            filled += f"{next(left, '')}{piece}"
        turns.append(filled.replace(_BOX_MARK, BOX).strip())
    return turns


def _boxes(numbers: list[Any], kind: str, size: Size) -> list[Box]:
    if kind in _SCALES:
        return boxes_from_scaled(numbers, _SCALES[kind])
    return boxes_from_xyxy(numbers, *size)
