"""What a visitor draws on the picture: a box, a point or a scribble.

Nothing here imports Gradio or a model. Coordinates are x and y, normalised to the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from cloc_mllm.box import Box
from cloc_mllm.demo.pictures import MIN_BOX_PX

StrokeKind = Literal["box", "point", "scribble"]
MAX_POINTS = 500
_TAP_SHARE = 0.2  # of the shorter side: the square that stands for a tap
_PEN_SHARE = 0.02  # of the longer side: the thickness of a scribble


@dataclass(frozen=True)
class Stroke:
    """What a visitor drew.

    Args:
        points: normalised x and y: two opposite corners of a box, one point, or a scribble's path.
    """

    kind: StrokeKind
    points: tuple[tuple[float, float], ...]

    def mask(self, image_wh: tuple[int, int]) -> np.ndarray:
        """Returns a scribble as bool[H, W]."""
        width, height = image_wh
        canvas = Image.new("1", image_wh)
        pen = ImageDraw.Draw(canvas)
        path = [(x * (width - 1), y * (height - 1)) for x, y in self.points]
        thickness = max(3, round(_PEN_SHARE * max(image_wh)))
        pen.line(path, fill=1, width=thickness, joint="curve")
        return np.asarray(canvas)

    def box(self, image_wh: tuple[int, int]) -> Box:
        """Returns the box, the box around a scribble, or for a point a square around it."""
        if self.kind == "point":
            half = [_TAP_SHARE * min(image_wh) / side / 2 for side in image_wh]
            (point,) = self.points
            low = [min(max(v - h, 0), 1 - 2 * h) for v, h in zip(point, half, strict=True)]
            return low[0], low[1], low[0] + 2 * half[0], low[1] + 2 * half[1]
        xs, ys = zip(*self.points, strict=True)
        pen_px = 0.0 if self.kind == "box" else _PEN_SHARE * max(image_wh)  # a line has no area
        x_pad, y_pad = (pen_px / 2 / side for side in image_wh)
        return (
            max(0.0, min(xs) - x_pad),
            max(0.0, min(ys) - y_pad),
            min(1.0, max(xs) + x_pad),
            min(1.0, max(ys) + y_pad),
        )

    def region(self, image_wh: tuple[int, int]) -> Any:
        """Returns it as `models.region_like.RegionLike`."""
        if self.kind == "point":
            return list(self.points[0])
        return list(self.box(image_wh)) if self.kind == "box" else self.mask(image_wh)


def read_stroke(event: Any, image_wh: tuple[int, int]) -> Stroke:
    """Reads a `drawn` event, which comes from the network and may hold anything.

    Raises:
        ValueError: it is not something that the surface draws; says what.
    """
    fault = "the drawing cannot be read; draw again inside the picture"
    if not isinstance(event, dict) or event.get("kind") not in get_args(StrokeKind):
        raise ValueError(fault)
    kind, given = event["kind"], event.get("points")
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_POINTS:
        raise ValueError(fault)
    points = []
    for point in given:
        numbers = isinstance(point, list) and len(point) == 2
        if not numbers or not all(isinstance(v, int | float) for v in point):
            raise ValueError(fault)
        if not all(0 <= v <= 1 for v in point):
            raise ValueError(fault)
        points.append((float(point[0]), float(point[1])))
    if kind == "point":
        points = points[-1:]
    if kind == "box":
        points = [points[0], points[-1]]
        sides = [abs(a - b) * side for a, b, side in zip(*points, image_wh, strict=True)]
        if min(sides) < MIN_BOX_PX:
            raise ValueError("the box is too thin; drag from one corner to the opposite one")
    return Stroke(kind, tuple(points))
