"""Region classification with true boxes: what is asked, from a COCO or LVIS annotation file.

The file gives the boxes, the masks and *all* class names, also of classes that do not occur; the
records give the images (`cloc-mllm data build coco`) and are found by the image id.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import boxes_from_xywh
from cloc_mllm.data.readers.coco import Annotation, class_name, group_by_image, read_table
from cloc_mllm.data.readers.values import id_key
from cloc_mllm.evaluation.predictions import Box, ReferenceRow
from cloc_mllm.evaluation.queries import Benchmark, Query, clean_text
from cloc_mllm.geometry import clean_box

BANDS = {"f": "frequent", "c": "common", "r": "rare"}  # of LVIS's training set
NO_RECORD = "no_record"


@dataclass(frozen=True)
class BoxRules:
    """Which annotated boxes are asked.

    Args:
        keep_crowd: also those around a crowd (`iscrowd` 1).
        min_side_px: shortest side, in pixels of the annotated image, after clipping to it.
    """

    keep_crowd: bool = False
    min_side_px: float = 1.0


@dataclass(frozen=True)
class TrueBox:
    """One annotated box.

    Args:
        id: `IMAGE#ANNOTATION`.
        box: xyxy, normalised to the original image.
        segmentation: COCO's: polygons, or run lengths, in pixels of `image_hw`; None is unknown.
    """

    id: str
    image_id: str
    box: Box
    class_name: str
    segmentation: Any = None
    image_hw: tuple[int, int] = (0, 0)


@dataclass
class TrueBoxes:
    """All boxes to name and the names to choose from.

    Args:
        class_names: each once, in the order of the file.
        band_of: class name -> `frequent`, `common` or `rare`; empty without bands (COCO).
        dropped: annotations that are not asked, by reason.
    """

    class_names: list[str]
    items: list[TrueBox]
    band_of: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    def account(self) -> dict[str, Any]:
        """Counts for the report; kept and dropped add up to the annotations of the file."""
        return {
            "boxes": len(self.items),
            "dropped": dict(self.dropped.most_common()),
            "classes": len(self.class_names),
            "classes_that_occur": len({item.class_name for item in self.items}),
        }


def read_true_boxes(
    path: str | Path, image_ids: Collection[str], rules: BoxRules | None = None
) -> TrueBoxes:
    """Boxes of the images that have a record.

    An annotation is not asked, and counted, if it is of an `unknown_category` or `unknown_image`,
    of an image without a record (`no_record`), a `crowd`, or if its box is `not_finite`,
    `inverted`, of `zero_area`, `outside` the image or `too_small`.

    Raises:
        ValueError: no COCO or LVIS file, two classes of one name, or none of its images has a
            record.
    """
    table = read_table(path, "images", "annotations", "categories")
    names = _names(table["categories"], path)
    boxes = TrueBoxes(list(names.values()), [], _bands(table["categories"], names))
    annotations_of = group_by_image(table["annotations"])
    wanted = set(image_ids)
    for image in table["images"]:
        annotations = annotations_of.pop(id_key(image.get("id")), [])
        if id_key(image.get("id")) not in wanted:
            boxes.dropped[NO_RECORD] += len(annotations)
            continue
        boxes.items += _of_image(image, annotations, names, rules or BoxRules(), boxes.dropped)
    boxes.dropped["unknown_image"] += sum(map(len, annotations_of.values()))
    boxes.dropped += Counter()  # leaves out what is 0
    if not boxes.items:
        raise ValueError(
            f"{path} has no box to ask on these records (not used: {dict(boxes.dropped)}); build "
            "the records from this very file: cloc-mllm data build coco --instances FILE ..."
        )
    return boxes


def true_boxes_of(bench: Benchmark) -> TrueBoxes:
    """The same from records alone: their regions with a category, and the categories that occur."""
    items = [
        TrueBox(region.id, region.image_id, region.box, region.category)
        for region in bench.regions
        if region.category
    ]
    return TrueBoxes(bench.class_names, items)


def true_box_queries(boxes: TrueBoxes, task: str) -> Iterator[tuple[Query, ReferenceRow]]:
    """One query a box; the reference's kind is the band of its class."""
    for item in boxes.items:
        row_id = f"{task}/{item.id}"
        yield (
            Query(row_id, item.image_id, task, box=item.box),
            ReferenceRow(
                row_id,
                item.image_id,
                task,
                boxes=[item.box],
                labels=[item.class_name],
                kind=boxes.band_of.get(item.class_name, ""),
                num_candidates=len(boxes.class_names),
            ),
        )


def _names(categories: Sequence[Annotation], path: str | Path) -> dict[str, str]:
    """Category id (its `id_key`) -> name, lower-case, underscores as spaces."""
    names = {
        str(id_key(row.get("id"))): clean_text(str(class_name(row.get("name"))))
        for row in categories
    }
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice or not names:
        raise ValueError(f"{path}: expected categories of different names, got {twice or 'none'}")
    return names


def _bands(categories: Sequence[Annotation], names: dict[str, str]) -> dict[str, str]:
    return {
        names[str(id_key(row.get("id")))]: BANDS[row["frequency"]]
        for row in categories
        if row.get("frequency") in BANDS
    }


def _of_image(
    image: Annotation,
    annotations: Sequence[Annotation],
    names: dict[str, str],
    rules: BoxRules,
    dropped: Counter[str],
) -> Iterator[TrueBox]:
    size = image.get("width"), image.get("height")
    boxes = boxes_from_xywh([row.get("bbox") for row in annotations], *size)
    for row, normalized in zip(annotations, boxes, strict=True):
        category = str(id_key(row.get("category_id")))
        box, fault = _checked(normalized, size, rules.min_side_px)
        if category not in names:
            fault = "unknown_category"
        elif row.get("iscrowd") and not rules.keep_crowd:
            fault = "crowd"
        if box is None or fault:
            dropped[str(fault)] += 1
            continue
        yield TrueBox(
            f"{id_key(image['id'])}#{row.get('id')}",
            str(id_key(image["id"])),
            box,
            names[category],
            row.get("segmentation"),
            (int(image["height"]), int(image["width"])),
        )


def _checked(
    box: Box, size_wh: tuple[Any, Any], min_side_px: float
) -> tuple[Box | None, str | None]:
    if not all(map(math.isfinite, box)):
        return None, "not_finite"
    width, height = map(float, size_wh)
    pixels = [value * side for value, side in zip(box, (width, height) * 2, strict=True)]
    return clean_box(pixels, width, height, min_side_px)
