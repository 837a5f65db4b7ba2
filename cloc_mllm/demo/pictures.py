"""The picture on the demo's page and the box being drawn on it.

All functions depend on their arguments alone; nothing imports Gradio or a model.
Boxes are xyxy, normalised to the picture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw

from cloc_mllm.box import Box
from cloc_mllm.data.drawing import Rgb, draw_regions
from cloc_mllm.data.example_photos import example_photos
from cloc_mllm.data.expressions import expression_kind
from cloc_mllm.data.images import open_image
from cloc_mllm.data.records import Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.geometry import Boxes

MAX_SIDE_PX = 1024  # larger pictures are shown (and read) at this size
MIN_BOX_PX = 4.0
_MAX_SUGGESTIONS = 4

_VISITOR_COLOR: Rgb = (30, 41, 59)


@dataclass(frozen=True)
class Picture:
    """A picture of one visitor.

    Args:
        image: upright RGB, its longer side at most `MAX_SIDE_PX`.
        key: a hash of the pixels; equal pictures share one encoding.
        suggestions: referring expressions that have an answer here; empty for uploads.
        corner: the first click of a box, normalised; None when no box is being drawn.
        box: the finished box.
    """

    image: Image.Image
    key: str
    suggestions: tuple[str, ...] = ()
    corner: tuple[float, float] | None = None
    box: Box | None = None


class Outline(NamedTuple):
    """A box to draw, its colour and its tag."""

    box: Box
    color: Rgb
    tag: str


def new_picture(image: Image.Image, suggestions: Sequence[str] = ()) -> Picture:
    """Shrinks an upright RGB image to `MAX_SIDE_PX` and names it by its pixels."""
    if max(image.size) > MAX_SIDE_PX:
        image = image.copy()
        image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.BICUBIC)
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes())
    return Picture(image=image, key=digest.hexdigest(), suggestions=tuple(suggestions))


def open_picture(path: str | Path) -> Picture:
    """Reads an uploaded file. Raises `ImageError`, a `ValueError`, for one that cannot be used."""
    return new_picture(open_image(Path(path), name="your upload"))


def example_pictures(
    num_pictures: int, kind: Literal["scenes", "photos"] = "scenes"
) -> list[Picture]:
    """Makes pictures with things to ask for: large scenes of the test split, or shipped photos."""
    if kind == "photos":
        photos = example_photos()[:num_pictures]
        return [
            new_picture(photo.load_image(), [region.phrase for region in photo.regions])
            for photo in photos
        ]
    records = generate_scenes(num_pictures, split="test", long_side=512)
    return [new_picture(record.load_image(), suggest(record)) for record in records]


def suggest(record: Record) -> tuple[str, ...]:
    """Picks a few expressions of a record, of as many kinds (size, order, relation) as it has."""
    expressions = [text for region in record.regions for text in region.expressions]
    by_kind = {expression_kind(text): text for text in expressions}
    varied = [*by_kind.values(), *expressions]
    return tuple(dict.fromkeys(varied))[:_MAX_SUGGESTIONS]


def click(picture: Picture, x_px: float, y_px: float) -> Picture:
    """Takes a click: the first marks a corner, the second completes the box, the third starts anew.

    Raises:
        ValueError: the click is not inside the picture, or both corners nearly coincide.
    """
    width, height = picture.image.size
    if not (_inside(x_px, width) and _inside(y_px, height)):
        raise ValueError(f"the click is outside the {width} x {height} picture; click inside it")
    x, y = x_px / width, y_px / height
    if picture.corner is None:
        return replace(picture, corner=(x, y), box=None)
    (x0, y0) = picture.corner
    if min(abs(x - x0) * width, abs(y - y0) * height) < MIN_BOX_PX:
        raise ValueError("the two corners nearly coincide; click the opposite corner of the box")
    return replace(picture, corner=None, box=(min(x0, x), min(y0, y), max(x0, x), max(y0, y)))


def _inside(value: float, size: int) -> bool:
    return math.isfinite(value) and 0 <= value <= size


def clear_box(picture: Picture) -> Picture:
    return replace(picture, corner=None, box=None)


def draw(picture: Picture, outlines: Sequence[Outline] = ()) -> Image.Image:
    """Draws the visitor's own box or corner and `outlines` on a copy of the picture."""
    if picture.box is not None:
        outlines = [Outline(picture.box, _VISITOR_COLOR, "your box"), *outlines]
    canvas = draw_regions(
        picture.image,
        Boxes.normalized([outline.box for outline in outlines]),
        [outline.tag for outline in outlines],
        colors=[outline.color for outline in outlines],
        long_side=max(picture.image.size),
    )
    if picture.corner is not None:
        _draw_corner(canvas, picture.corner)
    return canvas


def _draw_corner(canvas: Image.Image, corner: tuple[float, float]) -> None:
    """Draws a dot on the corner and hair lines through it, to aim the second click."""
    pen = ImageDraw.Draw(canvas)
    x, y = corner[0] * canvas.width, corner[1] * canvas.height
    for thickness, color in ((3, "white"), (1, _VISITOR_COLOR)):
        pen.line((x, 0, x, canvas.height), fill=color, width=thickness)
        pen.line((0, y, canvas.width, y), fill=color, width=thickness)
    radius = max(5, max(canvas.size) / 70)
    circle = (x - radius, y - radius, x + radius, y + radius)
    pen.ellipse(circle, fill=_VISITOR_COLOR, outline="white", width=2)
