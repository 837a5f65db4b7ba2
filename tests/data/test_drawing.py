from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from cloc_mllm.data import drawing
from cloc_mllm.data.drawing import contact_sheet, draw_record, draw_regions, region_color
from cloc_mllm.data.records import Record, Region
from cloc_mllm.geometry import Boxes

GREY = (200, 200, 200)
BOX = [0.25, 0.5, 0.75, 0.75]


def make_image(width: int = 100, height: int = 50) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def test_outline_lies_on_the_box() -> None:
    actual = draw_regions(make_image(), Boxes.normalized([BOX]), [""], long_side=400)
    assert actual.size == (400, 200)
    assert actual.getpixel((200, 100)) == region_color(0)  # top side
    assert actual.getpixel((100, 120)) == region_color(0)  # left side
    assert actual.getpixel((200, 125)) == GREY  # inside
    assert actual.getpixel((50, 50)) == GREY


def test_pixel_boxes_draw_the_same() -> None:
    image = make_image()
    expected = draw_regions(image, Boxes.normalized([BOX]), ["a"])
    actual = draw_regions(image, Boxes.pixels([[25, 25, 75, 37.5]], 100, 50), ["a"])
    assert actual.tobytes() == expected.tobytes()


def test_original_is_untouched() -> None:
    image = make_image()
    draw_regions(image, Boxes.normalized([BOX]), ["a"], long_side=100)
    assert image.getcolors() == [(5000, GREY)]


def test_labels_of_equal_boxes_do_not_hide_each_other() -> None:
    image = make_image(400, 400)
    drawn = draw_regions(image, Boxes.normalized([BOX, BOX, BOX]), ["cat", "cat", "cat"])
    colors = {color for _, color in drawn.getcolors(maxcolors=1 << 20) or []}
    bare = draw_regions(image, Boxes.normalized([BOX, BOX, BOX]), ["", "", ""])
    bare_colors = {color for _, color in bare.getcolors(maxcolors=1 << 20) or []}
    assert {region_color(index) for index in range(3)} <= colors
    assert not {region_color(0), region_color(1)} & bare_colors  # only the last outline shows


@pytest.mark.parametrize(
    "box",
    [
        pytest.param([0.0, 0.0, 1.0, 1.0], id="whole_image"),
        pytest.param([0.9, 0.1, 0.2, 0.05], id="inverted"),
        pytest.param([0.5, 0.5, 0.5, 0.5], id="a_point"),
        pytest.param([-2.0, -2.0, 3.0, 3.0], id="far_outside"),
    ],
)
def test_any_finite_box_draws_its_label_on_the_image(box: list[float]) -> None:
    labelled = draw_regions(make_image(), Boxes.normalized([box]), ["猫 " + "x" * 500])
    bare = draw_regions(make_image(), Boxes.normalized([box]), [""])
    assert labelled.tobytes() != bare.tobytes()


def test_number_of_labels_must_fit() -> None:
    with pytest.raises(ValueError, match="1 boxes need as many labels, got 2"):
        draw_regions(make_image(), Boxes.normalized([BOX]), ["a", "b"])


def test_no_boxes() -> None:
    assert draw_regions(make_image(), Boxes.normalized([]), [], long_side=80).size == (80, 40)


def test_contact_sheet_holds_every_picture() -> None:
    colors = ["red", "lime", "blue"]
    pictures = [Image.new("RGB", (60, 40), color) for color in colors]
    sheet = contact_sheet(pictures, ["a", "b" * 300, "c"], columns=2)
    counts = {color: count for count, color in sheet.getcolors(maxcolors=1 << 16) or []}
    assert [counts[pixel] for pixel in ((255, 0, 0), (0, 255, 0), (0, 0, 255))] == [2400] * 3
    with pytest.raises(ValueError, match="got 0 and 0"):
        contact_sheet([], [])


def test_boxes_of_one_group_share_a_colour(tiny_scenes: list[Record]) -> None:
    regions = [Region((x, 0.3, x + 0.2, 0.6), "thing", group="g") for x in (0.1, 0.4, 0.7)]
    drawn = draw_record(replace(tiny_scenes[0], regions=regions))
    colors = {color for _, color in drawn.getcolors(maxcolors=1 << 20) or []}
    assert max(drawn.size) == 640
    assert region_color(0) in colors
    assert region_color(1) not in colors


def test_characters_that_no_font_has_are_drawn_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_WIDE_FONTS", ())
    font = drawing._font_for("猫 a", 18)  # Pillow's own, which has little beyond ASCII
    assert font is drawing._font(18)
    assert drawing._writable("a 猫 b\ud800\n", font) == "a \\u732b b\\ud800\n"
    contact_sheet([Image.new("RGB", (64, 64))], ["猫\ud800🦀"])


def test_a_font_of_the_machine_is_taken_where_it_has_the_characters() -> None:
    fonts = [drawing._system_font(name, 18) for name in drawing._WIDE_FONTS]
    has = [font for font in fonts if font is not None and drawing._has_glyph(font, "Ж")]
    if not has:
        pytest.skip("the machine has none of the wide fonts")
    chosen = drawing._font_for("Ж", 18)
    assert drawing._writable("Ж", chosen) == "Ж"
