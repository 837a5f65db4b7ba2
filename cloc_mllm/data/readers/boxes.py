"""Boxes as annotation files write them -> xyxy, 0..1 of the upright image.

A `BoxFrame` says what the numbers of one image's boxes are of. Nothing is refused here: numbers
that are none, and boxes of an unknown size, become NaN, which `validate_record` counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from cloc_mllm.box import Box
from cloc_mllm.data.images import FILE_FORMATS, SIDEWAYS, Header, read_header
from cloc_mllm.data.values import as_dict, number, numbers, size_of
from cloc_mllm.geometry import Boxes

# The frame of boxes of a photo with an EXIF orientation: `stated` takes the upright picture, or the
# stored one where the stated size is that before a quarter turn; the others are said by the user.
BoxesOf = Literal["stated", "upright", "stored"]
# what the four numbers of a box are; cx and cy are its centre
BoxOrder = Literal["xyxy", "xywh", "cxcywh", "yxyx"]
# what boxes are measured in: pixels, or 0..1, 0..100 or 0..1000 of the image's width and height
Units = Literal["pixels", "normalized", "hundredths", "thousandths"]
FRAME_NAMES: dict[Units, str] = {  # as `data doctor` calls them
    "pixels": "pixels",
    "normalized": "0..1",
    "hundredths": "0..100",
    "thousandths": "0..1000",
}
# what a number at the far border is, in frames that are shares of the image's width and height
FAR_BORDER = {"normalized": 1.0, "original": 1.0, "hundredths": 100.0, "thousandths": 1000.0}
Size = tuple[float, float]

TURNED = "photos whose stated size is that before their EXIF turn: their boxes are turned with them"
RESIZED = "photos that were resized after annotation: their boxes are scaled"
UNTOLD = (
    "photos with an EXIF turn of which nothing tells whether their boxes are turned, too: taken as "
    "upright (see --boxes_of)"
)
OTHER_SHAPE = (
    "photos of another shape than stated (squashed, or another photo): look at some; "
    "--restore_shape undoes a squash"
)
RESTORED = "squashed photos stretched back to the shape that their annotation states"
_MAX_NESTING = 4  # of lists of points
_MAX_BITS = 60  # of a run length


@dataclass(frozen=True)
class BoxFrame:
    """The frame of the numbers of an image's boxes.

    Attributes:
        width, height: the size that boxes are divided by; NaN where nothing says it.
        turn: what brings the picture that was annotated upright, None for nothing.
        remark: `TURNED`, `UNTOLD`, `RESIZED`, `OTHER_SHAPE`, `RESTORED`, or "" where the stated
            size is as expected.
    """

    width: float = math.nan
    height: float = math.nan
    turn: Image.Transpose | None = None
    remark: str = ""

    @property
    def upright_wh(self) -> Size:
        """The stated size, of the picture after its turn."""
        return (self.height, self.width) if self.turn in SIDEWAYS else (self.width, self.height)

    def from_xyxy(self, rows: Sequence[Any]) -> list[Box]:
        """Normalises boxes given as x1, y1, x2, y2."""
        return self._normalized([numbers(row, 4) for row in rows])

    def from_xywh(self, rows: Sequence[Any]) -> list[Box]:
        """Normalises boxes given as left, top, width, height."""
        read = (numbers(row, 4) for row in rows)
        return self._normalized([[x, y, x + w, y + h] for x, y, w, h in read])

    def from_cxcywh(self, rows: Sequence[Any]) -> list[Box]:
        """Normalises boxes given as centre, width, height."""
        read = (numbers(row, 4) for row in rows)
        return self._normalized(
            [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in read]
        )

    def from_order(self, rows: Sequence[Any], order: BoxOrder) -> list[Box]:
        """Normalises boxes whose four numbers are in a declared order."""
        if order == "xywh":
            return self.from_xywh(rows)
        if order == "cxcywh":
            return self.from_cxcywh(rows)
        if order == "yxyx":
            rows = [[x1, y1, x2, y2] for y1, x1, y2, x2 in (numbers(row, 4) for row in rows)]
        return self.from_xyxy(rows)

    def from_padded(self, rows: Sequence[Any]) -> list[Box]:
        """Normalises xyxy in 0..1 of the image padded to a square, alike on both sides."""
        side = max(self.width, self.height)
        left, top = (side - self.width) / 2, (side - self.height) / 2
        read = (numbers(row, 4) for row in rows)
        return self._normalized(
            [
                [a * side - left, b * side - top, c * side - left, d * side - top]
                for a, b, c, d in read
            ]
        )

    def _normalized(self, xyxy: list[list[float]]) -> list[Box]:
        if not xyxy or math.isnan(self.width):
            return [(math.nan,) * 4] * len(xyxy)
        boxes = Boxes.pixels(xyxy, self.width, self.height).to_normalized()
        if self.turn is not None:
            boxes = boxes.turned(self.turn)
        rows = (boxes.xyxy + 0.0).tolist()  # -0.0 becomes 0.0
        return [(x1, y1, x2, y2) for x1, y1, x2, y2 in rows]


def box_frame(
    image: Header | None, width: Any = None, height: Any = None, boxes_of: BoxesOf = "stated"
) -> BoxFrame:
    """Tells what pixel boxes are pixels of.

    Tools that ignore EXIF state the size and the boxes of the picture before its turn. A quarter
    turn exchanges width and height, so the stated size tells the two frames apart; nothing tells
    them apart for squares, half turns, mirrored photos and missing sizes.

    Args:
        image: of its file; None where there is none.
        width, height: as stated. Where one is no positive number, the file's own size counts.
        boxes_of: `upright` and `stored` overrule what the stated size tells.
    """
    stated = size_of(width, height)
    if image is None:
        return BoxFrame() if stated is None else BoxFrame(*stated)
    turn = image.turn if boxes_of == "stored" else None
    is_told = boxes_of == "stated" and image.turn in SIDEWAYS and stated is not None
    if is_told and _is_wide(stated) * _is_wide(image.stored_wh) > 0:
        turn = image.turn
    own = image.upright_wh if turn is None else image.stored_wh
    is_untold = _is_untold(image, boxes_of) and not (is_told and _is_wide(stated))
    if stated is None:
        return BoxFrame(float(own[0]), float(own[1]), turn, UNTOLD if is_untold else "")
    remark = _remark(stated, own, is_told and turn is not None)
    return BoxFrame(*stated, turn, remark or (UNTOLD if is_untold else ""))


def share_frame(image: Header | None, scale: float, boxes_of: BoxesOf = "stated") -> BoxFrame:
    """The frame of boxes in 0..`scale` of the image's width and height."""
    turn = image.turn if image is not None and boxes_of == "stored" else None
    return BoxFrame(scale, scale, turn, UNTOLD if _is_untold(image, boxes_of) else "")


def _is_untold(image: Header | None, boxes_of: BoxesOf) -> bool:
    """Whether a picture has a turn of which the user has not said what boxes make of it."""
    return image is not None and image.turn is not None and boxes_of == "stated"


def _is_wide(size: Size | None) -> float:
    """Positive for a wide picture, negative for a tall one, 0 for a square."""
    return 0.0 if size is None else size[0] - size[1]


def _remark(stated: Size, own: Size, is_turned: bool) -> str:
    if is_turned:
        return TURNED
    if stated == own:
        return ""
    # a resized side is rounded to whole pixels
    is_same_shape = (
        abs(own[1] - own[0] * stated[1] / stated[0]) <= 1
        or abs(own[0] - own[1] * stated[0] / stated[1]) <= 1
    )
    return RESIZED if is_same_shape else OTHER_SHAPE


def boxes_from_xyxy(rows: Sequence[Any], width: Any, height: Any, image: bytes = b"") -> list[Box]:
    """Normalises pixel boxes xyxy of a picture of the stated `width` x `height`.

    Args:
        image: its file, which tells whether the stated size is that before an EXIF turn, and the
            size where none is stated.
    """
    header = read_header(image, formats=FILE_FORMATS) if image else None
    return box_frame(header, width, height).from_xyxy(rows)


def boxes_from_xywh(rows: Sequence[Any], width: Any, height: Any, image: bytes = b"") -> list[Box]:
    """Does the same for boxes given as x, y, width, height."""
    header = read_header(image, formats=FILE_FORMATS) if image else None
    return box_frame(header, width, height).from_xywh(rows)


def around_turned(xyxy: Sequence[Any], degrees: Any, *, about_corner: bool = False) -> list[float]:
    """Encloses a box turned clockwise about its centre, or about its corner x1, y1."""
    x1, y1, x2, y2 = numbers(xyxy, 4)
    angle = math.radians(number(degrees))
    if angle == 0:
        return [x1, y1, x2, y2]
    half_w, half_h = (x2 - x1) / 2, (y2 - y1) / 2
    x, y = x1 + half_w, y1 + half_h
    if about_corner:
        x = x1 + half_w * math.cos(angle) - half_h * math.sin(angle)
        y = y1 + half_w * math.sin(angle) + half_h * math.cos(angle)
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    # sides keep their sign: an inverted box stays one
    reach_x, reach_y = half_w * cos + half_h * sin, half_w * sin + half_h * cos
    return [x - reach_x, y - reach_y, x + reach_x, y + reach_y]


def around_ellipse(centre: Sequence[Any], radii: Sequence[Any], degrees: Any = 0) -> list[float]:
    """Encloses an ellipse of the radii along x and y, turned clockwise about its centre."""
    (x, y), (radius_x, radius_y) = numbers(centre, 2), numbers(radii, 2)
    if min(radius_x, radius_y) < 0:
        return [math.nan] * 4
    angle = math.radians(number(degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    reach_x, reach_y = (
        math.hypot(radius_x * cos, radius_y * sin),
        math.hypot(radius_x * sin, radius_y * cos),
    )
    return [x - reach_x, y - reach_y, x + reach_x, y + reach_y]


def xywh_of_annotation(row: dict[str, Any]) -> Any:
    """Finds the xywh of a COCO annotation: `bbox`, or what encloses its `segmentation`.

    Keypoints give no box. Four zeros are what tools write for "none". CVAT states a turned box
    unturned, with the `rotation` among its `attributes`: the box around it is taken.
    """
    stated = row.get("bbox")
    box = numbers(stated, 4)
    if not any(map(math.isnan, box)) and any(box):
        degrees = number(as_dict(row.get("attributes")).get("rotation"))
        if row.get("segmentation") or math.isnan(degrees) or degrees % 360 == 0:
            return stated
        x, y, w, h = box
        x1, y1, x2, y2 = around_turned([x, y, x + w, y + h], degrees)
        return [x1, y1, x2 - x1, y2 - y1]
    corners = enclosing_corners(row.get("segmentation"))
    if corners is None:
        return stated
    x1, y1, x2, y2 = corners
    return [x1, y1, x2 - x1, y2 - y1]


def enclosing_corners(segmentation: Any) -> list[float] | None:
    """Encloses polygons (flat lists, lists of points) or a run-length mask: xyxy in its pixels.

    None where it holds no point, and for what is neither.
    """
    if isinstance(segmentation, dict):
        return _corners_of_runs(segmentation)
    points = list(_points(segmentation))
    if not points or any(math.isnan(value) for point in points for value in point):
        return None
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def _points(value: Any, depth: int = 0) -> Iterator[tuple[float, float]]:
    """The points of nested lists, whose innermost are x, y, x, y, ...; NaN for anything else."""
    if isinstance(value, dict):
        yield number(value.get("x")), number(value.get("y"))
    elif isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value):
        for item in value if depth < _MAX_NESTING else []:
            yield from _points(item, depth + 1)
    elif isinstance(value, list) and len(value) % 2 == 0:
        flat = [number(item) for item in value]
        yield from zip(flat[::2], flat[1::2], strict=True)
    elif value is not None:
        yield math.nan, math.nan


def _corners_of_runs(mask: dict[str, Any]) -> list[float] | None:
    """Encloses COCO's run lengths: background and foreground in turn, column by column."""
    height, _ = numbers(mask.get("size"), 2)
    counts = mask.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = _decompressed(counts)
    if not isinstance(counts, list):
        return None
    lengths = np.array([number(count) for count in counts])
    if not height > 0 or not (lengths >= 0).all():  # NaN is neither
        return None
    ends = lengths.cumsum()
    starts = (ends - lengths)[1::2]
    starts, lasts = starts[lengths[1::2] > 0], ends[1::2][lengths[1::2] > 0] - 1
    if not len(starts):
        return None
    is_in_one_column = starts // height == lasts // height
    tops = np.where(is_in_one_column, starts % height, 0)
    bottoms = np.where(is_in_one_column, lasts % height + 1, height)
    left, right = (starts // height).min(), (lasts // height).max() + 1
    return [float(value) for value in (left, tops.min(), right, bottoms.max())]


def _decompressed(text: str | bytes) -> list[int] | None:
    """Reads pycocotools' compressed run lengths; None for what is none.

    Its own decoder, in C, reads on behind a text that was cut inside a number.
    """
    lengths: list[int] = []
    value = shift = 0
    for code in text if isinstance(text, bytes) else text.encode("ascii", "replace"):
        group = code - 48
        value |= (group & 31) << shift
        shift += 5
        if shift > _MAX_BITS or not 0 <= group < 64:
            return None
        if group & 32:
            continue
        if group & 16:  # a negative number
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return None if shift else lengths
