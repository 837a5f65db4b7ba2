"""Records to COCO: `instances.json`, `captions.json` and `images/`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cloc_mllm.data.records import Record
from cloc_mllm.data.storage import new_directory
from cloc_mllm.data.writers import pixel_corners, pixel_xywh, write_image


def write_coco(records: Iterable[Record], directory: str | Path) -> Counter[str]:
    """A category is a region's `category`, or its phrase where it has none.

    Frame: `bbox` is xywh in pixels of the original image. An id of digits becomes a number, as in
    COCO; another stays text. A phrase beside a category is kept as `phrase`, a key that COCO does
    not have and its tools pass over; so are `expressions` and `score`.

    Returns:
        counts of `records`, `regions` and `captions` written.
    """
    tables: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "captions": []}
    categories: dict[str, int] = {}
    with new_directory(directory) as folder:
        for record in records:
            _add(record, write_image(record, folder / "images"), tables, categories)
        names = [{"id": number, "name": name} for name, number in categories.items()]
        instances = {
            "images": tables["images"],
            "annotations": tables["annotations"],
            "categories": names,
        }
        captions = {"images": tables["images"], "annotations": tables["captions"]}
        for name, table in (("instances", instances), ("captions", captions)):
            (folder / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
    return Counter(
        records=len(tables["images"]),
        regions=len(tables["annotations"]),
        captions=len(tables["captions"]),
    )


def _add(
    record: Record,
    file_name: str,
    tables: dict[str, list[dict[str, Any]]],
    categories: dict[str, int],
) -> None:
    image_id = int(record.id) if _is_number(record.id) else record.id
    size = {"width": record.width, "height": record.height}
    tables["images"].append({"id": image_id, "file_name": file_name, **size})
    for region, corners in zip(record.regions, pixel_corners(record), strict=True):
        category = region.category or region.phrase
        bbox = pixel_xywh(corners)
        extra: dict[str, Any] = {"phrase": region.phrase} if region.phrase != category else {}
        extra |= {"expressions": region.expressions} if region.expressions else {}
        extra |= {"score": region.score} if region.score != 1 else {}
        tables["annotations"].append(
            {
                "id": len(tables["annotations"]) + 1,
                "image_id": image_id,
                "category_id": categories.setdefault(category, len(categories) + 1),
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
                **extra,
            }
        )
    for caption in record.captions:
        number = len(tables["captions"]) + 1
        tables["captions"].append({"id": number, "image_id": image_id, "caption": caption})


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 16 and str(int(text)) == text
