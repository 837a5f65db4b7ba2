"""The one place that turns an encoded file into pixels, guarded against hostile files."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_PIXELS = 64_000_000  # checked in the header, before any pixel is decoded

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
    """An image that cannot be used. `reason` is the key it is counted under."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"image of {name!r} cannot be used ({reason}): {detail}")
        self.reason = reason


def decode_image(data: bytes, name: str) -> Image.Image:
    """Encoded file -> RGB image, upright by its EXIF tag, transparency on white.

    Args:
        data: a whole JPEG, PNG or WebP file; of an animation the first frame is taken.
        name: what an error calls the image: a record id or a path.

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
            image.load()
            return _as_rgb(_upright(image))
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


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:  # an unreadable EXIF block states no orientation; the pixels are whole
        return image
    undo = _UNDO_ORIENTATION.get(orientation) if isinstance(orientation, int) else None
    return image if undo is None else image.transpose(undo)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip at 255, not scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
