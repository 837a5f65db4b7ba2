"""Draws prompts other than boxes as small masks: points, scribbles, masks and sets of boxes.

A mask is float32[MASK_SIZE, MASK_SIZE], 0 or 1, over the model's canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MASK_SIZE = 64
ShapeKind = Literal["point", "scribble", "mask"]
SHAPE_KINDS: tuple[ShapeKind, ...] = ("point", "scribble", "mask")
Point = tuple[float, float]

# lengths in shares of the box's sides
_POINT_SPREAD = 0.15  # standard deviation of a point around the centre
_INNER = (0.1, 0.9)  # a scribble's three control points lie between these
_CORNERS = 12  # corners of a scribble, and of a mask's outline
_RADII = (0.6, 1.0)  # a mask's outline lies between these, in half sides


def sample_shape(kind: ShapeKind, box: Sequence[float], rng: np.random.Generator) -> Tensor:
    """Draws a shape as a person might, to mean the thing in a box.

    Args:
        kind: a `point` near the centre, a curved `scribble`, or a `mask` that roughly fills it.
        box: xyxy, canvas frame.
    """
    if kind == "point":
        at = np.clip(rng.normal(0.5, _POINT_SPREAD, (1, 2)), 0, 1)
        return points_mask(_inside(box, at))
    if kind == "scribble":
        start, bend, end = rng.uniform(*_INNER, (3, 1, 2))
        t = np.linspace(0, 1, _CORNERS)[:, None]
        return line_mask(_inside(box, (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end))
    angles = np.arange(_CORNERS) * 2 * np.pi / _CORNERS
    around = np.stack([np.cos(angles), np.sin(angles)], 1)
    return polygon_mask(_inside(box, 0.5 + around * rng.uniform(*_RADII, (_CORNERS, 1)) / 2))


def points_mask(points: Sequence[Point]) -> Tensor:
    """Marks points (x, y), canvas frame."""
    return _drawn(lambda draw: draw.point([_pixel(p) for p in points], fill=1))


def line_mask(points: Sequence[Point]) -> Tensor:
    """Draws a scribble through points (x, y), canvas frame."""
    return _drawn(lambda draw: draw.line([_pixel(p) for p in points], fill=1))


def polygon_mask(points: Sequence[Point]) -> Tensor:
    """Fills the outline through points (x, y), canvas frame."""
    return _drawn(lambda draw: draw.polygon([_pixel(p) for p in points], fill=1, outline=1))


def boxes_mask(boxes: Sequence[Sequence[float]]) -> Tensor:
    """Fills several boxes (xyxy, canvas frame) that are one region."""

    def draw_all(draw: ImageDraw.ImageDraw) -> None:
        for x1, y1, x2, y2 in boxes:
            draw.rectangle([_pixel((x1, y1)), _pixel((x2, y2))], fill=1)

    return _drawn(draw_all)


def _inside(box: Sequence[float], at: np.ndarray) -> list[Point]:
    """Moves points from shares of the box's sides to the canvas frame."""
    x1, y1, x2, y2 = box
    return [(float(x1 + x * (x2 - x1)), float(y1 + y * (y2 - y1))) for x, y in at]


def _pixel(point: Point) -> tuple[int, int]:
    x, y = (min(MASK_SIZE - 1, max(0, int(value * MASK_SIZE))) for value in point)
    return x, y


def _drawn(draw_on: Callable[[ImageDraw.ImageDraw], None]) -> Tensor:
    canvas = Image.new("L", (MASK_SIZE, MASK_SIZE))
    draw_on(ImageDraw.Draw(canvas))
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32))
