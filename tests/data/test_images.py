"""One way in for images: modes x EXIF orientations x ways in, hostile files, reduced decoding."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from cloc_mllm.data import images
from cloc_mllm.data.images import (
    FILE_FORMATS,
    IMAGE_FORMATS,
    ImageError,
    open_image,
    read_header,
    storable,
    upright_size,
)
from tests.photos import ORIENTATION_TAG, encoded, exif, turned

NOISE = Image.effect_noise((64, 48), 80).convert("RGB")
NOISE_JPEG = encoded(NOISE, "JPEG")
NOISE_PNG = encoded(NOISE)

# every mode that a file can have, every orientation, every way in


@dataclass
class Case:
    """A picture of 3 x 2 cells: what is stored in them, and the RGB that must come out."""

    mode: str
    image_format: str
    stored: list[Any]
    expected: list[tuple[int, int, int]]
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: int = 0  # 3: JPEG at quality 100; 1: rounding of half a level


CELL_PX = 8  # a JPEG block, so that cells do not bleed into each other
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (9, 90, 200), (255, 255, 255)]
GREYS = [0, 40, 90, 140, 200, 255]
GREY_RGB = [(grey, grey, grey) for grey in GREYS]
INKS = [
    (0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0),
    (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0),
]  # fmt: skip
INK_RGB = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255)]
ALPHAS = [255, 0, 255, 128, 0, 255]
SEEN_THROUGH = [(*color, alpha) for color, alpha in zip(COLORS, ALPHAS, strict=True)]
ON_WHITE = [COLORS[0], (255, 255, 255), COLORS[2], (255, 255, 127), (255, 255, 255), COLORS[5]]
PALETTE = [channel for color in COLORS for channel in color]
JPEG = {"quality": 100, "subsampling": 0}

CASES = {
    "rgb_png": Case("RGB", "PNG", COLORS, COLORS),
    "rgb_webp": Case("RGB", "WEBP", COLORS, COLORS, {"lossless": True}),
    "rgb_jpeg": Case("RGB", "JPEG", COLORS, COLORS, JPEG, 3),
    "grey_png": Case("L", "PNG", GREYS, GREY_RGB),
    "grey_jpeg": Case("L", "JPEG", GREYS, GREY_RGB, {"quality": 100}, 3),
    "one_bit": Case("1", "PNG", [0, 1, 1, 0, 1, 0], [(v, v, v) for v in (0, 255, 255, 0, 255, 0)]),
    "palette": Case("P", "PNG", list(range(6)), COLORS),
    "palette_with_a_hole": Case(
        "P", "PNG", list(range(6)), [*COLORS[:4], (255, 255, 255), COLORS[5]], {"transparency": 4}
    ),
    "rgb_with_a_hole": Case(
        "RGB", "PNG", COLORS, [(255, 255, 255), *COLORS[1:]], {"transparency": COLORS[0]}
    ),
    "grey_with_alpha": Case(
        "LA", "PNG", [(0, 255), (0, 0), (0, 128), (90, 255), (255, 255), (255, 0)],
        [(v, v, v) for v in (0, 255, 127, 90, 255, 255)], tolerance=1,
    ),
    "rgba_png": Case("RGBA", "PNG", SEEN_THROUGH, ON_WHITE, tolerance=1),
    "rgba_webp": Case(
        "RGBA", "WEBP", SEEN_THROUGH, ON_WHITE, {"lossless": True, "exact": True}, tolerance=1
    ),
    "grey_16_bits": Case(
        "I;16", "PNG", [257 * grey for grey in GREYS], GREY_RGB
    ),
    "grey_12_bits_in_16": Case(
        "I;16", "PNG", [16 * grey for grey in GREYS[:-1]] + [4095], GREY_RGB
    ),
    "cmyk_as_adobe_writes_it": Case("CMYK", "JPEG", INKS, INK_RGB, {"quality": 100}, 3),
}  # fmt: skip


def cells(mode: str, values: Sequence[Any]) -> Image.Image:
    """3 x 2 cells, row by row."""
    if mode == "I;16":
        rows = np.array(values, np.uint16).reshape(2, 3)
        return Image.fromarray(rows.repeat(CELL_PX, 0).repeat(CELL_PX, 1))
    image = Image.new(mode, (3 * CELL_PX, 2 * CELL_PX))
    if mode == "P":
        image.putpalette(PALETTE)
    for index, value in enumerate(values):
        x, y = index % 3 * CELL_PX, index // 3 * CELL_PX
        image.paste(value, (x, y, x + CELL_PX, y + CELL_PX))
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_picture_has_the_same_pixels_whichever_way_it_comes(
    case: Case, orientation: int, tmp_path: Path
) -> None:
    upright = cells(case.mode, case.stored)
    data = encoded(upright, case.image_format, orientation=orientation, **case.options)
    path = tmp_path / "picture"
    path.write_bytes(data)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    expected = open_image(data)

    worst = np.abs(pixels(expected) - pixels(cells("RGB", case.expected))).max()
    assert worst <= case.tolerance
    for source in (
        path,
        str(path),
        Image.open(path),
        loaded,
        loaded.copy(),
        np.asarray(expected),
        expected,
    ):
        actual = open_image(source)
        assert (actual.mode, actual.size) == ("RGB", upright.size)
        assert actual.tobytes() == expected.tobytes()
        assert actual.getexif().get(ORIENTATION_TAG, 1) == 1
        assert open_image(actual) is actual
    assert upright_size(data) == upright.size


MEMORY_MODES = ["RGBX", "YCbCr", "HSV", "LAB", "PA", "RGBa", "La", "I", "I;16B", "I;16L"]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_modes_that_only_memory_holds(mode: str, orientation: int) -> None:
    by_way_of = {"La": "LA", "PA": "P", "RGBa": "RGBA", "I;16B": "I", "I;16L": "I"}.get(mode)
    grey = cells("L", GREYS)
    image = (grey.convert(by_way_of) if by_way_of else cells("RGB", GREY_RGB)).convert(mode)
    expected = open_image(image)
    image = turned(image, orientation)
    image.info["exif"] = exif(orientation)

    actual = open_image(image)

    assert actual.tobytes() == expected.tobytes()
    assert np.abs(pixels(actual) - pixels(grey.convert("RGB"))).max() <= 3  # of LAB and YCbCr


def test_arrays_of_grey_and_of_rgba() -> None:
    grey = cells("L", GREYS)
    assert open_image(np.asarray(grey)).tobytes() == open_image(grey).tobytes()
    rgba = cells("RGBA", SEEN_THROUGH)
    assert open_image(np.asarray(rgba)).tobytes() == open_image(rgba).tobytes()
    rgb = np.asarray(cells("RGB", COLORS))
    assert open_image(rgb[:, ::-1]).tobytes() == rgb[:, ::-1].tobytes()  # strides of any sign


def test_an_orientation_in_xmp_alone_is_turned_too() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    upright = cells("RGB", COLORS)
    file = io.BytesIO()
    turned(upright, 6).save(file, "WEBP", lossless=True, xmp=xmp)
    actual = open_image(file.getvalue())
    assert actual.tobytes() == upright.tobytes()
    assert open_image(actual) is actual


def test_the_picture_that_came_is_not_changed() -> None:
    image = turned(cells("RGB", COLORS), 6)
    image.info["exif"] = exif(6)
    before = image.tobytes()
    assert open_image(image).size == (image.height, image.width)
    assert (image.tobytes(), image.getexif()[ORIENTATION_TAG]) == (before, 6)


@pytest.mark.parametrize("tag", [0, 9])
def test_unknown_orientation_is_ignored(tag: int) -> None:
    assert open_image(encoded(Image.new("RGB", (4, 2)), exif=exif(tag))).size == (4, 2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_an_unreadable_exif_block_states_no_orientation() -> None:
    data = encoded(Image.new("RGB", (4, 2)), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert open_image(data).size == (4, 2)


@pytest.mark.parametrize(
    ("brightest", "scaled"),
    [
        *[(255, 255), (1023, 255), (4095, 255), (16383, 255), (65535, 255)],  # each depth's white
        *[(200, 200), (3000, 187), (40000, 156)],  # darker than white, at 8, 12 and 16 bits
        (2**20 - 1, 255),
    ],
)
def test_deep_grey_is_scaled_by_its_own_depth(brightest: int, scaled: int) -> None:
    values = np.array([[0, brightest // 2, brightest]], np.int32)
    actual = np.asarray(open_image(Image.fromarray(values)))[0, :, 0].tolist()
    assert actual == [0, pytest.approx(scaled / 2, abs=1), scaled]


def test_one_value_of_16_bit_grey_may_be_transparent() -> None:
    grey = cells("I;16", [100, 200, 300, 400, 500, 65535])
    assert open_image(encoded(grey, transparency=100)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(grey)).getpixel((0, 0)) == (0, 0, 0)


# what cannot be used

HEIC = (24).to_bytes(4, "big") + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(99)


@pytest.mark.parametrize(
    ("source", "reason", "detail"),
    [
        (b"", "missing_image", "there is no image file"),
        (b"<html>404 Not Found</html>", "not_an_image", "starts with '<html>404 No'; convert"),
        (encoded(Image.new("RGB", (4, 4)), "BMP"), "not_an_image", "got a BMP file; convert it"),
        (encoded(NOISE, "AVIF"), "not_an_image", "got an AVIF file; convert it"),
        (HEIC, "not_an_image", "got a HEIC photo; convert it"),
        (b"\x00\xff\x01" * 9, "not_an_image", "got a file of an unknown kind; convert it"),
        (encoded(NOISE, "GIF"), "not_an_image", "expected JPEG, PNG, WEBP"),
        (encoded(NOISE, "TIFF"), "not_an_image", "expected JPEG, PNG, WEBP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_an_image", "expected JPEG, PNG, WEBP"),
        (NOISE_PNG[:-999], "broken_image", "truncated.*fetch or save it again"),
        ("https://host/a.png", "missing_image", "addresses are not fetched"),
        (np.zeros((3, 8, 9), np.uint8), "not_an_image", "got uint8 3 x 8 x 9; .* channels last"),
        (np.zeros((8, 9, 1), np.uint8), "not_an_image", "got uint8 8 x 9 x 1"),
        (np.zeros((8, 9, 3)), "not_an_image", "got float64 8 x 9 x 3; scale floats"),
        (np.zeros((8, 9), bool), "not_an_image", "got bool 8 x 9"),
        (np.zeros((0, 9), np.uint8), "broken_image", "9 x 0, without a pixel"),
        (Image.new("F", (4, 4)), "not_an_image", "floats, whose white is unknown"),
        (bytearray(NOISE_PNG), "not_an_image", "expected a path, .* got bytearray"),
        (None, "not_an_image", "got NoneType"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_what_cannot_be_used_says_why(source: Any, reason: str, detail: str) -> None:
    with pytest.raises(ImageError, match=f"'photo-7' .*{reason}.*{detail}") as error:
        open_image(source, name="photo-7")
    assert error.value.reason == reason


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        open_image(tmp_path / "nothing.png")
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(ImageError, match=r"page\.jpg.*not_an_image"):
        open_image(tmp_path / "page.jpg")


def test_a_picture_whose_file_was_closed_unread_says_so(tmp_path: Path) -> None:
    NOISE.save(tmp_path / "noise.png")
    with Image.open(tmp_path / "noise.png") as image:
        pass
    with pytest.raises(ImageError, match=r"broken_image.*closed"):
        open_image(image)


@pytest.mark.parametrize("wanted_side", [None, 8])
@pytest.mark.parametrize("percent", range(0, 100, 4))
def test_a_cut_file_is_refused_anywhere(percent: int, wanted_side: int | None) -> None:
    for data in (NOISE_JPEG, NOISE_PNG):
        with pytest.raises(ImageError):
            open_image(data[: len(data) * percent // 100], wanted_side=wanted_side)


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for source in (NOISE_PNG, Image.open(io.BytesIO(NOISE_PNG)), NOISE, np.asarray(NOISE)):
        with pytest.raises(ImageError, match=r"image_too_large.*3,072 pixels, the limit is 3,071"):
            open_image(source)
    with pytest.raises(ImageError, match="image_too_large"):  # of the whole JPEG, not of a draft
        open_image(NOISE_JPEG, wanted_side=8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_decompression_bomb_is_refused(side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = bytearray(NOISE_PNG)
    bomb[12:33] = header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(ImageError, match="image_too_large"):
        open_image(bytes(bomb))


# the size from the header


def with_late_exif(png: bytes) -> bytes:
    """The same PNG with its EXIF chunk behind the pixels, where exiftool writes it."""
    start = png.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(png[start : start + 4], "big")
    end = len(png) - 12  # of the chunks before IEND
    return png[:start] + png[stop:end] + png[start:stop] + png[end:]


def test_a_late_exif_block_of_a_png_counts() -> None:
    late = with_late_exif(encoded(cells("RGB", COLORS), orientation=6))
    assert open_image(late).tobytes() == cells("RGB", COLORS).tobytes()
    assert upright_size(late) == (24, 16)


def test_sizes_are_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    late = with_late_exif(encoded(cells("RGB", COLORS), orientation=6))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert upright_size(NOISE_PNG) == upright_size(NOISE_JPEG) == (64, 48)
    assert upright_size(encoded(NOISE, "JPEG", orientation=6)) == (64, 48)
    assert upright_size(late, max_pixels=24 * 16 - 1) == (16, 24)
    assert upright_size(b"<html>") is None


# files of other formats, which a build converts


CONVERTED = {
    "bmp": ("BMP", "RGB", COLORS, COLORS),
    "gif": ("GIF", "P", list(range(6)), COLORS),
    "tiff": ("TIFF", "RGB", COLORS, COLORS),
    "tiff_grey_16": ("TIFF", "I;16", [257 * grey for grey in GREYS], GREY_RGB),
    "tiff_grey_12": ("TIFF", "I;16", [16 * grey for grey in GREYS[:-1]] + [4095], GREY_RGB),
    "tiff_alpha": ("TIFF", "RGBA", SEEN_THROUGH, ON_WHITE),
    "ppm": ("PPM", "RGB", COLORS, COLORS),
    "pgm_16": ("PPM", "I", [257 * grey for grey in GREYS], GREY_RGB),
    "pbm": ("PPM", "1", [0, 1, 1, 0, 1, 0], [(v, v, v) for v in (0, 255, 255, 0, 255, 0)]),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_other_formats_become_png(name: str) -> None:
    image_format, mode, stored, expected = CONVERTED[name]
    data = encoded(cells(mode, stored), image_format)
    converted, old_format = storable(data, name=name)
    assert (old_format, converted[:4]) == (image_format, b"\x89PNG")
    actual = open_image(converted)
    assert np.abs(pixels(actual) - pixels(cells("RGB", expected))).max() <= 1  # of alpha
    header = read_header(data, formats=FILE_FORMATS)
    assert header is not None and header.upright_wh == actual.size
    assert upright_size(data) is None, "what a user sends is not read more widely"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["TIFF", "AVIF"])
def test_a_converted_photo_is_upright(image_format: str, orientation: int) -> None:
    """Pillow turns TIFFs itself when it decodes them; their header states the turn before that."""
    upright = cells("RGB", COLORS)
    options = {"quality": 100, "subsampling": "4:4:4"} if image_format == "AVIF" else {}
    data = encoded(upright, image_format, orientation=orientation, **options)
    header = read_header(data, formats=FILE_FORMATS)
    assert header is not None
    assert header.upright_wh == upright.size
    converted = open_image(storable(data)[0])
    assert converted.size == upright.size
    # measured 3 for AVIF, 0 for TIFF
    assert np.abs(pixels(converted) - pixels(upright)).max() <= 4


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(storable(data)[0]).getcolors() == [(32, (255, 0, 0))]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "MPO"])
def test_what_records_hold_stays_byte_for_byte(image_format: str) -> None:
    options: dict[str, Any] = {}
    if image_format == "MPO":  # two JPEGs in a file, as phones and stereo cameras write
        options = {"save_all": True, "append_images": [NOISE.transpose(Image.Transpose.ROTATE_180)]}
    data = encoded(NOISE, image_format, **options)
    assert storable(data) == (data, "")
    assert open_image(data).size == NOISE.size


def test_lossy_formats_become_jpeg() -> None:
    data = encoded(NOISE, "AVIF")
    converted, old_format = storable(data)
    assert (old_format, converted[:2]) == ("AVIF", b"\xff\xd8")
    avif = Image.open(io.BytesIO(data)).convert("RGB")
    # measured 1.2 on noise, the hardest picture for JPEG; another picture differs by 60
    assert np.abs(pixels(open_image(converted)) - pixels(avif)).mean() < 2


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_a_file_on_the_disk_may_be_of_any_format_of_a_build(kind: str, tmp_path: Path) -> None:
    data = encoded(NOISE, kind)
    (tmp_path / "photo").write_bytes(data)
    expected = pixels(open_image(storable(data)[0]))
    worst = 60 if kind == "AVIF" else 0  # which `storable` makes a JPEG; measured 44 on noise
    assert np.abs(pixels(open_image(tmp_path / "photo")) - expected).max() <= worst


def test_heic_needs_a_package(tmp_path: Path) -> None:
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC)
    for read in (lambda: storable(HEIC), lambda: open_image(tmp_path / "IMG_1.HEIC")):
        with pytest.raises(ImageError, match=r"not_an_image.*pip install pillow-heif|broken_image"):
            read()


def test_a_heic_photo_is_read(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    converted, old_format = storable(encoded(NOISE, "HEIF", quality=100))
    assert (old_format, converted[:2]) == ("HEIC", b"\xff\xd8")
    assert open_image(converted).size == NOISE.size


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (b"8BPS\x00\x01" + bytes(40), "not_an_image"),
        (encoded(NOISE, "ICO"), "not_an_image"),
        (encoded(NOISE, "TGA"), "not_an_image"),
        (encoded(NOISE, "PCX"), "not_an_image"),
        (encoded(NOISE, "JPEG2000"), "not_an_image"),
        (encoded(NOISE, "BMP")[:-999], "broken_image"),
        (encoded(NOISE, "TIFF")[:3000], "broken_image"),
        (encoded(NOISE, "GIF")[:900], "broken_image"),
        (encoded(NOISE, "PPM")[:900], "broken_image"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "not_an_image"),
        (b"", "missing_image"),
    ],
)
def test_no_other_format_is_read(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as error:
        storable(data, name="x")
    assert error.value.reason == reason


def test_the_pixel_limit_holds_for_converted_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    for image_format in ("BMP", "GIF", "TIFF", "PPM"):
        data = encoded(NOISE, image_format)
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
            with pytest.raises(ImageError, match="image_too_large"):
                storable(data)
    assert set(IMAGE_FORMATS) < set(FILE_FORMATS)


# JPEGs decoded smaller


@pytest.mark.parametrize(
    ("wh", "wanted", "expected"),
    [
        pytest.param((640, 427), 224, (320, 214), id="half_rounded_up"),
        pytest.param((640, 480), 128, (160, 120), id="quarter"),
        pytest.param((1001, 801), 64, (126, 101), id="eighth_at_most"),
        pytest.param((500, 375), 224, (500, 375), id="half_is_too_near"),
        pytest.param((224, 224), 224, (224, 224), id="small_already"),
    ],
)
def test_a_jpeg_is_decoded_no_larger_than_needed(
    wh: tuple[int, int], wanted: int, expected: tuple[int, int]
) -> None:
    photo = Image.new("RGB", wh, "green")
    jpeg = encoded(photo, "JPEG")
    assert open_image(jpeg, wanted_side=wanted).size == expected
    assert open_image(jpeg).size == wh
    for other in (encoded(photo), Image.open(io.BytesIO(jpeg)), np.asarray(photo)):
        assert open_image(other, wanted_side=wanted).size == wh


def test_a_turned_jpeg_is_decoded_smaller_only_where_no_pixel_is_filled_up() -> None:
    for wh, expected in (((480, 640), (240, 320)), ((427, 640), (427, 640))):
        stored = encoded(Image.new("RGB", wh), "JPEG", orientation=6)
        assert open_image(stored, wanted_side=224).size == expected
