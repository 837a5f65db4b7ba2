"""Shows larger images at their own resolution: the whole image, then its tiles (AnyRes).

As in LLaVA-NeXT, the language model reads the whole image first and then its tiles, row by row, all
through the same encoder. Every view is a crop on whole pixels, so its place in the original image
is exact, and the projectors are told this place (`View.frame`); no features are stitched together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from cloc_mllm.geometry import CANVAS, Boxes, CanvasTransform, Resize

PixelBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class View:
    """A crop of an image that goes to the canvas.

    Attributes:
        crop_px: xyxy in pixels of the original image.
        image_wh: width and height of the original image.
        size: the side of the canvas in pixels.
        resize: see `CanvasTransform`.
    """

    crop_px: PixelBox
    image_wh: tuple[int, int]
    size: int
    resize: Resize = "letterbox"

    @property
    def transform(self) -> CanvasTransform:
        """The transform from the crop to the canvas."""
        left, top, right, bottom = self.crop_px
        return CanvasTransform(right - left, bottom - top, self.size, resize=self.resize)

    def crop(self, image: Image.Image) -> Image.Image:
        return image if self.is_whole else image.crop(self.crop_px)

    def to_canvas(self, boxes: Boxes) -> Boxes:
        """Moves boxes of the original image to the canvas frame; they may reach out of it."""
        if self.is_whole:
            return self.transform.to_canvas(boxes)
        left, top, right, bottom = self.crop_px
        xyxy_px = boxes.to_pixels(*self.image_wh).xyxy
        moved = xyxy_px - xyxy_px.new_tensor([left, top, left, top])
        return self.transform.to_canvas(Boxes.pixels(moved, right - left, bottom - top))

    def frame(self) -> Tensor:
        """Returns the whole canvas as a normalised box of the original image: float[1, 4]."""
        in_crop = self.transform.to_original(Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), CANVAS))
        if self.is_whole:
            return in_crop.xyxy
        left, top, right, bottom = self.crop_px
        size = torch.tensor([right - left, bottom - top] * 2)
        xyxy_px = in_crop.xyxy * size + torch.tensor([left, top, left, top])
        return xyxy_px / torch.tensor(self.image_wh * 2)

    @property
    def is_whole(self) -> bool:
        return self.crop_px == (0, 0, *self.image_wh)


def image_views(
    image_wh: tuple[int, int], size: int, max_tiles: int, resize: Resize = "letterbox"
) -> list[View]:
    """Lists the views of an image: the whole, then its tiles row by row.

    There are tiles only where they show more than the whole image does: as many as the resolution
    of the image needs, and at most `max_tiles`.
    """
    width, height = image_wh
    columns, rows = tile_grid(width, height, size, max_tiles)
    crops = [(0, 0, width, height)]
    if columns * rows > 1:
        x = [round(width * column / columns) for column in range(columns + 1)]
        y = [round(height * row / rows) for row in range(rows + 1)]
        crops += [
            (x[column], y[row], x[column + 1], y[row + 1])
            for row in range(rows)
            for column in range(columns)
        ]
    return [View(crop, image_wh, size, resize) for crop in crops]


def tile_grid(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """Returns the (columns, rows) of tiles that show the image largest.

    Nothing is shown above its own resolution; of grids that show it equally large, the one with the
    fewest tiles is taken. (1, 1) is the whole image.
    """

    def scale(columns: int, rows: int) -> float:
        return min(1.0, size / max(width / columns, height / rows))

    grids = [
        (columns, rows)
        for columns in range(1, min(max_tiles, width) + 1)
        for rows in range(1, min(max_tiles // columns, height) + 1)
    ]
    return max(grids or [(1, 1)], key=lambda grid: (scale(*grid), -math.prod(grid)))


def sharpest_view(views: Sequence[View], box: Sequence[float]) -> int:
    """Returns the index of the view that shows a box whole and largest.

    That is a tile that holds all of the box, or else the whole image (index 0).

    Args:
        box: xyxy, normalised to the original image.
    """
    width, height = views[0].image_wh
    x1, y1, x2, y2 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    for index, view in enumerate(views[1:], 1):
        left, top, right, bottom = view.crop_px
        if left <= x1 and x2 <= right and top <= y1 and y2 <= bottom:
            return index
    return 0
