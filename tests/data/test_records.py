from __future__ import annotations

import io
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.images import DEEP_GREY
from cloc_mllm.data.records import DropLog, Record, Region, validate_record
from tests.photos import encoded

NAN, INF = math.nan, math.inf
GOOD_BOX = (0.1, 0.2, 0.5, 0.6)


NOISE_JPEG = encoded(Image.effect_noise((64, 48), 80), "JPEG")
NOISE_PNG = encoded(Image.effect_noise((64, 48), 80))
GREEN_PNG = encoded(Image.new("RGB", (40, 30), "green"))


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


def test_a_file_of_another_format_is_converted_and_noted() -> None:
    log = DropLog()
    valid = validate_record(make_record(image=encoded(Image.new("RGB", (40, 30)), "BMP")), log)
    assert valid is not None
    assert valid.image.startswith(b"\x89PNG")
    assert (valid.width, valid.height) == (40, 30)
    assert (log.notes, log.examples) == (
        {"BMP images converted to PNG": 1},
        {"BMP images converted to PNG": ["a"]},
    )


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
    assert log.drops[0].found.endswith("in a picture of 40 x 30")


def test_negative_zero_never_leaves() -> None:
    record = make_record(regions=[Region(box=(-0.0, -0.0, 0.5, 0.5), phrase="cat")])
    valid = validate_record(record, DropLog())
    assert valid is not None
    assert [math.copysign(1, value) for value in valid.regions[0].box] == [1, 1, 1, 1]


def test_what_was_found_is_kept_and_leaves_the_record() -> None:
    regions = [
        Region(box=(9.0, 9.0, 9.5, 9.5), phrase="cat", found={"id": 7, "bbox": [360, 270, 20, 15]}),
        Region(box=GOOD_BOX, phrase=7, found="x"),  # type: ignore[arg-type]
        Region(box=GOOD_BOX, phrase="cat", score=NAN),
        Region(box=GOOD_BOX, phrase="cat", found="as annotated"),
    ]
    log = DropLog()
    valid = validate_record(make_record(regions=regions), log)
    assert valid is not None
    assert [region.found for region in valid.regions] == [None]
    assert [(drop.reason, drop.found) for drop in log.drops] == [
        ("outside", "{'bbox': [360, 270, 20, 15], 'id': 7} in a picture of 40 x 30"),
        ("bad_text", "7"),
        ("bad_score", "nan"),
    ]


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
        pytest.param("\ufeff", "empty_text", id="byte_order_mark"),
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


def test_the_most_frequent_reasons_are_explained() -> None:
    log = DropLog()
    log.add("region", "annotation 3", "unknown_image", "image_id 7", count=2)
    log.add("record", "b", "missing_image", "b.jpg; there is no image file")
    log.add("caption", "b", "missing_image", count=5)  # a part of the record
    log.add("region", "x", "my_own_reason")
    lines = log.explained().splitlines()
    assert lines[0] == "        2 regions, unknown_image; first 'annotation 3': image_id 7"
    assert lines[1].startswith("          expected an image that the file lists")
    assert lines[2] == "        1 regions, my_own_reason; first 'x'"
    assert lines[3].startswith("        1 records, missing_image; first 'b': b.jpg; there is")
    assert len(lines) == 5
    assert DropLog().explained() == ""


def test_ten_reasons_are_explained_at_most() -> None:
    log = DropLog()
    for number in range(12):
        log.add("region", "x", f"reason_{number}", count=number + 1)
    lines = log.explained().splitlines()
    assert len(lines) == 11
    assert lines[0].split()[2] == "reason_11;"
    assert lines[-1].strip() == "and 2 more reasons"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\nb\x1b[31m\ud800", "a b [31m "),
        ([1, "2", None], "[1, '2', None]"),
        (list(range(99)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
    ],
)
def test_values_are_shown_on_one_short_line(value: object, expected: str) -> None:
    assert shown(value) == expected
    assert len(shown("x" * 10**6)) < 300
    assert len(shown([["y" * 10**6] * 99] * 99)) < 300


def test_what_is_said_of_an_image_counts_once() -> None:
    log = DropLog()
    for name in ("a", "b", "a", "c", "d", "e"):
        log.note_once("resized", name)
    assert log.notes == {"resized": 5}
    assert log.summary().splitlines()[-1].endswith("5 resized (a, b, c, ...)")


def test_an_example_is_shown_once() -> None:
    log = DropLog()
    for name in ("a", "a", "b"):
        log.note("boxes taken for the last image", 2, example=name)
    assert log.summary().splitlines()[-1].endswith("6 boxes taken for the last image (a, b, ...)")


def test_drop_log_summary_and_file(tmp_path) -> None:
    log = DropLog()
    validate_record(make_record(regions=[Region((0, 0, 0, 0), "cat")]), log)
    validate_record(make_record(id="b", image=b""), log)
    log.put_aside("region", "crowd", 2)
    log.note("chains without a box", 3, example="7")
    assert log.summary().splitlines() == [
        "records:             1 kept         1 dropped (missing_image 1), 50.0%",
        "regions:             0 kept         1 dropped (zero_area 1), 100.0%",
        "captions:            1 kept         1 dropped (missing_image 1), 50.0%",
        "set aside:           2 regions, crowd: boxes around a crowd; --keep_crowd keeps them",
        "note:                3 chains without a box (7)",
    ]
    log.write(tmp_path / "drops.jsonl")
    lines = (tmp_path / "drops.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "kind": "region",
        "id": "a/0",
        "reason": "zero_area",
        "found": "(0, 0, 0, 0) in a picture of 40 x 30",
    }
    assert len(lines) == 3


@pytest.mark.parametrize(("mode", "num_notes"), [("I;16", 1), ("L", 0)])
def test_scaled_grey_is_noted(mode: str, num_notes: int) -> None:
    file = io.BytesIO()
    Image.new(mode, (40, 30), 3000 if mode == "I;16" else 30).save(file, "PNG")
    log = DropLog()
    assert validate_record(make_record(image=file.getvalue()), log) is not None
    assert log.notes[DEEP_GREY] == num_notes


@pytest.mark.parametrize(("max_side", "size"), [(0, (400, 300)), (400, (400, 300)), (80, (80, 60))])
def test_large_photos_are_reduced_with_their_boxes(max_side: int, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", (400, 300), "green")
    picture.paste("red", (100, 150, 300, 240))
    regions = [
        Region((0.25, 0.5, 0.75, 0.8), "the red one"),
        Region((0.1, 0.1, 0.11, 0.5), "a post, 4 pixels wide"),
    ]
    log = DropLog()
    record = validate_record(
        make_record(image=encoded(picture, "JPEG"), regions=regions), log, max_side
    )
    assert record is not None
    image = record.load_image()
    assert image.size == size == (record.width, record.height)
    left, top, right, bottom = record.regions[0].box
    inside = image.crop(
        (
            int(left * size[0]) + 3,
            int(top * size[1]) + 3,
            int(right * size[0]) - 3,
            int(bottom * size[1]) - 3,
        )
    )
    red, green, _ = (channel.getextrema() for channel in inside.split())
    assert red[0] > 200 and green[1] < 60
    is_reduced = size == (80, 60)
    assert log.counts == ({"region": {"too_small": 1}} if is_reduced else {})
    assert any("--max_side" in what for what in log.notes) == is_reduced
    assert log.delivered["region"] == len(record.regions) == 2 - is_reduced
