"""GRIT (Peng et al. 2023, Kosmos-2): JSON lines of captions with boxed phrases, and the images.

A row is `{"key": "000373938", "caption": "a wire hanger with a paper cover", "noun_chunks":
[[19, 32, x1, y1, x2, y2, score], ...], "ref_exps": [...]}`: characters of the caption, and a box
normalised to the image. The data set has links instead of images; `img2dataset` fetches them and
writes `KEY.jpg`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import boxes_from_xyxy
from cloc_mllm.data.readers.files import open_files, read_image
from cloc_mllm.data.records import Box, DropLog, Record, Region, validate_record

SOURCE = "grit"


def read_grit(rows: str | Path, images: str | Path, *, drop_log: DropLog) -> Iterator[Record]:
    """One record a row, its id the row's key; a region a distinct box.

    A region's phrase is the noun chunk of its box, the referring expressions of the same box are
    its `expressions`. A box that only expressions have takes the first of them as phrase.

    Args:
        rows: the JSON lines.
        images: folder, tar or zip of `KEY.jpg`.
        drop_log: records get, beside the reasons of `validate_record`, `bad_row` (no JSON object
            with `key` and `caption`); regions get `bad_row` (no seven numbers).
    """
    with open(rows, encoding="utf-8") as lines, open_files(images) as image_files:
        for number, line in enumerate(lines, start=1):
            row = _parse(line)
            if row is None:
                drop_log.add("record", f"line {number}", "bad_row")
                continue
            record = Record(
                id=row["key"],
                image=read_image(image_files, row["key"]),
                width=0,  # of the image file: set by validate_record
                height=0,
                captions=[row["caption"]],
                regions=_to_regions(row, drop_log),
                source=SOURCE,
            )
            valid = validate_record(record, drop_log)
            if valid is not None:
                yield valid


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    texts = [row.get("key"), row.get("caption")] if isinstance(row, dict) else [None]
    return row if all(isinstance(text, str) for text in texts) else None


def _to_regions(row: dict[str, Any], drop_log: DropLog) -> list[Region]:
    regions: dict[str, Region] = {}
    for entry in [*(row.get("noun_chunks") or []), *(row.get("ref_exps") or [])]:
        if not _is_phrase(entry):
            drop_log.add("region", row["key"], "bad_row")
            continue
        text = row["caption"][int(entry[0]) : int(entry[1])]
        (box,) = boxes_from_xyxy([entry[2:6]], 1, 1)
        region = regions.setdefault(_key(box), Region(box, text, score=float(entry[6])))
        if text != region.phrase and text not in region.expressions:
            region.expressions.append(text)
    return list(regions.values())


def _is_phrase(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 7
        and all(isinstance(value, (int, float)) for value in entry)
        and 0 <= entry[0] < entry[1]
    )


def _key(box: Box) -> str:
    return str(box)  # as text, because NaN is not equal to itself
