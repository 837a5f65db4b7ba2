"""What the numbers in an answer mean. A frame is declared, never guessed from their size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cloc_mllm.box import Box

Size = tuple[float, float]

PATCHES_PER_SIDE = 32


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
        y_first: written y1 x1 y2 x2.
    """

    kind: Literal["bins", "pixels", "resized", "patches"]
    divisor: float = 1.0
    largest: float = 1.0
    shift: float = 0.0
    y_first: bool = False

    @property
    def needs_size(self) -> bool:
        return self.kind in ("pixels", "resized")

    def overshoot(self, numbers: Sequence[float], size: Size | None) -> float:
        """How far the numbers leave the frame, as a share of it; 0 or less is inside.

        Args:
            size: width and height the pixels count in; unused by bins and patches.
        """
        limits = [self.largest] * len(numbers)
        if self.needs_size:
            limits = list(self._size(size)) * 2
        return max(
            max(-number, number - limit) / limit
            for number, limit in zip(numbers, limits, strict=True)
        )

    def fractions(self, numbers: Sequence[float], size: Size | None) -> Box:
        """The written numbers (4; patches: 2) as xyxy of the original image, not checked."""
        if self.kind == "patches":
            return _patch_box(int(numbers[0]), int(numbers[1]))
        if self.needs_size:
            width, height = self._size(size)
            return numbers[0] / width, numbers[1] / height, numbers[2] / width, numbers[3] / height
        a, b, c, d = ((number + self.shift) / self.divisor for number in numbers)
        return (b, a, d, c) if self.y_first else (a, b, c, d)

    def _size(self, size: Size | None) -> Size:
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
