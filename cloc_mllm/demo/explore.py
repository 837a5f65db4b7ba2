"""Looks into the encoder: where a phrase is similar, what a region is close to, where it recurs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from cloc_mllm.box import Box
from cloc_mllm.demo.engine import DemoEngine, checked_phrase
from cloc_mllm.demo.pictures import Picture
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.geometry import Boxes

_WINDOW_SHARES = (1, 2 / 3, 1 / 2, 1 / 3)  # of the picture's sides
_COLD, _HOT = (8, 20, 80), (255, 120, 0)
_COLD_ALPHA, _HOT_ALPHA = 190, 140
_HEAT_SIDE_PX = 256


class Heat(NamedTuple):
    """A heat map to lay over a picture.

    Attributes:
        overlay: RGBA; dark blue is `lowest`, orange `highest`, between them it is clear.
        lowest, highest: cosines of the phrase and the picture's tokens.
    """

    overlay: Image.Image
    lowest: float
    highest: float


class Readings(NamedTuple):
    """The cosines of one region and each name, by each way to embed the region."""

    names: tuple[str, ...]
    cosines: dict[str, tuple[float, ...]]


class Hit(NamedTuple):
    """The most similar window of a picture, and its cosine to the region that was searched."""

    picture: Picture
    box: Box
    score: float


def heat_map(engine: DemoEngine, picture: Picture, phrase: str) -> Heat:
    """Shows where a picture is similar to a phrase. Raises `ValueError` for what is no phrase."""
    phrase = checked_phrase(phrase)
    with engine.cloc_image(picture) as image:
        cosines = engine.cloc.similarity_map(image, phrase).numpy()
    low, high = float(cosines.min()), float(cosines.max())
    share = (cosines - low) / max(high - low, 1e-6) * 2 - 1  # -1 cold .. 1 hot
    hot = share[..., None] > 0
    alpha = np.abs(share)[..., None] * np.where(hot, _HOT_ALPHA, _COLD_ALPHA)
    rgba = np.concatenate([np.where(hot, _HOT, _COLD), alpha], -1).astype(np.uint8)
    overlay = Image.fromarray(rgba, "RGBA")
    overlay.thumbnail((_HEAT_SIDE_PX, _HEAT_SIDE_PX))
    return Heat(overlay, low, high)


def compare_encoders(
    engine: DemoEngine, picture: Picture, stroke: Stroke, names: Sequence[str]
) -> Readings:
    """Compares a region with names as the model's own region encoder embeds it, and as CLIP's
    tokens alone do, pooled by RoI-Align or averaged."""
    if not names:
        raise ValueError("give at least one name to compare the region with")
    boxes = Boxes.normalized([stroke.box(picture.image.size)])
    with engine.cloc_image(picture) as image:
        texts = engine.cloc.embed_text(names)
        embedded = {
            engine.region_encoder_name: engine.cloc.embed_regions(image, boxes),
            "CLIP, RoI-Align": engine.cloc.pool_regions(image, boxes, "roi_align"),
            "CLIP, mean": engine.cloc.pool_regions(image, boxes, "mean"),
        }
        cosines = {way: tuple((z @ texts.T)[0].tolist()) for way, z in embedded.items()}
    return Readings(tuple(names), cosines)


def search(
    engine: DemoEngine, picture: Picture, stroke: Stroke, gallery: Sequence[Picture]
) -> list[Hit]:
    """Finds the window of each picture that is most similar to a region, the best picture first."""
    with engine.cloc_image(picture) as image:
        wanted = engine.cloc.embed_regions(
            image, Boxes.normalized([stroke.box(picture.image.size)])
        )
    windows = torch.tensor(_windows())
    hits = []
    for other in gallery:
        with engine.cloc_image(other) as image:
            cosines = engine.cloc.embed_regions(image, Boxes.normalized(windows)) @ wanted[0]
        best = int(cosines.argmax())
        left, top, right, bottom = windows[best].tolist()
        hits.append(Hit(other, (left, top, right, bottom), float(cosines[best])))
    return sorted(hits, key=lambda hit: -hit.score)


def _windows() -> list[Box]:
    """Lists windows of several sizes that overlap by half or more."""
    windows = []
    for share in _WINDOW_SHARES:
        steps = math.ceil((1 - share) / (share / 2))
        starts = [(1 - share) * step / max(steps, 1) for step in range(steps + 1)]
        windows += [(x, y, x + share, y + share) for y in starts for x in starts]
    return windows
