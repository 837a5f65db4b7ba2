"""What the numbers in an answer mean. A frame is declared, never guessed from their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cloc_mllm.box import Box

Size = tuple[float, float]
Order = Literal["xyxy", "yxyx", "xywh", "cxcywh"]

PATCHES_PER_SIDE = 32
_STEP_OF_ONE = 0.001  # fractions are written with three decimals


@dataclass(frozen=True)
class Coordinates:
    """How written numbers become a box of the original image, 0..1.

    Args:
        kind: `bins` are fixed steps of the image's sides; `pixels` those of the original image;
            `resized` those of the image as the model saw it; `patches` are two indices into a
            grid of 32 x 32 patches (Kosmos-2), upper left and lower right.
        divisor: of bins: number / divisor is the fraction of the side.
        largest: the largest number that may be written, in bins or patches.
        shift: added to a bin before it is divided (0.5: the middle of the bin).
        order: of the four numbers; `xywh` has the upper left corner and `cxcywh` the centre, then
            width and height.
    """

    kind: Literal["bins", "pixels", "resized", "patches"]
    divisor: float = 1.0
    largest: float = 1.0
    shift: float = 0.0
    order: Order = "xyxy"

    @property
    def needs_size(self) -> bool:
        return self.kind in ("pixels", "resized")

    def is_inside(self, numbers: Sequence[float], size: Size | None) -> bool:
        """Whether the numbers, and the corners they stand for, lie in the frame.

        A corner made of a centre or a side may pass the edge by one step, by rounding.

        Args:
            size: width and height the pixels count in; unused by bins and patches.
        """
        if self.kind == "patches":
            return all(0 <= number <= self.largest for number in numbers)
        width, height = self._sides(size)
        if not self.needs_size:
            width = height = self.largest
        sides = (height, width) if self.order == "yxyx" else (width, height)
        if not all(0 <= n <= side for n, side in zip(numbers, (*sides, *sides), strict=True)):
            return False
        step = self._step if self.order in ("xywh", "cxcywh") else 0.0
        corners = zip(self._corners(numbers), (width, height) * 2, strict=True)
        return all(-step <= corner <= side + step for corner, side in corners)

    def fractions(self, numbers: Sequence[float], size: Size | None) -> Box:
        """The written numbers (4; patches: 2) as xyxy of the original image, not checked."""
        if self.kind == "patches":
            return _patch_box(int(numbers[0]), int(numbers[1]))
        width, height = self._sides(size)
        x1, y1, x2, y2 = self._corners([number + self.shift for number in numbers])
        return x1 / width, y1 / height, x2 / width, y2 / height

    def numbers(self, box: Sequence[float], size: Size | None) -> list[float]:
        """The numbers that are written for a box of the original image, the inverse of
        `fractions` but for rounding: whole numbers, or three decimals of fractions."""
        x1, y1, x2, y2 = box
        if self.kind == "patches":
            side = PATCHES_PER_SIDE
            return [
                int(y1 * side) * side + int(x1 * side),
                (math.ceil(y2 * side) - 1) * side + math.ceil(x2 * side) - 1,
            ]
        width, height = self._sides(size)
        x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
        if self.order == "yxyx":
            written = [y1, x1, y2, x2]
        elif self.order == "xyxy":
            written = [x1, y1, x2, y2]
        else:
            first = [x1, y1] if self.order == "xywh" else [(x1 + x2) / 2, (y1 + y2) / 2]
            written = [*first, x2 - x1, y2 - y1]
        if self._step < 1:
            return [round(value, 3) for value in written]
        largest = math.inf if self.needs_size else int(self.largest)
        return [min(max(round(value - self.shift), 0), largest) for value in written]

    @property
    def _step(self) -> float:
        return 1.0 if self.needs_size or self.divisor > 1 else _STEP_OF_ONE

    def _corners(self, numbers: Sequence[float]) -> Box:
        a, b, c, d = numbers
        if self.order == "yxyx":
            return b, a, d, c
        if self.order == "xywh":
            return a, b, a + c, b + d
        if self.order == "cxcywh":
            return a - c / 2, b - d / 2, a + c / 2, b + d / 2
        return a, b, c, d

    def _sides(self, size: Size | None) -> Size:
        if not self.needs_size:
            return self.divisor, self.divisor
        if size is None or not min(size) > 0:
            raise ValueError(f"a frame of {self.kind} needs a width and height, got {size}")
        return size


def _patch_box(upper_left: int, lower_right: int) -> Box:
    """From the middle of the first patch to the middle of the last; boxes one patch wide or high
    reach to the patches' edges (Kosmos-2's own decoding)."""
    y1, x1 = divmod(upper_left, PATCHES_PER_SIDE)
    y2, x2 = divmod(lower_right, PATCHES_PER_SIDE)
    first, last = (0.0, 1.0) if x1 == x2 or y1 == y2 else (0.5, 0.5)
    side = PATCHES_PER_SIDE
    return (x1 + first) / side, (y1 + first) / side, (x2 + last) / side, (y2 + last) / side


def smart_resize(
    width: int, height: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 12845056
) -> tuple[int, int]:
    """Width and height that Qwen2.5-VL sees of an image: multiples of `factor`, near the original
    size, an area within the bounds (defaults: those of its released processor)."""
    new_width, new_height = (max(factor, round(x / factor) * factor) for x in (width, height))
    if new_width * new_height > max_pixels:
        shrink = (width * height / max_pixels) ** 0.5
        new_width, new_height = (
            max(factor, int(x / shrink / factor) * factor) for x in (width, height)
        )
    elif new_width * new_height < min_pixels:
        grow = (min_pixels / (width * height)) ** 0.5
        new_width, new_height = (-int(-(x * grow / factor) // 1) * factor for x in (width, height))
    return new_width, new_height
