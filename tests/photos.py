"""Photos as cameras store them: turned, with the EXIF orientation tag that says how."""

from __future__ import annotations

import io

from PIL import Image

ORIENTATION_TAG = 0x0112
# how a camera that writes this tag has turned the upright photo (EXIF 2.32, tag 0x0112)
TURN_BY_ORIENTATION = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # counter-clockwise, so clockwise again to display
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(upright: Image.Image, orientation: int) -> Image.Image:
    """The picture as a camera that writes this orientation stores it."""
    turn = TURN_BY_ORIENTATION.get(orientation)
    return upright if turn is None else upright.transpose(turn)


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[ORIENTATION_TAG] = orientation
    return block.tobytes()


def encoded(
    upright: Image.Image,
    image_format: str = "PNG",
    *,
    orientation: int | None = None,
    **options: object,
) -> bytes:
    """An image file that shows `upright` once it is turned by its tag; None writes no tag."""
    stored = upright
    if orientation is not None:
        stored = turned(upright, orientation)
        options["exif"] = exif(orientation)
    file = io.BytesIO()
    stored.save(file, image_format, **options)
    return file.getvalue()
