"""The pictures of the page: uploads and examples.

Nothing here imports Gradio or a model. Boxes are xyxy, normalised to the picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from cloc_mllm.box import Box
from cloc_mllm.data.example_photos import example_photos, photo_credits
from cloc_mllm.data.expressions import expression_kind
from cloc_mllm.data.images import open_image
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.scenes import generate_scenes

MAX_SIDE_PX = 1024  # larger pictures are shown (and read) at this size
MIN_BOX_PX = 4.0
_MAX_SUGGESTIONS = 4
_NUM_SCENES = 4

PictureKind = Literal["photos", "scenes"]


@dataclass(frozen=True)
class Picture:
    """A picture of one visitor.

    Args:
        image: upright RGB, its longer side at most `MAX_SIDE_PX`.
        key: a hash of the pixels; equal pictures share one encoding.
        suggestions: referring expressions that have an answer here; empty for uploads.
        references: the true box of some phrases.
        caption: what is in it; "" for uploads.
        credit: the address of its page and its licence; None where none is due.
    """

    image: Image.Image
    key: str
    suggestions: tuple[str, ...] = ()
    references: tuple[tuple[str, Box], ...] = ()
    caption: str = ""
    credit: tuple[str, str] | None = None


def new_picture(
    image: Image.Image, record: Record | None = None, credit: tuple[str, str] | None = None
) -> Picture:
    """Shrinks an upright RGB image to `MAX_SIDE_PX` and names it by its pixels.

    Args:
        record: what is known about the image.
    """
    if max(image.size) > MAX_SIDE_PX:
        image = image.copy()
        image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.BICUBIC)
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes())
    if record is None:
        return Picture(image, digest.hexdigest())
    references = [
        (text, region.box) for region in record.regions for text in expressions_of([region])
    ]
    caption = record.captions[0] if record.captions else ""
    return Picture(image, digest.hexdigest(), suggest(record), tuple(references), caption, credit)


def open_picture(path: str | Path) -> Picture:
    """Reads an uploaded file. Raises `ImageError`, a `ValueError`, for one that cannot be used."""
    return new_picture(open_image(Path(path), name="your upload"))


def example_pictures(first: PictureKind = "photos") -> list[Picture]:
    """Makes pictures with things to ask for: the shipped photos and a few scenes of the test split.

    Args:
        first: the kind that comes first.
    """
    credits = photo_credits()
    photos = [
        new_picture(photo.load_image(), photo, credits[photo.id]) for photo in example_photos()
    ]
    scenes = [
        new_picture(record.load_image(), record)
        for record in generate_scenes(_NUM_SCENES, split="test", long_side=512)
    ]
    return photos + scenes if first == "photos" else scenes + photos


def expressions_of(regions: Sequence[Region]) -> list[str]:
    """Lists what regions are called: their expressions, or else their phrases."""
    return [text for region in regions for text in (region.expressions or [region.phrase])]


def suggest(record: Record) -> tuple[str, ...]:
    """Picks a few texts of a record; expressions of as many kinds (size, relation) as it has."""
    expressions = expressions_of(record.regions)
    if not any(region.expressions for region in record.regions):
        return tuple(dict.fromkeys(expressions))[:_MAX_SUGGESTIONS]
    by_kind = {expression_kind(text): text for text in expressions}
    varied = [*by_kind.values(), *expressions]
    return tuple(dict.fromkeys(varied))[:_MAX_SUGGESTIONS]
