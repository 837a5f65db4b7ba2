from __future__ import annotations

import io
import math
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.data import images
from cloc_mllm.data.images import ImageError, decode_image
from cloc_mllm.data.records import DropLog, Record, Region, validate_record

NAN, INF = math.nan, math.inf
GOOD_BOX = (0.1, 0.2, 0.5, 0.6)


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


NOISE_JPEG = encode(Image.effect_noise((64, 48), 80), "JPEG")
NOISE_PNG = encode(Image.effect_noise((64, 48), 80))
GREEN_PNG = encode(Image.new("RGB", (40, 30), "green"))


def make_record(**changes: object) -> Record:
    values = {
        "id": "a",
        "image": GREEN_PNG,
        "width": 0,
        "height": 0,
        "captions": ["a green field"],
        "regions": [],
        "source": "test",
    }
    return Record(**{**values, **changes})


# images


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "missing_image", id="no_bytes"),
        pytest.param(b"<html>404 Not Found</html>", "not_an_image", id="html_as_jpg"),
        pytest.param(encode(Image.new("RGB", (8, 8)), "GIF"), "not_an_image", id="gif"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_an_image", id="eps"),
        pytest.param(NOISE_JPEG[: len(NOISE_JPEG) // 2], "broken_image", id="truncated_jpeg"),
        pytest.param(NOISE_PNG[: len(NOISE_PNG) // 2], "broken_image", id="truncated_png"),
    ],
)
def test_unusable_image_is_dropped_with_its_reason(data: bytes, reason: str) -> None:
    record = make_record(id="photo-7", image=data)
    with pytest.raises(ValueError, match=f"'photo-7'.*{reason}"):
        record.load_image()
    log = DropLog()
    assert validate_record(record, log) is None
    assert log.counts["record"] == {reason: 1}


@pytest.mark.parametrize("percent", range(0, 100, 4))
def test_jpeg_cut_anywhere_is_refused(percent: int) -> None:
    with pytest.raises(ImageError):
        decode_image(NOISE_JPEG[: len(NOISE_JPEG) * percent // 100], "cut")


def test_pixel_limit_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 40 * 30 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"image_too_large.*1,200 pixels, the limit is 1,199"):
        make_record().load_image()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_decompression_bomb_is_refused(side: int) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = bytearray(GREEN_PNG)
    bomb[12:33] = header + struct.pack(">I", zlib.crc32(header))
    with pytest.raises(ImageError, match="image_too_large"):
        decode_image(bytes(bomb), "bomb")


# how a camera that writes the tag has turned the upright picture (EXIF 2.32, tag 0x0112)
TURNED_BY_TAG = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # counter-clockwise, so clockwise again to display
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize(("tag", "turn"), TURNED_BY_TAG.items())
def test_exif_orientation_is_undone(tag: int, turn: Image.Transpose | None) -> None:
    upright = Image.new("RGB", (40, 20), "blue")
    upright.paste("red", (0, 0, 10, 5))
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = encode(upright if turn is None else upright.transpose(turn), exif=exif)
    assert decode_image(stored, "turned").tobytes() == upright.tobytes()


@pytest.mark.parametrize("tag", [0, 9])
def test_unknown_exif_orientation_is_ignored(tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    assert decode_image(encode(Image.new("RGB", (4, 2)), exif=exif), "odd").size == (4, 2)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert decode_image(encode(clear), "clear").getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    grey = Image.new("I;16", (4, 4), 0x8000)
    assert decode_image(encode(grey), "deep").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encode(Image.new(mode, (5, 3)), image_format), mode).mode == "RGB"


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
def test_jpeg_is_decoded_no_larger_than_needed(
    wh: tuple[int, int], wanted: int, expected: tuple[int, int]
) -> None:
    photo = Image.new("RGB", wh, "green")
    assert decode_image(encode(photo, "JPEG"), "photo", wanted).size == expected
    assert decode_image(encode(photo, "JPEG"), "photo").size == wh
    assert decode_image(encode(photo, "PNG"), "drawing", wanted).size == wh


def test_a_turned_jpeg_is_decoded_smaller_only_where_no_pixel_is_filled_up() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for wh, expected in (((640, 480), (240, 320)), ((640, 427), (427, 640))):
        stored = encode(Image.new("RGB", wh), "JPEG", exif=exif)
        assert decode_image(stored, "turned", 224).size == expected


@pytest.mark.parametrize("percent", range(0, 100, 10))
def test_a_cut_jpeg_is_refused_at_a_smaller_size_too(percent: int) -> None:
    with pytest.raises(ImageError):
        decode_image(NOISE_JPEG[: len(NOISE_JPEG) * percent // 100], "cut", 8)


def test_the_pixel_limit_is_that_of_the_whole_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    with pytest.raises(ImageError, match="image_too_large"):
        decode_image(NOISE_JPEG, "large", 8)


# boxes


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        pytest.param((0.2, 0.2, 0.2, 0.6), "zero_area", id="zero_width"),
        pytest.param((0.2, 0.6, 0.5, 0.6), "zero_area", id="zero_height"),
        pytest.param((0.5, 0.2, 0.1, 0.6), "inverted", id="inverted_x"),
        pytest.param((0.1, 0.6, 0.5, 0.2), "inverted", id="inverted_y"),
        pytest.param((1.2, 0.2, 1.5, 0.6), "outside", id="outside"),
        pytest.param((1.0, 0.2, 1.5, 0.6), "outside", id="touches_the_edge"),
        pytest.param((0.0, 0.0, 300.0, 200.0), "mostly_outside", id="pixels_taken_for_shares"),
        pytest.param((-1e308, -1e308, 1e308, 1e308), "mostly_outside", id="huge"),
        pytest.param((NAN, 0.2, 0.5, 0.6), "not_finite", id="nan"),
        pytest.param((0.1, 0.2, INF, 0.6), "not_finite", id="infinite"),
        pytest.param((0.1, 0.2, 10**400, 0.6), "not_finite", id="beyond_float"),
        pytest.param((0.1, 0.2, "0.5", 0.6), "not_finite", id="text"),
        pytest.param((0.1, 0.2, 0.5), "not_finite", id="three_numbers"),
        pytest.param((0.1, 0.2, 0.11, 0.6), "too_small", id="under_a_pixel"),
    ],
)
def test_bad_box_is_dropped_with_its_reason(box: tuple[float, ...], reason: str) -> None:
    log = DropLog()
    record = make_record(
        regions=[
            Region(box=box, phrase="cat", expressions=["the cat", "it"]),
            Region(box=GOOD_BOX, phrase="dog"),
        ]
    )
    valid = validate_record(record, log)
    assert valid is not None
    assert [region.phrase for region in valid.regions] == ["dog"]
    assert log.counts == {"region": {reason: 1}, "expression": {reason: 2}}
    assert log.entries[0] == ("region", "a/0", reason)


def test_box_that_sticks_out_a_hair_is_clipped() -> None:
    record = make_record(regions=[Region(box=(-0.001, 0.2, 0.5, 1.002), phrase="cat")])
    valid = validate_record(record, DropLog())
    assert valid is not None
    assert valid.regions[0].box == (0.0, 0.2, 0.5, 1.0)


def test_image_without_a_valid_box_is_kept() -> None:
    record = make_record(regions=[Region(box=(0, 0, 0, 0), phrase="cat")])
    valid = validate_record(record, DropLog())
    assert valid is not None
    assert valid.regions == []
    assert valid.captions == ["a green field"]


def test_size_is_the_image_files_own() -> None:
    valid = validate_record(make_record(width=999, height=1), DropLog())
    assert valid is not None
    assert (valid.width, valid.height) == (40, 30)


coordinates = st.one_of(
    st.floats(-0.5, 1.5), st.sampled_from([0.0, 1.0, NAN, INF, -INF, 1e308, -1e308, 5e-324])
)
hostile_boxes = st.lists(st.tuples(*[coordinates] * 4), max_size=8)


@settings(deadline=None, max_examples=50)
@given(hostile_boxes, st.permutations(range(8)))
def test_no_box_is_lost_and_order_does_not_matter(boxes: list, order: list[int]) -> None:
    regions = [Region(box=box, phrase="cat", expressions=["x", " "]) for box in boxes]
    shuffled = [regions[i] for i in order if i < len(regions)]
    log, shuffled_log = DropLog(), DropLog()
    valid = validate_record(make_record(regions=regions), log)
    assert valid is not None
    assert log.delivered["region"] == len(valid.regions)
    assert log.delivered["region"] + log.num_dropped("region") == len(boxes)
    assert log.delivered["expression"] + log.num_dropped("expression") == 2 * len(boxes)
    for region in valid.regions:
        x1, y1, x2, y2 = region.box
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1
    validate_record(make_record(regions=shuffled), shuffled_log)
    assert shuffled_log.counts == log.counts


# texts and ids


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("", "empty_text", id="empty"),
        pytest.param(" \t\n\x00", "empty_text", id="blank_and_nul"),
        pytest.param("a \ud800 cat", "bad_text", id="lone_surrogate"),
        pytest.param(None, "bad_text", id="none"),
        pytest.param("x" * 100_000, "text_too_long", id="100k_characters"),
    ],
)
def test_bad_text_is_dropped_wherever_it_stands(text: str, reason: str) -> None:
    log = DropLog()
    record = make_record(
        captions=[text, "kept"],
        regions=[
            Region(box=GOOD_BOX, phrase=text),
            Region(box=GOOD_BOX, phrase="cat", expressions=[text, "the cat"]),
        ],
    )
    valid = validate_record(record, log)
    assert valid is not None
    assert valid.captions == ["kept"]
    assert [region.expressions for region in valid.regions] == [["the cat"]]
    assert log.counts == {kind: {reason: 1} for kind in ("caption", "region", "expression")}


@pytest.mark.parametrize("text", ["猫", "قطة", "👩‍🚀 astronaut", "crème brûlée"])
def test_any_script_is_kept(text: str) -> None:
    valid = validate_record(make_record(captions=[f"  {text}\n"]), DropLog())
    assert valid is not None
    assert valid.captions == [text]


@pytest.mark.parametrize("record_id", ["", "  ", None, 7])
def test_missing_id_is_dropped(record_id: object) -> None:
    log = DropLog()
    assert validate_record(make_record(id=record_id), log) is None
    assert log.counts["record"] == {"missing_id": 1}


def test_second_record_of_an_id_is_dropped_with_its_parts() -> None:
    log = DropLog()
    record = make_record(regions=[Region(box=GOOD_BOX, phrase="cat")])
    assert validate_record(record, log) is not None
    assert validate_record(record, log) is None
    expected = {kind: {"duplicate_id": 1} for kind in ("record", "caption", "region")}
    assert log.counts == expected
    assert log.drop_share() == 0.5


@pytest.mark.parametrize("score", [NAN, INF, None])
def test_bad_score_drops_the_region(score: float) -> None:
    log = DropLog()
    validate_record(make_record(regions=[Region(GOOD_BOX, "cat", score=score)]), log)
    assert log.counts == {"region": {"bad_score": 1}}


# the account


def test_drop_log_summary_and_file(tmp_path) -> None:
    log = DropLog()
    validate_record(make_record(regions=[Region((0, 0, 0, 0), "cat")]), log)
    validate_record(make_record(id="b", image=b""), log)
    log.note("chains without a box", 3)
    assert log.summary().splitlines() == [
        "records:             1 kept         1 dropped (missing_image 1)",
        "regions:             0 kept         1 dropped (zero_area 1)",
        "captions:            1 kept         1 dropped (missing_image 1)",
        "not used:            3 chains without a box",
    ]
    log.write(tmp_path / "drops.jsonl")
    lines = (tmp_path / "drops.jsonl").read_text().splitlines()
    assert lines[0] == '{"kind": "region", "id": "a/0", "reason": "zero_area"}'
    assert len(lines) == 3
