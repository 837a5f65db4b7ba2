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

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    group_by_photo,
    open_photos,
    single,
)
from cloc_mllm.data.readers.boxes import BoxFrame
from cloc_mllm.data.readers.grounded_text import BOX, foreign_notation, ground_turns
from cloc_mllm.data.readers.llava import Said, image_of, regions_said
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.records import DropLog, Record
from cloc_mllm.data.texts import read_rows

SOURCE = "ms-swift"
_BOX_MARK, _REF_MARK, _IMAGE_MARK = "<bbox>", "<ref-object>", "<image>"
_SCALES = {"norm1": 1.0, "norm1000": 1000.0}
Row = dict[str, Any]


def read_ms_swift(
    rows: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image, from all rows that name it; regions as `read_llava` makes them.

    Args:
        drop_log: beside the reasons of `validate_record`: rows get `bad_row` (no object,
            another `bbox_type`) and `other_layout` (an older layout, boxes inside the texts,
            several images), regions `box_without_phrase` (a box no mark stands for), `point` (two
            numbers) and `unknown_annotation` (a mark without a box).
    """
    rows_of = group_by_photo(_named_rows(rows, options, drop_log))
    ids = ids_of_names(rows_of)
    with open_photos(images, drop_log, options, single(rows_of)) as photos:
        for name, image_rows in rows_of.items():
            photo = photos.find(name)
            said = [_said_of_boxes(row, photo, drop_log) for row in image_rows]
            regions, pairs = regions_said(said, drop_log)
            num_rows = len(image_rows)
            yield from deliver(ids[name], photo, SOURCE, [], regions, drop_log, num_rows, pairs)


def _named_rows(
    path: str | Path, options: ReadOptions, drop_log: DropLog
) -> Iterator[tuple[str, Row]]:
    for item, row in read_rows(path, options.encoding):
        if not isinstance(row, dict):
            drop_log.add("row", item, "bad_row", f"no JSON object: {shown(row)}")
            continue
        kind = as_dict(row.get("objects")).get("bbox_type") or "real"
        image, layout = image_of(row), _other_layout(row)
        if layout:
            drop_log.add("row", item, "other_layout", layout)
        elif image is None:
            found = f"images {row.get('images')!r}, not one name"
            drop_log.add("row", item, "bad_row", found)
        elif kind not in ("real", *_SCALES):
            drop_log.add("row", item, "bad_row", f"bbox_type {kind!r}")
        else:
            yield image, row


def _other_layout(row: Row) -> str:
    """Names the layout of a row that is not today's; "" for one that is."""
    if "messages" not in row:
        if "query" in row or "response" in row:
            return "query and response instead of messages (ms-swift 2)"
        return f"no messages; the row has {', '.join(list(map(str, row))[:8])}"
    if row.get("objects") is not None and not isinstance(row["objects"], dict):
        return "objects as a list or a text (ms-swift 2)"
    images = row.get("images")
    if isinstance(images, list) and len(images) > 1:
        return f"{len(images)} images in a row"
    return foreign_notation(_turns(row, []), own=[BOX])


def _said_of_boxes(row: Row, photo: Photo, drop_log: DropLog) -> Said:
    objects = as_dict(row.get("objects"))
    stated = as_list(objects.get("bbox"))
    turns = _turns(row, as_list(objects.get("ref")))
    num_marks = sum(turn.count(BOX) for turn in turns)
    for box in stated[num_marks:]:
        drop_log.add("region", photo.name, "box_without_phrase", box)
    if num_marks > len(stated):
        found = f"{num_marks} marks and {len(stated)} boxes"
        count = num_marks - len(stated)
        drop_log.add("region", photo.name, "unknown_annotation", found, count)
    boxes = _frame(photo, objects.get("bbox_type") or "real").from_xyxy(stated)
    of_boxes = []
    for grounding in ground_turns(turns):
        for index in range(grounding.first, grounding.first + grounding.num_boxes):
            if index >= len(stated):
                continue
            if len(as_list(stated[index])) == 2:
                drop_log.add("region", photo.name, "point", stated[index])
            else:
                of_boxes.append((repr(stated[index]), boxes[index], grounding))
    return Said(len(turns), of_boxes)


def _frame(photo: Photo, kind: Any) -> BoxFrame:
    return photo.share_frame(_SCALES[kind]) if kind in _SCALES else photo.frame()


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
