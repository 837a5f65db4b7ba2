"""Boxes that know their frame, the one image+box transform, and box overlap.

Nothing else in the project converts boxes. Letters: R boxes. All boxes are xyxy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FrameKind = Literal["normalized", "pixels", "canvas"]
Resize = Literal["letterbox", "squash"]
Interpolation = Literal["bicubic", "bilinear", "lanczos"]


@dataclass(frozen=True)
class Frame:
    """The meaning of the numbers of a box.

    Attributes:
        kind: `normalized` is 0..1 of the original image; `pixels` is pixels of an original image
            of size `image_wh`; `canvas` is 0..1 of the square model input, after resize and
            padding.
        image_wh: width and height of the original image; None where they are unknown.
    """

    kind: FrameKind
    image_wh: tuple[float, float] | None = None

    @staticmethod
    def pixels(width: float, height: float) -> Frame:
        return Frame("pixels", _image_size((width, height)))

    @staticmethod
    def normalized(image_wh: tuple[float, float] | None) -> Frame:
        return Frame("normalized", None if image_wh is None else _image_size(image_wh))


CANVAS = Frame("canvas")


@dataclass(frozen=True)
class Boxes:
    """Boxes `xyxy: float[R, 4]` and the frame that their numbers are in."""

    xyxy: Tensor
    frame: Frame

    def __post_init__(self) -> None:
        if self.xyxy.ndim != 2 or self.xyxy.shape[1] != 4:
            raise ValueError(f"boxes must be float[R, 4] xyxy, got shape {tuple(self.xyxy.shape)}")

    def __len__(self) -> int:
        return self.xyxy.shape[0]

    @staticmethod
    def normalized(
        xyxy: Tensor | Sequence[Sequence[float]], image_wh: tuple[float, float] | None = None
    ) -> Boxes:
        """Boxes in 0..1 of the original image; with its size, `to_pixels` needs no arguments."""
        return Boxes(_as_rows(xyxy), Frame.normalized(image_wh))

    @staticmethod
    def pixels(xyxy: Tensor | Sequence[Sequence[float]], width: float, height: float) -> Boxes:
        return Boxes(_as_rows(xyxy), Frame.pixels(width, height))

    @property
    def image_wh(self) -> tuple[float, float] | None:
        """Width and height of the original image; None where they are unknown."""
        return self.frame.image_wh

    @property
    def xywh(self) -> Tensor:
        """float[R, 4]: left, top, width and height, in the frame of these boxes."""
        top_left, bottom_right = self.xyxy.split(2, dim=1)
        return torch.cat([top_left, bottom_right - top_left], 1)

    @property
    def cxcywh(self) -> Tensor:
        """float[R, 4]: centre x and y, width and height, in the frame of these boxes."""
        top_left, bottom_right = self.xyxy.split(2, dim=1)
        return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], 1)

    def to_normalized(self) -> Boxes:
        """Converts to 0..1 of the original image.

        Raises:
            ValueError: these are canvas boxes, which need `CanvasTransform.to_original`.
        """
        if self.frame.kind == "normalized":
            return self
        self._require("pixels")
        assert self.image_wh is not None
        size = self.xyxy.new_tensor([*self.image_wh, *self.image_wh])
        return Boxes(self.xyxy / size, Frame.normalized(self.image_wh))

    def to_pixels(self, width: float | None = None, height: float | None = None) -> Boxes:
        """Converts to pixels of the original image, or of the same image at another size.

        Args:
            width, height: of the image that the pixels are of; by default of the original image.

        Raises:
            ValueError: the size is neither given nor known, or these are canvas boxes.
        """
        if (width is None) != (height is None):
            raise ValueError(f"pass both sides of the image or none, got {width} x {height}")
        image_wh = self.image_wh if width is None or height is None else (width, height)
        if image_wh is None:
            self._require("normalized")
            raise ValueError(
                "these boxes do not know the size of their image; pass it: "
                "to_pixels(width, height), or Boxes.normalized(xyxy, image_wh=(width, height))"
            )
        frame = Frame.pixels(*image_wh)
        if self.frame == frame:
            return self
        normalized = self.to_normalized().xyxy
        return Boxes(normalized * normalized.new_tensor([*image_wh, *image_wh]), frame)

    def turned(self, turn: Image.Transpose) -> Boxes:
        """Moves normalised boxes with a picture that is turned or mirrored."""
        self._require("normalized")
        x1, y1, x2, y2 = self.xyxy.unbind(1)
        corners = {
            Image.Transpose.ROTATE_90: [y1, 1 - x2, y2, 1 - x1],
            Image.Transpose.ROTATE_180: [1 - x2, 1 - y2, 1 - x1, 1 - y1],
            Image.Transpose.ROTATE_270: [1 - y2, x1, 1 - y1, x2],
            Image.Transpose.FLIP_LEFT_RIGHT: [1 - x2, y1, 1 - x1, y2],
            Image.Transpose.FLIP_TOP_BOTTOM: [x1, 1 - y2, x2, 1 - y1],
            Image.Transpose.TRANSPOSE: [y1, x1, y2, x2],
            Image.Transpose.TRANSVERSE: [1 - y2, 1 - x2, 1 - y1, 1 - x1],
        }
        upright = turn in (
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.FLIP_TOP_BOTTOM,
        )
        turned_wh = self.image_wh if upright or self.image_wh is None else self.image_wh[::-1]
        return Boxes(torch.stack(corners[turn], 1), Frame.normalized(turned_wh))

    def check_not_turned(self, width: float, height: float) -> None:
        """Refuses boxes of the same picture before a quarter turn.

        Raises:
            ValueError: they are boxes of a `height` x `width` picture.
        """
        if width != height and self.image_wh == (height, width):
            unit = "in pixels " if self.frame.kind == "pixels" else ""
            raise ValueError(
                f"the boxes are {unit}of a {height:.0f} x {width:.0f} picture, but the "
                f"upright one is {width:.0f} x {height:.0f}: a photo with an EXIF orientation is "
                "turned first; take the size of what `open_image` returns"
            )

    def _require(self, kind: FrameKind) -> None:
        if self.frame.kind != kind:
            raise ValueError(
                f"expected boxes in the {kind!r} frame, got {self.frame.kind!r}; "
                "canvas boxes convert only through the CanvasTransform that made them"
            )


def _image_size(image_wh: tuple[float, float]) -> tuple[float, float]:
    width, height = map(float, image_wh)
    if not (width > 0 and height > 0):
        raise ValueError(f"expected a positive image size, got {width} x {height}")
    return width, height


def _as_rows(values: Tensor | Sequence[Sequence[float]]) -> Tensor:
    rows = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    rows = rows if rows.is_floating_point() else rows.double()
    return rows.reshape(0, 4) if rows.numel() == 0 else rows


@dataclass(frozen=True)
class CanvasTransform:
    """Resizes an image to the square canvas of `size` pixels, and mirrors it if `flip`.

    It moves an image and its boxes together, and boxes back. Boxes are scaled by the *rounded*
    resized size, so that a box painted on the image is found again where its numbers say.

    Attributes:
        resize: `letterbox` brings the long side to `size` and pads to a centred square; `squash`
            brings both sides to `size`.
    """

    original_width: int
    original_height: int
    size: int
    flip: bool = False
    resize: Resize = "letterbox"

    def __post_init__(self) -> None:
        if min(self.original_width, self.original_height, self.size) < 1:
            raise ValueError(
                f"a canvas needs positive sizes, got image {self.original_width} x "
                f"{self.original_height} and canvas {self.size}"
            )

    @property
    def resized_wh(self) -> tuple[int, int]:
        if self.resize == "squash":
            return self.size, self.size
        scale = self.size / max(self.original_width, self.original_height)
        width = max(1, round(self.original_width * scale))
        height = max(1, round(self.original_height * scale))
        return width, height

    @property
    def offset_xy(self) -> tuple[int, int]:
        width, height = self.resized_wh
        return (self.size - width) // 2, (self.size - height) // 2

    @property
    def wanted_side(self) -> int:
        """The length of the original's long side at which no side is shorter than on the canvas."""
        if self.resize == "letterbox":
            return self.size
        sides = self.original_width, self.original_height
        return math.ceil(self.size * max(sides) / min(sides))

    def apply(
        self,
        image: Image.Image,
        fill: tuple[int, int, int],
        interpolation: Interpolation = "bicubic",
    ) -> Image.Image:
        """Resizes an RGB image and pads it with the colour `fill` to a canvas of `size` x `size`.

        The image may have the original size, or 1/2, 1/4 or 1/8 of it, rounded up, as a JPEG
        decoder gives it. What it shows lies at the same place of the canvas either way.

        Raises:
            ValueError: the image has another size.
        """
        width, height = self._size_in(image)
        resized = image
        if (width, height) != self.resized_wh:
            kernel = Image.Resampling[interpolation.upper()]
            resized = image.resize(self.resized_wh, kernel, box=(0, 0, width, height))
        if self.flip:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if resized.size == (self.size, self.size):
            return resized
        canvas = Image.new("RGB", (self.size, self.size), fill)
        canvas.paste(resized, self.offset_xy)
        return canvas

    def to_canvas(self, boxes: Boxes) -> Boxes:
        """Moves boxes of the original image (normalised or pixels) to the canvas frame."""
        boxes.check_not_turned(self.original_width, self.original_height)
        scale, offset = self._affine(boxes.xyxy)
        xyxy = boxes.to_normalized().xyxy
        if self.flip:
            xyxy = _mirror(xyxy)
        return Boxes(xyxy * scale + offset, CANVAS)

    def mask_to_canvas(self, mask: Tensor) -> Tensor:
        """Moves a mask over the original image to the canvas: float[H, W] -> float[size, size].

        The mask may have any resolution. The largest value in each pixel is kept, so a point is
        never lost.
        """
        (width, height), (left, top) = self.resized_wh, self.offset_xy
        resized = F.adaptive_max_pool2d(mask.float()[None], (height, width))[0]
        canvas = resized.new_zeros(self.size, self.size)
        canvas[top : top + height, left : left + width] = resized.flip(1) if self.flip else resized
        return canvas

    def to_original(self, boxes: Boxes) -> Boxes:
        """Moves canvas boxes to normalised boxes of the original image, without clipping them."""
        boxes._require("canvas")
        scale, offset = self._affine(boxes.xyxy)
        xyxy = (boxes.xyxy - offset) / scale
        image_wh = self.original_width, self.original_height
        return Boxes.normalized(_mirror(xyxy) if self.flip else xyxy, image_wh)

    def _size_in(self, image: Image.Image) -> tuple[float, float]:
        """Width and height of the original in pixels of this image; the last pixel may be cut."""
        for reduction in (1, 2, 4, 8):
            width, height = self.original_width / reduction, self.original_height / reduction
            if image.size == (math.ceil(width), math.ceil(height)):
                return width, height
        raise ValueError(
            f"the transform was made for {self.original_width} x {self.original_height}, "
            f"got an image of {image.width} x {image.height}"
        )

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        (width, height), (left, top) = self.resized_wh, self.offset_xy
        scale = like.new_tensor([width, height, width, height]) / self.size
        return scale, like.new_tensor([left, top, left, top]) / self.size


def _mirror(xyxy: Tensor) -> Tensor:
    x1, y1, x2, y2 = xyxy.unbind(1)
    return torch.stack([1 - x2, y1, 1 - x1, y2], 1)


# torchvision.ops has these for every pair of two sets, or as a loss with an epsilon in the
# denominator; training wants box i with box i, exactly.
def elementwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of `a[i]` with `b[i]`: float[R, 4] x float[R, 4] -> float[R]; 0 for degenerate boxes."""
    return _share(*_overlap(a, b))


def elementwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of `a[i]` with `b[i]`: float[R] in -1..1."""
    intersection, union = _overlap(a, b)
    hull = torch.cat(
        [torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1
    )
    hull_area = _area(hull)
    return _share(intersection, union) - _share(hull_area - union, hull_area)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the areas of intersection and union."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = sides.clamp(min=0).prod(-1)
    return intersection, _area(a) + _area(b) - intersection


def _area(boxes: Tensor) -> Tensor:
    """The area of each box; 0 if it is inverted."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`, and 0 where `whole` is not above 0."""
    return torch.where(whole > 0, part / whole.clamp(min=1e-12), 0.0)
