"""What may say where a region is: a box, a point or a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cloc_mllm.models.position import mask_boxes

# Four numbers are a box (xyxy), two a point (xy), both normalised to the original image; bool[H, W]
# of the image's size is a mask.
RegionLike = Sequence[float] | Tensor | np.ndarray


def as_mask(region: RegionLike, image_wh: tuple[int, int]) -> Tensor | None:
    """Returns the mask bool[H, W] of a region: for a point its one pixel, for a box None.

    Raises:
        ValueError: the mask is empty or of another size, the point is outside the image, or this
            is not a region.
    """
    width, height = image_wh
    values = torch.as_tensor(region)
    if values.ndim == 2:
        if tuple(values.shape) != (height, width):
            raise ValueError(
                f"expected a mask[{height}, {width}] (rows, columns of the image), got "
                f"{list(values.shape)}; draw it over the original image"
            )
        if not (values > 0).any():
            raise ValueError("the mask is empty; it must mark at least one pixel")
        return values > 0
    if tuple(values.shape) not in ((2,), (4,)):
        raise ValueError(
            "a region is a box (4 numbers), a point (2) or a mask [H, W], got shape "
            f"{list(values.shape)}; regions are given as a list"
        )
    if len(values) == 4:
        return None
    point = [float(value) for value in values]
    if not all(0 <= value <= 1 for value in point):
        raise ValueError(f"expected a point x, y in 0..1 of the image, got {point}")
    # a pixel's number divided by the number of pixels must give that pixel again
    column, row = (
        min(side - 1, math.floor(value * side + 1e-3))
        for value, side in zip(point, (width, height), strict=True)
    )
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[row, column] = True
    return mask


def around(mask: Tensor) -> list[float]:
    """Returns the box around what is on in a mask bool[H, W]: xyxy, normalised to the mask."""
    return mask_boxes(mask[None])[0].tolist()
