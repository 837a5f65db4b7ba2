"""Records to LLaVA's conversation JSON: `llava.json` and `images/`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from cloc_mllm.box import Box
from cloc_mllm.data.records import Record
from cloc_mllm.data.storage import new_directory
from cloc_mllm.data.writers import write_image

DESCRIBE = "Provide a short description for this region: {box}"
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {text}."
_DESCRIBE_IMAGE = "Describe this image in a sentence."


def write_llava(
    records: Iterable[Record],
    directory: str | Path,
    *,
    frame: Literal["padded", "original"],
    decimals: int = 3,
) -> Counter[str]:
    """A row an image: each phrase asked for by its box, each expression answered with its box.

    Args:
        frame: the boxes are xyxy in 0..1 of the image padded to a square (LLaVA-1.5), or of the
            image itself.
        decimals: of the numbers in the text; LLaVA's own have 2, a step of 6 pixels in 640.

    Returns:
        counts of `records`, `regions`, `expressions` and `captions` written, and of what the
        format has no place for.
    """
    counts: Counter[str] = Counter()
    with new_directory(directory) as folder, (folder / "llava.json").open("w") as file:
        file.write("[")
        for record in records:
            name = write_image(record, folder / "images")
            texts = [box_text(box, decimals) for box in _boxes(record, frame)]
            turns = _turns(record, texts)
            if turns:
                turns[0] = "<image>\n" + turns[0]
            speakers = ("human", "gpt")
            row = {
                "id": record.id,
                "image": name,
                "conversations": [
                    {"from": speakers[i % 2], "value": turn} for i, turn in enumerate(turns)
                ],
            }
            file.write((",\n" if counts["records"] else "\n") + json.dumps(row))
            counts["records"] += 1
            counts["regions"] += len(record.regions)
            counts["expressions"] += sum(len(region.expressions) for region in record.regions)
            counts["captions"] += len(record.captions)
            counts["scores left out"] += sum(region.score != 1 for region in record.regions)
        file.write("\n]\n")
    return counts


def box_text(box: Sequence[float], decimals: int) -> str:
    rounded = (round(value, decimals) + 0.0 for value in box)  # -0.0 becomes 0.0
    return "[" + ", ".join(f"{value:.{decimals}f}" for value in rounded) + "]"


def _turns(record: Record, texts: Sequence[str]) -> list[str]:
    turns = []
    for caption in record.captions:
        turns += [_DESCRIBE_IMAGE, caption]
    for region, text in zip(record.regions, texts, strict=True):
        turns += [DESCRIBE.format(box=text), region.phrase]
        for expression in region.expressions:
            turns += [LOCATE.format(text=expression), text]
    return turns


def _boxes(record: Record, frame: Literal["padded", "original"]) -> list[Box]:
    if frame == "original":
        return [region.box for region in record.regions]
    return [to_padded(region.box, record.width, record.height) for region in record.regions]


def to_padded(box: Box, width: int, height: int) -> Box:
    """A box of the image -> 0..1 of the image padded to a square, alike on both sides."""
    side = max(width, height)
    left, top = (side - width) / 2, (side - height) / 2
    x1, y1, x2, y2 = box
    xs = [(x * width + left) / side for x in (x1, x2)]
    ys = [(y * height + top) / side for y in (y1, y2)]
    return xs[0], ys[0], xs[1], ys[1]
