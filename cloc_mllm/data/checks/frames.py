"""Which coordinate frame are these boxes in? Evidence for each candidate over many boxes at once.

One box cannot tell: `[200, 100, 400, 300]` is a box in pixels and in 0..1000. Many can: in the
right frame nearly all lie inside their images, some reach the borders on both axes, and where the
true boxes are known they overlap them. Frames that the evidence does not part are all named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np
import torch

from cloc_mllm.box import Box
from cloc_mllm.data.readers.boxes import BoxOrder
from cloc_mllm.geometry import elementwise_iou

MIN_BOXES = 20  # with fewer, reaching a border or not is chance
MIN_INSIDE = 0.98
MIN_REACH = 0.93  # of the 95th percentile: a box cut by the image's edge is common in any set
MIN_IOU = 0.25  # mean IoU below which no frame that was tried is the right one
CLEAR_IOU = 0.02  # mean IoU by which the best frame must lead
_SLACK = 0.01
_RESIZE_FACTOR, _MIN_PIXELS, _MAX_PIXELS = 28, 56 * 56, 28 * 28 * 1280  # Qwen2-VL, Qwen2.5-VL

Size = tuple[float, float]


@dataclass(frozen=True)
class Case:
    """One annotated or answered box.

    Attributes:
        numbers: the four numbers as they stand in the source.
        size: width and height in pixels of the original image, None where unknown.
        truth: the true box, xyxy in pixels of the original image, None where unknown.
        image: name of the image file, "" where unknown.
    """

    numbers: Box
    size: Size | None = None
    truth: Box | None = None
    image: str = ""


@dataclass(frozen=True)
class Evidence:
    """What speaks for one frame; shares are 0..1, NaN where nothing is known.

    Attributes:
        inside: share of the boxes that lie inside their images.
        reach: how far the 95th percentile of the boxes goes towards the far border, on the axis
            where it goes less far; 1 is the border.
        mean_iou, accuracy: overlap with the true boxes, and the share over 0.5.
    """

    frame: str
    num_boxes: int
    inside: float
    reach: float
    mean_iou: float
    accuracy: float


@dataclass(frozen=True)
class Diagnosis:
    """`frames`: those that fit, best first; several where the numbers do not part them."""

    order: BoxOrder
    frames: list[str]
    evidence: list[Evidence]
    reasons: list[str] = field(default_factory=list)


def corners(numbers: Box, order: BoxOrder) -> Box:
    """Four numbers in an order -> xyxy."""
    x, y, a, b = numbers
    if order == "cxcywh":
        return x - a / 2, y - b / 2, x + a / 2, y + b / 2
    if order == "yxyx":
        return y, x, b, a
    return (x, y, x + a, y + b) if order == "xywh" else numbers


def written(share: Box, frame: str, order: BoxOrder, size: Size) -> Box:
    """xyxy in 0..1 of an image -> the numbers that a source of this frame and order has for it."""
    (width, height), (x1, y1, x2, y2) = size, share
    if frame == "pixels":
        across, down, left, top = width, height, 0.0, 0.0
    else:
        name, _, padded = frame.partition(" ")
        scale, side = float(name.removeprefix("0..")), max(size)
        across, down, left, top = scale, scale, 0.0, 0.0
        if padded:
            across, down = scale * width / side, scale * height / side
            left, top = scale * (side - width) / 2 / side, scale * (side - height) / 2 / side
    x1, y1, x2, y2 = x1 * across + left, y1 * down + top, x2 * across + left, y2 * down + top
    if order == "cxcywh":
        return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    if order == "yxyx":
        return y1, x1, y2, x2
    return (x1, y1, x2 - x1, y2 - y1) if order == "xywh" else (x1, y1, x2, y2)


def weigh(cases: Sequence[Case], frame: str, order: BoxOrder) -> Evidence:
    """Gathers the evidence for one frame and order; inverted boxes lie outside.

    Args:
        cases: of known size.
    """
    read = [replace(case, numbers=corners(case.numbers, order)) for case in cases]
    evidence = _gather(frame, read)
    assert evidence is not None
    x1, y1, x2, y2 = np.array([case.numbers for case in read]).T
    upright = float(((x2 >= x1) & (y2 >= y1)).mean())
    return replace(evidence, inside=min(evidence.inside, upright))


def to_pixels(frame: str, box: Box, size: Size) -> Box:
    """A box read in `frame` -> xyxy in pixels of the original image of `size`."""
    return FRAMES[frame](box, size)


def diagnose(cases: Sequence[Case]) -> Diagnosis:
    """Compare all frames on all cases.

    Raises:
        ValueError: no case at all.
    """
    if not cases:
        raise ValueError("there is no box to judge; expected rows with boxes or answers with any")
    order, reasons = _order(cases)
    ordered = [_reordered(case, order) for case in cases]
    evidence = [gathered for frame in FRAMES if (gathered := _gather(frame, ordered)) is not None]
    known = [item for item in evidence if not math.isnan(item.mean_iou)]
    if known:
        best = max(item.mean_iou for item in known)
        fitting = [i for i in known if i.mean_iou > max(MIN_IOU, best - CLEAR_IOU)]
        fitting.sort(key=lambda item: -item.mean_iou)
        reasons.append(f"mean IoU with the true boxes is {best:.3f} at best")
    else:
        fitting = [i for i in evidence if i.inside >= MIN_INSIDE and i.reach >= MIN_REACH]
        fitting.sort(key=lambda item: -item.reach)
        reasons.append("no true boxes: judged by lying inside the images and reaching the borders")
    if len(cases) < MIN_BOXES:
        reasons.append(f"only {len(cases)} boxes: expected {MIN_BOXES} or more to be sure")
    frames = _part_999_from_1000([item.frame for item in fitting], ordered, reasons)
    if all(case.size is None for case in cases):
        reasons.append("no image size is known: resizing and padding cannot be judged (--images)")
        frames += [f"{frame} padded" for frame in frames if f"{frame} padded" in FRAMES]
    return Diagnosis(order, frames, evidence, reasons)


def _order(cases: Sequence[Case]) -> tuple[BoxOrder, list[str]]:
    """`xyxy`, or `xywh` where corners would often be inverted."""
    inverted = np.mean(
        [case.numbers[2] < case.numbers[0] or case.numbers[3] < case.numbers[1] for case in cases]
    )
    reason = f"read as x1 y1 x2 y2, {inverted:.1%} of the boxes are inverted"
    return ("xywh" if inverted > 0.05 else "xyxy"), [reason]


def _reordered(case: Case, order: BoxOrder) -> Case:
    return replace(case, numbers=corners(case.numbers, order))


def _gather(frame: str, cases: Sequence[Case]) -> Evidence | None:
    """None where no case has what the frame needs: the image's size, or for pixels a true box."""
    if frame in _NEEDS_NO_SIZE:
        cases = [case if case.size or case.truth else replace(case, size=(1, 1)) for case in cases]
    read = [(to_pixels(frame, case.numbers, case.size), case) for case in cases if case.size]
    if frame == "pixels" and not read:
        read = [(case.numbers, case) for case in cases if case.truth is not None]
    if not read:
        return None
    pairs = [(box, case.truth) for box, case in read if case.truth is not None]
    ious = torch.zeros(0)
    if pairs:
        ious = elementwise_iou(
            torch.tensor([box for box, _ in pairs], dtype=torch.float64),
            torch.tensor([truth for _, truth in pairs], dtype=torch.float64),
        )
    shares = np.array([np.array(box) / (case.size * 2) for box, case in read if case.size])
    return Evidence(
        frame,
        len(read),
        inside=_inside(shares),
        reach=_reach(shares, [case.size for _, case in read if case.size]),
        mean_iou=float(ious.mean()) if pairs else math.nan,
        accuracy=float((ious >= 0.5).double().mean()) if pairs else math.nan,
    )


def _inside(shares: np.ndarray) -> float:
    if not len(shares):
        return math.nan
    within = (shares >= -_SLACK) & (shares <= 1 + _SLACK)
    return float(within.all(axis=1).mean())


def _reach(shares: np.ndarray, sizes: Sequence[Size]) -> float:
    """On the long and on the short side of the images apart: padding shrinks only the short one."""
    if not len(shares):
        return math.nan
    wide = np.array([width >= height for width, height in sizes])
    long_side = np.where(wide, shares[:, 2], shares[:, 3])
    short_side = np.where(wide, shares[:, 3], shares[:, 2])
    return float(min(np.percentile(long_side, 95), np.percentile(short_side, 95)))


def _part_999_from_1000(frames: list[str], cases: Sequence[Case], reasons: list[str]) -> list[str]:
    """They differ by a thousandth: only the largest number tells."""
    if not {"0..999", "0..1000"} <= set(frames):
        return frames
    largest = max(max(case.numbers) for case in cases)
    if largest not in (999, 1000):
        reasons.append(f"0..999 and 0..1000 cannot be parted: the largest number is {largest:g}")
        return frames
    reasons.append(f"the largest number is {largest:g}")
    return [frame for frame in frames if frame != ("0..1000" if largest == 999 else "0..999")]


def _scaled(scale: float) -> Callable[[Box, Size], Box]:
    def read(box: Box, size: Size) -> Box:
        width, height = size
        x1, y1, x2, y2 = (value / scale for value in box)
        return x1 * width, y1 * height, x2 * width, y2 * height

    return read


def _padded(scale: float) -> Callable[[Box, Size], Box]:
    def read(box: Box, size: Size) -> Box:
        side = max(size)
        left, top = (side - size[0]) / 2, (side - size[1]) / 2
        x1, y1, x2, y2 = (value / scale * side for value in box)
        return x1 - left, y1 - top, x2 - left, y2 - top

    return read


def resized_wh(size: Size) -> Size:
    """What Qwen2-VL and Qwen2.5-VL resize an image to: multiples of 28, a bounded area."""
    width, height = size
    sides = [max(1, round(side / _RESIZE_FACTOR)) * _RESIZE_FACTOR for side in (width, height)]
    area = sides[0] * sides[1]
    if area > _MAX_PIXELS or area < _MIN_PIXELS:
        bound, whole = (_MAX_PIXELS, math.floor) if area > _MAX_PIXELS else (_MIN_PIXELS, math.ceil)
        scale = math.sqrt(bound / (width * height))
        sides = [max(1, whole(s * scale / _RESIZE_FACTOR)) * _RESIZE_FACTOR for s in size]
    return float(sides[0]), float(sides[1])


def _resized(box: Box, size: Size) -> Box:
    across, down = (side / to for side, to in zip(size, resized_wh(size), strict=True))
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


ORDERS: tuple[BoxOrder, ...] = get_args(BoxOrder)
_NEEDS_NO_SIZE = (
    "0..1",
    "0..100",
    "0..999",
    "0..1000",
)  # to lie inside the image and reach its border
FRAMES: dict[str, Callable[[Box, Size], Box]] = {
    "pixels": lambda box, size: box,
    "resized pixels (Qwen2.5-VL)": _resized,
    "0..1": _scaled(1),
    "0..1 padded": _padded(1),
    "0..100": _scaled(100),
    "0..999": _scaled(999),
    "0..1000": _scaled(1000),
    "0..1000 padded": _padded(1000),
}
