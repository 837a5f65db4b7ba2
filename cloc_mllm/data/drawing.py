"""Draws boxes and labels on images: for contact sheets, the command line, the demo and reports."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from cloc_mllm.data.chats import Chat, Piece
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
_CHAT_FONT_PX = 18
_CHAT_LINES = 24
# fonts of systems that have the characters of most languages, by their files
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "DroidSansFallbackFull.ttf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "uming.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "unifont.ttf",
    "DejaVuSans.ttf",
)
_NO_CHARACTER = "\uffff"
_ROLE_COLORS: dict[str, Rgb] = {
    "system": (90, 90, 90),
    "user": (20, 60, 140),
    "assistant": (20, 20, 20),
}


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


def draw_chat(chat: Chat) -> Image.Image:
    """Draws a chat: its images with numbered boxes and points, and its turns below them.

    A place has one number and one colour in the images and in the text. A long chat is cut, and the
    drawing says how many turns are left out.
    """
    numbers = {id(piece): number for number, piece in enumerate(chat.places, 1)}
    pictures = [
        _draw_places(image.load_image(), index, chat, numbers)
        for index, image in enumerate(chat.images)
    ]
    pictures = pictures or [Image.new("RGB", (640, 1), "white")]
    strip = contact_sheet(pictures, [""] * len(pictures), columns=min(2, len(pictures)))
    strip = strip if chat.images else strip.crop((0, 0, strip.width, 1))
    font = _font_for("".join(turn.text for turn in chat.turns[:_CHAT_LINES]), _CHAT_FONT_PX)
    lines = _lines_of(chat, numbers, font, strip.width - 2 * _SHEET_GAP_PX)
    line_h = sum(font.getmetrics()) + 3
    drawn = Image.new("RGB", (strip.width, strip.height + line_h * len(lines) + 8), "white")
    drawn.paste(strip, (0, 0))
    pen = ImageDraw.Draw(drawn)
    for row, (text, color) in enumerate(lines):
        pen.text((_SHEET_GAP_PX, strip.height + row * line_h), text, fill=color, font=font)
    return drawn


def _draw_places(
    picture: Image.Image, index: int, chat: Chat, numbers: dict[int, int]
) -> Image.Image:
    places = [piece for piece in chat.places if piece.image == index]
    boxes, labels, colors = [], [], []
    for piece in places:
        number = numbers[id(piece)]
        x_side, y_side = 5 / picture.width, 5 / picture.height
        dots = [(x - x_side, y - y_side, x + x_side, y + y_side) for x, y in piece.points]
        for box in (*piece.boxes, *dots):
            boxes.append(box)
            labels.append(f"{number} {piece.phrase}".rstrip())
            colors.append(region_color(number - 1))
    return draw_regions(picture, Boxes.normalized(boxes), labels, colors=colors)


def _lines_of(
    chat: Chat, numbers: dict[int, int], font: ImageFont.FreeTypeFont, width_px: int
) -> list[tuple[str, Rgb]]:
    """The turns as lines of this width, each place as `{number}`."""
    lines: list[tuple[str, Rgb]] = []
    for number, turn in enumerate(chat.turns):
        if len(lines) > _CHAT_LINES:
            lines.append((f"... and {len(chat.turns) - number} more turns", (90, 90, 90)))
            break
        text = "".join(_shown_piece(piece, numbers) for piece in turn.pieces)
        rows = _wrapped(_writable(f"{turn.role}: {text}", font), font, width_px)[:_CHAT_LINES]
        lines += [(row, _ROLE_COLORS[turn.role]) for row in rows]
    return lines


def _shown_piece(piece: Piece, numbers: dict[int, int]) -> str:
    if piece.kind == "image":
        return f"(image {piece.image + 1}) "
    mark = f"{{{numbers[id(piece)]}}}" if id(piece) in numbers else ""
    return " ".join(filter(None, (piece.phrase, mark))) if piece.kind == "place" else piece.text


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """Breaks a text at blanks, and where there is none at any character."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px:
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:
            if font.getlength(lines[-1] + character) > width_px:
                lines.append("")
            lines[-1] += character
    return lines


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
    font = _font_for(text, max(12, round(max(pen.im.size) / 36)))
    text = _writable(text, font)
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
    font = _font_for("".join(titles), max(12, cell_w // 40))
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
            pen.text(
                (x, y),
                _fitted(_writable(titles[index], font), font, cell_w),
                fill="black",
                font=font,
            )
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


def _font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The default font, or else the first of the machine's that has every character."""

    def has_all(font: ImageFont.FreeTypeFont) -> bool:
        return all(_has_glyph(font, character) for character in set(text))

    default = _font(size)
    wide = (font for name in _WIDE_FONTS if (font := _system_font(name, size)) is not None)
    return default if has_all(default) else next(filter(has_all, wide), default)


def _writable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Writes characters that the font lacks as Python escapes, not as empty boxes."""
    return "".join(
        character
        if _has_glyph(font, character)
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


@lru_cache(maxsize=4096)
def _has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    if character.isspace():
        return True
    if "\ud800" <= character <= "\udfff":  # half a character, which UTF-8 cannot write
        return False

    def drawn(one: str) -> bytes:
        image = Image.new("L", (round(2 * font.size), round(2 * font.size)))
        ImageDraw.Draw(image).text((0, 0), one, fill=255, font=font)
        return image.tobytes()

    return drawn(character) != drawn(_NO_CHARACTER)


@lru_cache(maxsize=64)
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # not on this machine
        return None


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ValueError("Pillow was built without FreeType, so no text can be drawn")
    return font
