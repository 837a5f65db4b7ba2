"""The photos inside the package, with a box or two each: examples of the demo, docs and tests."""

from __future__ import annotations

import json

from PIL import Image

from cloc_mllm.data.records import Record, Region
from cloc_mllm.shipped import ASSETS

EXAMPLE_PHOTOS = ASSETS / "photos" / "examples"


def example_photos() -> list[Record]:
    """Reads the example photos; their authors and licences are in the folder's README."""
    records = []
    for row in json.loads((EXAMPLE_PHOTOS / "photos.json").read_text(encoding="utf-8")):
        path = EXAMPLE_PHOTOS / row["file"]
        with Image.open(path) as image:
            width, height = image.size
        regions = [
            Region(tuple(region["box"]), region["phrase"], category=region["category"])
            for region in row["regions"]
        ]
        records.append(
            Record(path.stem, path.read_bytes(), width, height, [row["caption"]], regions, "coco")
        )
    return records
