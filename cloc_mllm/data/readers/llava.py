"""LLaVA's conversation JSON (Liu et al. 2023), and texts with boxes in its manner (Ferret-Bench).

`[{"id", "image": "coco/train2017/000000033471.jpg", "conversations": [{"from": "human", "value":
"<image>\\nProvide a short description for this region: [0.33, 0.26, 0.86, 0.75]"}, {"from": "gpt",
"value": "a man"}]}]`.

Frame: xyxy, 0..1 in the text. LLaVA-1.5's own mix (`llava_v1_5_mix665k.json`) states boxes of the
image *padded to a square* (`frame="padded"`); others that took its layout state them of the image
itself (`frame="original"`), Ferret-Bench too. The numbers cannot tell; `cloc-mllm data doctor` can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from cloc_mllm.data.images import upright_size
from cloc_mllm.data.readers import (
    as_dict,
    as_list,
    boxes_from_padded,
    boxes_from_scaled,
    deliver,
    group_rows,
    name_to_id,
)
from cloc_mllm.data.readers.files import open_files, read_image, read_rows
from cloc_mllm.data.readers.grounded_text import BOX, Grounding, ground_turns
from cloc_mllm.data.records import Box, DropLog, Record, Region

SOURCE = "llava"
Frame = Literal["padded", "original"]
# nan and inf are boxes, too: bad ones, to be counted
_NUMBER = r"\s*-?(?:\d*\.?\d+(?:e[-+]?\d+)?|nan|inf)\s*"
_BOX_TEXT = re.compile(rf"\[({_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER})\]", re.IGNORECASE)
_IMAGE_MARK = "<image>"
Row = dict[str, Any]


def read_llava(
    rows: str | Path, images: str | Path, *, frame: Frame, drop_log: DropLog
) -> Iterator[Record]:
    """One record an image, from all rows that name it.

    Boxes of the same numbers are one region: described (its phrase), referred to (`expressions`)
    or named in a text (its phrase, and further names are `expressions`).

    Args:
        rows: JSON list or JSON lines. Ferret-Bench's `{"image", "text"}` is a row of one turn.
        images: folder, tar or zip; a folder is searched by the whole path first, then by name.
        frame: what 0..1 is of, see above.
        drop_log: beside the reasons of `validate_record`, expressions get `bad_row`; rows without
            an image and turns without a box are noted.
    """
    with open_files(images) as image_files:
        for name, image_rows in group_rows(named_rows(rows, drop_log)).items():
            image = read_image(image_files, name)
            size = upright_size(image) or (None, None)
            said: list[tuple[list[float], Grounding]] = []
            for row in image_rows:
                said += _said_of_boxes(row, drop_log)
            corners = [numbers for numbers, _ in said]
            boxes = (
                boxes_from_padded(corners, *size)
                if frame == "padded"
                else boxes_from_scaled(corners)
            )
            regions = regions_said(
                [(repr(numbers), box, g) for (numbers, g), box in zip(said, boxes, strict=True)]
            )
            yield from deliver(name_to_id(name), image, SOURCE, [], regions, drop_log)


def named_rows(path: str | Path, drop_log: DropLog) -> Iterator[tuple[str, Row]]:
    """(image, row) of each row that has one."""
    for item, row in read_rows(path):
        if not isinstance(row, dict):
            drop_log.add("expression", item, "bad_row")
        elif not isinstance(row.get("image"), str):
            drop_log.note("rows without an image")
        else:
            yield row["image"], row


def turns_of(row: Row) -> list[str]:
    """The texts of a conversation, without the image's mark."""
    values = [as_dict(turn).get("value") for turn in as_list(row.get("conversations"))]
    texts = ["" if not isinstance(value, str) else value for value in values]
    if not texts and isinstance(row.get("text"), str):
        texts = ["", row["text"]]
    return [text.replace(_IMAGE_MARK, "").strip() for text in texts]


def regions_said(said: list[tuple[str, Box, Grounding]]) -> list[Region]:
    """(key of the box, box, what is said of it) -> a region a key."""
    of_key: dict[str, list[tuple[Box, Grounding]]] = {}
    for key, box, grounding in said:
        of_key.setdefault(key, []).append((box, grounding))
    regions = []
    for same in of_key.values():
        names = [g.text for _, g in same if g.kind != "expression"]
        expressions = [g.text for _, g in same if g.kind == "expression"]
        phrase = (names or expressions or [""])[0]
        regions.append(Region(box=same[0][0], phrase=phrase, expressions=names[1:] + expressions))
    return regions


def _said_of_boxes(row: Row, drop_log: DropLog) -> list[tuple[list[float], Grounding]]:
    turns = turns_of(row)
    boxes = [
        [float(number) for number in match.split(",")]
        for turn in turns
        for match in _BOX_TEXT.findall(turn)
    ]
    marked = [_BOX_TEXT.sub(BOX, turn.replace(BOX, "")) for turn in turns]
    drop_log.note("turns without a box", sum(BOX not in turn for turn in marked))
    return [
        (boxes[index], grounding)
        for grounding in ground_turns(marked)
        for index in range(grounding.first, grounding.first + grounding.num_boxes)
    ]
