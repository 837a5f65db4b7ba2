"""Draws boxes and labels on images: for contact sheets, the command line, the demo and reports."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from cloc_mllm.data.images import ImageSource, open_image
from cloc_mllm.data.records import Record
from cloc_mllm.geometry import Boxes

Rgb = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# distinct for most colour-blind readers, and dark enough for white text
PALETTE: tuple[Rgb, ...] = (
    (214, 39, 40),
    (31, 119, 180),
    (35, 130, 35),
    (148, 80, 190),
    (196, 90, 0),
    (0, 121, 129),
    (190, 30, 120),
    (110, 75, 60),
    (70, 70, 180),
    (105, 110, 0),
)
_LABEL_CHARACTERS = 40
_SHEET_GAP_PX = 12


def region_color(index: int) -> Rgb:
    """The colour of region `index` of an image."""
    return PALETTE[index % len(PALETTE)]


def draw_regions(
    image: ImageSource,
    boxes: Boxes,
    labels: Sequence[str],
    *,
    colors: Sequence[Rgb] | None = None,
    long_side: int = 640,
) -> Image.Image:
    """Draws every box with its label on a copy of the image, its long side `long_side` px.

    Args:
        image: what `open_image` takes.
        boxes: R boxes, normalised or in pixels of the upright picture.
        labels: R texts; "" draws the box alone.
        colors: R colours; by default `region_color` of each.

    Raises:
        ValueError: there are not as many labels as boxes.
    """
    if len(labels) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes need as many labels, got {len(labels)}")
    picture = open_image(image)
    boxes.check_not_turned(*picture.size)
    colors = colors or [region_color(index) for index in range(len(boxes))]
    scale = long_side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    canvas = picture.resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(long_side / 250))
    outlines = [_ordered(box) for box in boxes.to_normalized().to_pixels(*size).xyxy.tolist()]
    for (x1, y1, x2, y2), color in zip(outlines, colors, strict=True):
        halo = (x1 - 1, y1 - 1, x2 + 1, y2 + 1)
        pen.rectangle(halo, outline="white", width=line + 2)
        pen.rectangle((x1, y1, x2, y2), outline=color, width=line)
    taken: list[Rectangle] = []
    for outline, label, color in zip(outlines, labels, colors, strict=True):
        if label:
            taken.append(_draw_label(pen, outline, _shortened(label), color, taken))
    return canvas


def draw_record(record: Record) -> Image.Image:
    """Draws a record's image with its boxes and phrases; boxes of one group share a colour."""
    groups: dict[str, int] = {}
    colors = [
        region_color(groups.setdefault(region.group or f"region {index}", len(groups)))
        for index, region in enumerate(record.regions)
    ]
    boxes = Boxes.normalized([region.box for region in record.regions])
    phrases = [region.phrase for region in record.regions]
    return draw_regions(record.load_image(), boxes, phrases, colors=colors)


def _ordered(box: Sequence[float]) -> Rectangle:
    """Puts the corners in order: an inverted box that a model answered is drawn as well."""
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    outline: Rectangle,
    text: str,
    color: Rgb,
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Draws a tag at the box, clear of the `taken` tags if it can, and returns its place."""
    font = _font(max(12, round(max(pen.im.size) / 36)))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    margin = 3
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x, y = min(
        _label_places(outline, width, height, pen.im.size),
        key=lambda place: sum(_overlap(place, width, height, other) for other in taken),
    )
    rectangle = x, y, x + width, y + height
    pen.rectangle(rectangle, fill=color)
    pen.text((x + margin - left, y + margin - top), text, fill="white", font=font)
    return rectangle


def _label_places(
    outline: Rectangle, width: float, height: float, canvas_wh: tuple[int, int]
) -> list[tuple[float, float]]:
    """Lists top-left corners for a tag, best first: above, below, inside at the top or bottom."""
    x1, y1, x2, y2 = outline
    right, bottom = max(0, canvas_wh[0] - width), max(0, canvas_wh[1] - height)
    places = [(x, y) for y in (y1 - height, y2, y1, y2 - height) for x in (x1, x2 - width)]
    whole = [(x, y) for x, y in places if 0 <= x <= right and 0 <= y <= bottom]
    pushed = [(min(max(0, x), right), min(max(0, y), bottom)) for x, y in places]
    return whole + pushed


def _overlap(place: tuple[float, float], width: float, height: float, other: Rectangle) -> float:
    """The area that a tag at `place` would share with another."""
    x, y = place
    across = min(x + width, other[2]) - max(x, other[0])
    down = min(y + height, other[3]) - max(y, other[1])
    return max(0.0, across) * max(0.0, down)


def contact_sheet(
    pictures: Sequence[Image.Image], titles: Sequence[str], columns: int = 4
) -> Image.Image:
    """Lays pictures in rows of `columns`, each under its title."""
    if not pictures or len(pictures) != len(titles):
        raise ValueError(
            f"a sheet needs pictures and as many titles, got {len(pictures)} and {len(titles)}"
        )
    cell_w = max(picture.width for picture in pictures)
    font = _font(max(12, cell_w // 40))
    title_h = sum(font.getmetrics()) + 4
    rows = [range(i, min(i + columns, len(pictures))) for i in range(0, len(pictures), columns)]
    row_h = [title_h + max(pictures[i].height for i in row) + _SHEET_GAP_PX for row in rows]
    width = min(columns, len(pictures)) * (cell_w + _SHEET_GAP_PX) + _SHEET_GAP_PX
    sheet = Image.new("RGB", (width, sum(row_h) + _SHEET_GAP_PX), "white")
    pen = ImageDraw.Draw(sheet)
    y = _SHEET_GAP_PX
    for row, height in zip(rows, row_h, strict=True):
        for column, index in enumerate(row):
            x = _SHEET_GAP_PX + column * (cell_w + _SHEET_GAP_PX)
            pen.text((x, y), _fitted(titles[index], font, cell_w), fill="black", font=font)
            sheet.paste(pictures[index], (x, y + title_h))
        y += height
    return sheet


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LABEL_CHARACTERS else text[: _LABEL_CHARACTERS - 1] + "…"


def _fitted(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    fitted = text
    while fitted and font.getlength(fitted) > width_px:
        fitted = fitted[:-2].rstrip() + "…" if len(fitted) > 2 else ""
    return fitted


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("Pillow was built without FreeType, so no text can be drawn")
    return font
