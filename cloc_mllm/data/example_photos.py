"""The photos inside the package, with a box or two each: examples of the demo, docs and tests."""

from __future__ import annotations

import json
from typing import Any

from cloc_mllm.data.images import open_image
from cloc_mllm.data.records import Record, Region
from cloc_mllm.shipped import ASSETS

EXAMPLE_PHOTOS = ASSETS / "photos" / "examples"


def example_photos() -> list[Record]:
    """Reads the example photos; their authors and licences are in the folder's README."""
    records = []
    for row in _rows():
        path = EXAMPLE_PHOTOS / row["file"]
        width, height = open_image(path).size
        regions = [
            Region(tuple(region["box"]), region["phrase"], category=region["category"])
            for region in row["regions"]
        ]
        records.append(
            Record(path.stem, path.read_bytes(), width, height, [row["caption"]], regions, "coco")
        )
    return records


def photo_credits() -> dict[str, tuple[str, str]]:
    """Reads the address of each example photo's page and its licence, by the id of its record."""
    return {row["file"].removesuffix(".jpg"): (row["url"], row["licence"]) for row in _rows()}


def _rows() -> list[dict[str, Any]]:
    return json.loads((EXAMPLE_PHOTOS / "photos.json").read_text(encoding="utf-8"))
