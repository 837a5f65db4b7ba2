"""One row of a YOLO label file: `CLASS` and the numbers of a box, polygon, or box with keypoints.

| task | numbers behind the class |
|---|---|
| detect | centre x, centre y, width, height |
| segment, obb | x, y of three corners or more; the box around them is taken |
| pose | a box as in detect, then x, y, or x, y, visibility, of each keypoint |

A score may follow (predictions saved with their confidence). Counts alone do not tell polygons
from keypoints: `kpt_shape` of the data set's YAML does, or rows that are only one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from cloc_mllm.data.values import id_key, number

Task = Literal["detect", "segment", "pose"]
_SLACK = 0.02  # of the image: how far points may stick out of the image or their box
_VISIBILITIES = (0.0, 1.0, 2.0)


class LabelRow(NamedTuple):
    """A row as read.

    Attributes:
        class_key: the number of its class, `id_key`'s spelling.
        cxcywh: centre and size, in 0..1 of the image.
        fault: what is wrong with it; "" if nothing is.
    """

    class_key: str
    cxcywh: list[float]
    score: float = 1.0
    fault: str = ""


def parse_row(line: str, task: Task | None, keypoints: tuple[int, int] | None) -> LabelRow:
    """Reads a row.

    Args:
        task: what rows of more than a box and a score are; None where that is not known.
        keypoints: `kpt_shape`, number of keypoints and of values of each; None if not stated.
    """
    class_text, *rest = line.split()
    values = [number(text) for text in rest]
    class_number = number(class_text)
    class_key = id_key(class_text if math.isnan(class_number) else class_number) or ""
    if len(values) < 4:
        return _refused(class_key, "fewer than four numbers behind the class")
    if len(values) <= 5:
        return _box(class_key, values[:4], values[4:])
    if task == "pose":
        return _pose(class_key, values, keypoints)
    if task == "segment":
        # corners come in pairs, so one number more is a score
        num_left = len(values) % 2
        corners = values[: len(values) - num_left]
        return _box(class_key, _around(corners), values[len(corners) :])
    return _refused(
        class_key,
        f"{len(values)} numbers may be a polygon or a box with keypoints; say which with --task",
    )


def _refused(class_key: str, fault: str) -> LabelRow:
    return LabelRow(class_key, [math.nan] * 4, fault=fault)


def _box(class_key: str, cxcywh: list[float], scores: list[float]) -> LabelRow:
    score = scores[0] if scores else 1.0
    if not 0 <= score <= 1:
        return _refused(class_key, f"expected a score in 0..1 as the last number, got {score:g}")
    return LabelRow(class_key, cxcywh, score)


def _around(corners: list[float]) -> list[float]:
    """Centre and size of the box around points."""
    xs, ys = corners[0::2], corners[1::2]
    if any(map(math.isnan, corners)):  # NaN would get lost in min and max
        return [math.nan] * 4
    (x1, x2), (y1, y2) = (min(xs), max(xs)), (min(ys), max(ys))
    return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def _pose(class_key: str, values: list[float], keypoints: tuple[int, int] | None) -> LabelRow:
    if keypoints is None:
        return _box(class_key, values[:4], [])
    # rows with visibilities occur under a kpt_shape without them, and the other way round
    counts = sorted({4 + keypoints[0] * size for size in (2, 3, keypoints[1])})
    for count in counts:
        if len(values) in (count, count + 1):
            return _box(class_key, values[:4], values[count:])
    expected = " or ".join(map(str, counts))
    return _refused(
        class_key,
        f"kpt_shape {list(keypoints)} asks for {expected} numbers behind the class, not "
        f"{len(values)}",
    )


def tell_task(rows: Iterable[str]) -> Task | None:
    """Tells polygons from boxes with keypoints by rows of more than five numbers.

    Keypoint rows all have one length, boxes on the image and keypoints in their box; polygons have
    points on the image. None where every row is both or neither.
    """
    lengths: set[int] = set()
    may_be_pose = may_be_polygon = True
    for row in rows:
        values = [number(text) for text in row.split()[1:]]
        if len(values) <= 5:
            continue
        lengths.add(len(values))
        may_be_pose &= any(_fits_pose(values, size) for size in (2, 3))
        corners = values[: len(values) - len(values) % 2]
        may_be_polygon &= all(-_SLACK <= value <= 1 + _SLACK for value in corners)
    may_be_pose &= len(lengths) == 1
    if not lengths or may_be_pose == may_be_polygon:
        return None
    return "pose" if may_be_pose else "segment"


def _fits_pose(values: list[float], size: int) -> bool:
    """Whether a box and keypoints of so many values each fit together; NaN never does."""
    (x, y, w, h), points = values[:4], values[4:]
    if len(points) % size:
        return False
    if size == 3 and not all(value in _VISIBILITIES for value in points[2::3]):
        return False
    is_on_image = all(
        side / 2 - _SLACK <= at <= 1 - side / 2 + _SLACK for at, side in ((x, w), (y, h))
    )
    return (
        is_on_image
        and all(
            (at_x == 0 == at_y)  # a keypoint that is not labelled
            or (abs(at_x - x) <= w / 2 + _SLACK and abs(at_y - y) <= h / 2 + _SLACK)
            for at_x, at_y in zip(points[0::size], points[1::size], strict=True)
        )
    )
