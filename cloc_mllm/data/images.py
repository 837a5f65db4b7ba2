"""The one place that turns an encoded file into pixels, guarded against hostile files."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_PIXELS = 64_000_000  # checked in the header, before any pixel is decoded
# At this ratio a resized draft differs from a resized full decode by as much (1.3 grey levels) as
# a bilinear from a bicubic resize; at 1.1 by 1.7, at 2 by 0.6 (640 px photos, mean over pixels).
DRAFT_MARGIN = 1.25

_ORIENTATION_TAG = 0x0112
_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# what Pillow's decoders raise on damaged files
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)
_BOMB_ERRORS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that cannot be used. `reason` is the key it is counted under.

    With one argument it takes a ready message: so a `DataLoader` raises a worker's error again.
    """

    def __init__(self, name: str, reason: str = "", detail: str = "") -> None:
        message = f"image of {name!r} cannot be used ({reason}): {detail}" if reason else name
        super().__init__(message)
        self.reason = reason


def decode_image(data: bytes, name: str, wanted_side: int | None = None) -> Image.Image:
    """Encoded file -> RGB image, upright by its EXIF tag, transparency on white.

    Args:
        data: a whole JPEG, PNG or WebP file; of an animation the first frame is taken.
        name: what an error calls the image: a record id or a path.
        wanted_side: length in pixels that the long side will be resized to. A JPEG may then come
            at 1/2, 1/4 or 1/8 of its size (each side rounded up), which `Letterbox.apply` takes
            as well as the full image: about half the time for a slightly softer picture.

    Raises:
        ImageError: reason `missing_image` (no bytes), `not_an_image` (another format, an HTML
            page named .jpg), `image_too_large` (over `MAX_IMAGE_PIXELS`) or `broken_image`.
    """
    if not data:
        raise ImageError(name, "missing_image", "there is no image file")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        num_pixels = image.width * image.height
        if num_pixels <= MAX_IMAGE_PIXELS:
            if wanted_side is not None:
                _draft(image, wanted_side)
            image.load()
            return _upright(_as_rgb(image), _turn(image))
    except UnidentifiedImageError as error:
        expected = ", ".join(IMAGE_FORMATS)
        raise ImageError(name, "not_an_image", f"expected {expected}; it is none") from error
    except _BOMB_ERRORS as error:
        raise ImageError(name, "image_too_large", str(error)) from error
    except _DECODE_ERRORS as error:
        raise ImageError(name, "broken_image", str(error)) from error
    raise ImageError(
        name, "image_too_large", f"{num_pixels:,} pixels, the limit is {MAX_IMAGE_PIXELS:,}"
    )


def upright_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) as `decode_image` gives them, from the header alone; None for no image."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except (*_DECODE_ERRORS, *_BOMB_ERRORS):
        return None
    width, height = image.size
    sideways = (Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE)
    turned = (*sideways, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)
    return (height, width) if _turn(image) in turned else (width, height)


def _draft(image: Image.Image, wanted_side: int) -> None:
    """Lets a JPEG be decoded smaller; does nothing to other formats."""
    for reduction in (8, 4, 2):
        # the decoder fills up the last column and row, and a turn would bring them to the front
        movable = _turn(image) is None or not any(side % reduction for side in image.size)
        if movable and max(image.size) >= reduction * DRAFT_MARGIN * wanted_side:
            image.draft(None, (image.width // reduction, image.height // reduction))
            return


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # Pillow copies the EXIF block: whoever reads its tag would turn once more
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:  # an unreadable EXIF block states no orientation; the pixels are whole
        return None
    return _UNDO_ORIENTATION.get(orientation) if isinstance(orientation, int) else None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip at 255, not scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
