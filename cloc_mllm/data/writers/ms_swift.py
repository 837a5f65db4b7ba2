"""Records to ms-swift's grounding rows: `rows.jsonl` and `images/`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cloc_mllm.data.records import Record
from cloc_mllm.data.storage import new_directory
from cloc_mllm.data.writers import pixel_corners, write_image

_DESCRIBE, _LOCATE = "Provide a short description for this region: {}", "Locate <ref-object>."


def write_ms_swift(records: Iterable[Record], directory: str | Path) -> Counter[str]:
    """A row an image: each phrase asked for by its box, each expression answered with its box.

    Frame: `bbox_type` is `real`: xyxy in pixels of the original image; ms-swift turns them into
    what the model that is trained expects.

    Returns:
        counts of what was written, and of what the format has no place for.
    """
    counts: Counter[str] = Counter()
    with new_directory(directory) as folder, (folder / "rows.jsonl").open("w") as file:
        for record in records:
            name = write_image(record, folder / "images")
            file.write(json.dumps(_row(record, f"images/{name}")) + "\n")
            counts["records"] += 1
            counts["regions"] += len(record.regions)
            counts["expressions"] += sum(len(region.expressions) for region in record.regions)
            counts["captions"] += len(record.captions)
            counts["scores left out"] += sum(region.score != 1 for region in record.regions)
    return counts


def _row(record: Record, image: str) -> dict[str, Any]:
    turns: list[str] = []
    refs: list[str] = []
    boxes: list[list[float]] = []
    for caption in record.captions:
        turns += ["Describe this image in a sentence.", caption]
    for region, corners in zip(record.regions, pixel_corners(record), strict=True):
        turns += [_DESCRIBE.format("<bbox>"), "<ref-object>"]
        refs.append(region.phrase)
        boxes.append(corners)
        for expression in region.expressions:
            turns += [_LOCATE, "<bbox>"]
            refs.append(expression)
            boxes.append(corners)
    if turns:
        turns[0] = "<image>" + turns[0]
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)],
        "images": [image],
        "objects": {"ref": refs, "bbox": boxes, "bbox_type": "real"},
    }
