"""Opens images: a file, a PIL image or an array becomes an upright RGB picture.

Nothing else in the package calls `PIL.Image.open` or Transformers' `load_image`, so a picture has
the same pixels, and a box of it the same frame, wherever it is used.
"""

from __future__ import annotations

import io
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

ImageSource = Image.Image | str | Path | bytes | np.ndarray

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # formats that records hold, and that a user may send
# `storable` also reads these, from files on disk; each further format is a decoder to attack
CONVERTED_FORMATS = ("BMP", "GIF", "TIFF", "PPM", "AVIF", "HEIF")
FILE_FORMATS = IMAGE_FORMATS + CONVERTED_FORMATS
MAX_IMAGE_PIXELS = 64_000_000  # checked in the header, before any pixel is decoded
# A draft is this much larger than the wanted side, at least. It then differs from a resized full
# decode by 1.3 grey levels, as a bilinear from a bicubic resize; at a ratio of 1.1 by 1.7, at 2 by
# 0.6 (640 px photos, mean over pixels).
DRAFT_MARGIN = 1.25
_REDUCED_QUALITY = 90  # of JPEGs, 0 to 95
GREY_BITS = (8, 10, 12, 14, 16)  # the depths that cameras and scanners write

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
# the quarter turns, which exchange width and height
SIDEWAYS = tuple(_UNDO_ORIENTATION[orientation] for orientation in (5, 6, 7, 8))
# where a PNG can state an orientation, also behind its pixels
_PNG_ORIENTATION_KEYS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# what Pillow's decoders raise on damaged files
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)
# the start of a HEIC photo, after the length of its first box
_HEIC_BRANDS = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"hevc", b"mif1"))
_LOSSY_FORMATS = ("AVIF", "HEIF")  # saved as JPEG: a PNG would be ten times as large for nothing
_BOMB_ERRORS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image cannot be used. `reason` is the key under which it is counted.

    With one argument, that is the whole message: a `DataLoader` raises a worker's error so.
    """

    def __init__(self, name: str, reason: str = "", detail: str = "") -> None:
        message = f"image of {name!r} cannot be used ({reason}): {detail}" if reason else name
        super().__init__(message)
        self.reason = reason
        self.detail = detail


def open_image(
    source: ImageSource, *, name: str = "", wanted_side: int | None = None
) -> Image.Image:
    """Opens an image as an upright RGB picture.

    The same picture gives the same pixels, whichever way it comes. A picture that this returned is
    returned again as the same object. Boxes of a photo are in the frame of the returned picture.

    - An EXIF (or XMP) orientation is turned once, and the result carries no tag. A PIL image keeps
      its tag through resizing and cropping, so it is turned by it, too.
    - Transparency is laid on white.
    - Grey of more than 8 bits is scaled by its own depth: the smallest of `GREY_BITS` (or, above
      16, of any number of bits) that holds the brightest pixel. So 12 bits stored in 16 do not
      come out black.
    - CMYK JPEGs are read as Adobe writes them, inverted, as web browsers read them.
    - The first frame of an animation is taken.

    Args:
        source: a path, of a file of `FILE_FORMATS`; the bytes of a JPEG, PNG or WebP file; a PIL
            image; or a uint8 array of upright pixels, H x W (grey), H x W x 3 (RGB) or H x W x 4
            (RGBA).
        name: what an error calls the image, such as a record's id; by default its path.
        wanted_side: length in pixels that the long side will be resized to. A JPEG file may then
            come at 1/2, 1/4 or 1/8 of its size (each side rounded up), which
            `CanvasTransform.apply` takes as well as the full image: about half the time for a
            slightly softer picture.

    Raises:
        OSError: a path that cannot be read.
        ImageError: reason `missing_image` (no bytes), `not_an_image` (another format, an HTML
            page named .jpg, another kind of object), `image_too_large` (over `MAX_IMAGE_PIXELS`)
            or `broken_image`.
    """
    formats: tuple[str, ...] = IMAGE_FORMATS
    if isinstance(source, (str, Path)):
        name = name or str(source)
        source = _read(source, name)
        formats = FILE_FORMATS
    name = name or type(source).__name__
    image = _undecoded(source, name, formats)
    _check_size(image, name)
    try:
        if wanted_side is not None and isinstance(source, bytes):
            _draft(image, wanted_side)
        image.load()
        turn = _turn(image)
        if image is source and turn is None and _is_rgb(image):
            return image
        return _turned(_as_rgb(image), turn)
    except (*_DECODE_ERRORS, AssertionError) as error:  # the last: its file is closed already
        detail = str(error) or "its file was closed before its pixels were read"
        raise ImageError(name, "broken_image", f"{detail}; fetch or save it again") from error


class Header(NamedTuple):
    """The size and orientation that an image file states.

    Attributes:
        stored_wh: width and height in pixels of the picture as it is stored.
        turn: the turn that brings it upright; None if it is upright.
    """

    stored_wh: tuple[int, int]
    turn: Image.Transpose | None

    @property
    def upright_wh(self) -> tuple[int, int]:
        width, height = self.stored_wh
        return (height, width) if self.turn in SIDEWAYS else (width, height)


def read_header(
    data: bytes,
    max_pixels: int = MAX_IMAGE_PIXELS,
    formats: tuple[str, ...] = IMAGE_FORMATS,
) -> Header | None:
    """Reads the size and the turn of an image file, mostly from its header; None for no image.

    Pixels are decoded only for a PNG that may state an orientation behind them. More than
    `max_pixels` never are: the picture then counts as upright.
    """
    try:
        image = _open(data, formats)
    except (*_DECODE_ERRORS, *_BOMB_ERRORS):
        return None
    is_too_large = image.width * image.height > max_pixels
    is_plain = image.format == "PNG" and not any(key in data for key in _PNG_ORIENTATION_KEYS)
    turn = None if is_too_large or is_plain else _turn(image)
    if image.format == "TIFF" and turn in SIDEWAYS:  # Pillow states the upright size
        return Header((image.height, image.width), turn)
    return Header(image.size, turn)


DEEP_GREY = "images of 16-bit grey, whose brightness is scaled by their own depth"  # a note


def change_of(data: bytes, old_format: str) -> str:
    """Says, as a note, what a build changes in the picture of an image file; "" if nothing.

    Args:
        data, old_format: what `storable` returned.
    """
    is_png = data.startswith(b"\x89PNG")
    if old_format:
        return f"{old_format} images converted to {'PNG' if is_png else 'JPEG'}"
    is_deep_grey = is_png and data[24:26] == b"\x10\x00"  # bit depth and colour type of the header
    return DEEP_GREY if is_deep_grey else ""


def upright_size(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int] | None:
    """Reads the (width, height) of the picture that `open_image` gives; None for no image."""
    header = read_header(data, max_pixels)
    return None if header is None else header.upright_wh


def reduced(image: Image.Image, max_side: int) -> tuple[bytes, Image.Image]:
    """Reduces an upright RGB picture to a long side of `max_side` pixels.

    Returns:
        the JPEG file of it, of quality 90, and the smaller picture.
    """
    scale = max_side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    picture = image.resize(size, Image.Resampling.BICUBIC)
    picture.info = {}  # no EXIF: it is upright
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_REDUCED_QUALITY)
    return file.getvalue(), picture


def storable(data: bytes, *, name: str = "") -> tuple[bytes, str]:
    """Converts an image file of a build to a format that records hold.

    JPEG, PNG and WebP files stay as they are, byte for byte. Files of `CONVERTED_FORMATS` become
    what `open_image` would show: the first frame, upright, transparency on white, grey scaled to 8
    bits. The new file is a PNG; for AVIF and HEIC photos, which are lossy themselves, a JPEG of
    quality 95.

    Returns:
        the file, and the name of its old format; "" if it stays as it is.

    Raises:
        ImageError: as `open_image` does.
    """
    image = _from_file(data, name, FILE_FORMATS)
    found = str(image.format)
    if found in IMAGE_FORMATS or data.startswith(b"\xff\xd8"):  # an MPO starts as its first JPEG
        return data, ""
    _refuse_floats(image, name)
    _check_size(image, name)
    try:
        image.load()
        turn = _turn(image)
        picture = _as_rgb(image)
    except (*_DECODE_ERRORS, AssertionError) as error:
        detail = f"{error}; fetch or save it again"
        raise ImageError(name, "broken_image", detail) from error
    picture.info = {}
    options: dict[str, Any] = {}
    if turn is not None:
        exif = Image.Exif()
        exif[_ORIENTATION_TAG] = next(
            tag for tag, undo in _UNDO_ORIENTATION.items() if undo is turn
        )
        options["exif"] = exif
    file = io.BytesIO()
    if found in _LOSSY_FORMATS:
        picture.save(file, "JPEG", quality=95, subsampling=0, **options)
    else:
        picture.save(file, "PNG", **options)
    return file.getvalue(), "HEIC" if found == "HEIF" else found


def stretched(data: bytes, shape_wh: tuple[float, float], *, name: str = "") -> bytes:
    """Gives the picture of an image file the shape width : height, making no side shorter.

    A JPEG becomes a JPEG of quality 95, anything else a PNG. A file that cannot be opened is
    returned as it is.
    """
    try:
        data, _ = storable(data, name=name)
        image = open_image(data, name=name)
    except ImageError:
        return data  # `validate_record` refuses it
    scale = max(image.width / shape_wh[0], image.height / shape_wh[1])
    size = round(shape_wh[0] * scale), round(shape_wh[1] * scale)
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        return data
    file = io.BytesIO()
    resized = image.resize(size, Image.Resampling.BICUBIC)
    if data.startswith(b"\xff\xd8"):
        resized.save(file, "JPEG", quality=95, subsampling=0)
    else:
        resized.save(file, "PNG")
    return file.getvalue()


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Opens a file of one of the formats; HEIC needs `pillow-heif`."""
    if formats != IMAGE_FORMATS:
        if is_heic(data) and find_spec("pillow_heif") is not None:
            from pillow_heif import register_heif_opener

            register_heif_opener()
        Image.init()
        formats = tuple(name for name in formats if name in Image.OPEN)
    return Image.open(io.BytesIO(data), formats=formats)


def is_heic(data: bytes) -> bool:
    return data[4:12] in _HEIC_BRANDS


def _read(path: str | Path, name: str) -> bytes:
    if "://" in str(path):
        detail = "addresses are not fetched; give a path or the file's bytes"
        raise ImageError(name, "missing_image", detail)
    return Path(path).read_bytes()


def _undecoded(source: object, name: str, formats: tuple[str, ...]) -> Image.Image:
    if isinstance(source, Image.Image):
        _refuse_floats(source, name)
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, bytes):
        return _from_file(source, name, formats)
    raise ImageError(
        name,
        "not_an_image",
        "expected a path, the bytes of an image file, a PIL image or a uint8 array, got "
        f"{type(source).__name__}",
    )


def _from_file(data: bytes, name: str, formats: tuple[str, ...]) -> Image.Image:
    if not data:
        raise ImageError(name, "missing_image", "there is no image file")
    try:
        return _open(data, formats)
    except UnidentifiedImageError as error:
        raise ImageError(name, "not_an_image", _what_else(data, formats)) from error
    except _BOMB_ERRORS as error:
        raise ImageError(name, "image_too_large", str(error)) from error
    except _DECODE_ERRORS as error:
        raise ImageError(name, "broken_image", str(error)) from error


def _what_else(data: bytes, formats: tuple[str, ...]) -> str:
    if is_heic(data) and "HEIF" in formats:
        return "it is a HEIC photo; run: pip install pillow-heif"
    expected = ", ".join(formats)
    return f"expected {expected}, got {_kind_of(data)}; convert it"


def _kind_of(data: bytes) -> str:
    if is_heic(data):
        return "a HEIC photo"
    try:
        kind = _open(data, FILE_FORMATS).format
        return f"{'an' if kind == 'AVIF' else 'a'} {kind} file"
    except (UnidentifiedImageError, *_BOMB_ERRORS, *_DECODE_ERRORS):
        start = data[:12].decode("latin-1")
        is_text = start.isascii() and start.isprintable()
        return f"a file that starts with {start!r}" if is_text else "a file of an unknown kind"


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not is_image:
        shape = " x ".join(map(str, pixels.shape))
        raise ImageError(
            name,
            "not_an_image",
            "expected a uint8 array H x W, H x W x 3 (RGB) or H x W x 4 (RGBA), got "
            f"{pixels.dtype} {shape or 'without a shape'}; scale floats to 0..255, and put the "
            "channels last",
        )
    return Image.fromarray(pixels)


def _refuse_floats(image: Image.Image, name: str) -> None:
    if image.mode == "F":
        detail = "its pixels are floats, whose white is unknown; scale them to 0..255, mode L"
        raise ImageError(name, "not_an_image", detail)


def _check_size(image: Image.Image, name: str) -> None:
    num_pixels = image.width * image.height
    if not num_pixels:
        raise ImageError(
            name, "broken_image", f"it is {image.width} x {image.height}, without a pixel"
        )
    if num_pixels > MAX_IMAGE_PIXELS:
        raise ImageError(
            name,
            "image_too_large",
            f"{num_pixels:,} pixels, the limit is {MAX_IMAGE_PIXELS:,}; resize it",
        )


def _draft(image: Image.Image, wanted_side: int) -> None:
    """Lets a JPEG be decoded smaller; does nothing to other formats."""
    for reduction in (8, 4, 2):
        # the decoder fills up the last column and row; a turn would bring them to the front
        is_filled = any(side % reduction for side in image.size)
        is_large = max(image.size) >= reduction * DRAFT_MARGIN * wanted_side
        if is_large and not (is_filled and _turn(image) is not None):
            image.draft(None, (image.width // reduction, image.height // reduction))
            return


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Finds the turn that brings the picture upright; None if it is upright."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:  # an unreadable EXIF block states no orientation; the pixels are whole
        return None
    return _UNDO_ORIENTATION.get(orientation) if isinstance(orientation, int) else None


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # Pillow copies the EXIF block: whoever reads its tag would turn once more
    return image


def _is_rgb(image: Image.Image) -> bool:
    return image.mode == "RGB" and not image.has_transparency_data


def _as_rgb(image: Image.Image) -> Image.Image:
    """Turns a decoded picture into a new RGB one."""
    if image.mode.startswith("I"):  # Pillow would clip at 255
        return _grey_in_8_bits(image).convert("RGB")
    if image.mode == "La":  # Pillow converts it to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_in_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).clip(0)
    brightest = int(values.max())
    bits = next((bits for bits in GREY_BITS if brightest < 1 << bits), brightest.bit_length())
    grey = (values >> (bits - 8)).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)
