import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloc_mllm.mllm.coordinates import BoxFormat, linked_phrases

INTEGERS = BoxFormat("integers")
LOCATIONS = BoxFormat("location_tokens", 100)
FORMATS = st.sampled_from(
    [INTEGERS, LOCATIONS, BoxFormat("location_tokens", 2), BoxFormat("location_tokens", 64)]
)


@st.composite
def sides(draw: st.DrawFn, thinnest: float) -> tuple[float, float]:
    low = draw(st.floats(0, 1 - thinnest, exclude_max=thinnest == 0))
    high = draw(st.floats(low + thinnest, 1).filter(lambda value: value > low))
    return low, high


@given(st.data(), FORMATS)
def test_a_box_of_a_bin_or_more_comes_back_within_half_a_bin(data, box_format):
    bin_size = 1 / (box_format.num_bins - 1)
    x, y = (data.draw(sides(thinnest=bin_size)) for _ in range(2))
    box = (x[0], y[0], x[1], y[1])

    parsed = box_format.parse(box_format.encode(box))

    assert parsed.failure is None
    assert parsed.boxes[0] == pytest.approx(box, abs=0.5 * bin_size + 1e-12)


@given(st.data(), FORMATS)
def test_the_thinnest_box_still_parses_and_stays_within_a_bin_and_a_half(data, box_format):
    x, y = (data.draw(sides(thinnest=0)) for _ in range(2))
    box = (x[0], y[0], x[1], y[1])

    parsed = box_format.parse(box_format.encode(box))

    assert parsed.failure is None
    assert parsed.boxes[0] == pytest.approx(box, abs=1.5 / (box_format.num_bins - 1))


@given(st.text() | st.from_regex(r"(<loc_[0-9]{1,3}>){0,9}.?"), FORMATS)
def test_parse_never_raises_and_never_gives_boxes_with_a_failure(text, box_format):
    parsed = box_format.parse(text)

    assert bool(parsed.boxes) == (parsed.failure is None)
    assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in parsed.boxes)


@pytest.mark.parametrize(
    ("box_format", "text", "failure"),
    [
        (INTEGERS, "", "empty"),
        (INTEGERS, "  \n", "empty"),
        (INTEGERS, "a crab", "not_a_box"),
        (INTEGERS, "[1, 2, 3]", "not_a_box"),
        (INTEGERS, "[1, 2, 3, 4, 5]", "not_a_box"),
        (INTEGERS, "[1, 2, 3, 4] and more", "not_a_box"),
        (INTEGERS, "at [1, 2, 3, 4]", "not_a_box"),
        (INTEGERS, "[1,2,3,4]", "not_a_box"),
        (INTEGERS, "[01, 2, 3, 4]", "not_a_box"),
        (INTEGERS, "[-1, 2, 3, 4]", "not_a_box"),
        (INTEGERS, "[0.1, 0.2, 0.3, 0.4]", "not_a_box"),
        (INTEGERS, "[١, 2, 3, 4]", "not_a_box"),
        (INTEGERS, "[1, 2, 3, 1000]", "out_of_range"),
        (INTEGERS, "[1, 2, 3, 99999999999999]", "not_a_box"),
        (INTEGERS, "[5, 2, 3, 4]", "inverted"),
        (INTEGERS, "[1, 5, 3, 4]", "inverted"),
        (INTEGERS, "[1, 2, 1, 4]", "zero_area"),
        (LOCATIONS, "<loc_1><loc_2><loc_3>", "wrong_count"),
        (LOCATIONS, "<loc_1><loc_2><loc_3><loc_4><loc_5>", "wrong_count"),
        (LOCATIONS, "<loc_1><loc_2><loc_3><loc_4> crab", "not_a_box"),
        (LOCATIONS, "<loc_1><loc_2><loc_3><loc_100>", "out_of_range"),
        (LOCATIONS, "<loc_9><loc_2><loc_3><loc_4>", "inverted"),
        (LOCATIONS, "[1, 2, 3, 4]", "not_a_box"),
    ],
)
def test_what_is_not_a_box_says_why(box_format, text, failure):
    parsed = box_format.parse(text)

    assert (parsed.boxes, parsed.failure) == ([], failure)


def test_text_of_both_formats():
    box = (0.0, 0.25, 0.5, 1.0)

    assert INTEGERS.encode(box) == "[0, 250, 500, 999]"
    assert LOCATIONS.encode(box) == "<loc_0><loc_25><loc_50><loc_99>"


def test_several_boxes_come_back_in_order():
    boxes = [(0.0, 0.0, 0.5, 0.5), (0.25, 0.5, 1.0, 1.0)]

    for box_format, separator in ((INTEGERS, " "), (LOCATIONS, "")):
        parsed = box_format.parse(separator.join(map(box_format.encode, boxes)))
        assert len(parsed.boxes) == 2
        for actual, expected in zip(parsed.boxes, boxes, strict=True):
            assert actual == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("box_format", "text", "expected", "failures"),
    [
        (INTEGERS, "a crab [0, 0, 999, 999] [1, 1, 2, 2], [3, 3, 1, 1].", [7, 24], ["inverted"]),
        (INTEGERS, "[1, 2, 3]", [], []),
        (LOCATIONS, "a <loc_0><loc_1><loc_2><loc_3> b", [2], []),
        (LOCATIONS, "<loc_0><loc_1><loc_2><loc_3>" * 2, [0, 28], []),
        (LOCATIONS, "a <loc_0><loc_1><loc_2> b <loc_200>", [], ["wrong_count"] * 2),
        (BoxFormat("integers", head=True), "<box> and <box>", [10], ["zero_area"]),
    ],
    ids=["integers", "three", "tokens", "two", "wrong", "head"],
)
def test_boxes_are_found_inside_a_text(box_format, text, expected, failures):
    found, actual_failures = box_format.find(text, [(0.5, 0, 0.5, 1), (0, 0, 1, 1)])

    assert [place.start for place in found] == expected
    assert actual_failures == failures
    regressed = [(0, 0, 1, 1)] * box_format.head
    for start, end, box in found:
        assert box_format.parse(text[start:end], regressed).boxes == [box]


def test_integers_always_use_1000_bins_and_add_no_token():
    assert BoxFormat("integers", 64) == INTEGERS
    assert INTEGERS.tokens() == []
    assert LOCATIONS.tokens()[0] == "<loc_0>" and len(LOCATIONS.tokens()) == 100


@pytest.mark.parametrize(
    "box",
    [(0.5, 0, 0.4, 1), (0, 0, 0, 1), (0, 0, 1.1, 1), (float("nan"), 0, 1, 1)],
    ids=["inverted", "zero_area", "outside", "nan"],
)
def test_a_bad_box_is_refused_when_written(box):
    with pytest.raises(ValueError, match="clip_box"):
        LOCATIONS.encode(box)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="one of"):
        BoxFormat("polygons")


LINKED = {
    "integers": "<p>two [1, 2] dogs</p>[100, 300, 400, 699] [0, 0, 9, 9] and [5, 5, 7, 7], <p>a</p>"
    " [1, 2, 3, 4]<p>b</p>",
    "location_tokens": "<p>two dogs</p><loc_1><loc_3><loc_4><loc_7><loc_5><loc_5><loc_6><loc_6> "
    "and <loc_0><loc_0><loc_1><loc_1>, <p>a</p> <loc_1><loc_3><loc_4><loc_7>",
}


@pytest.mark.parametrize("kind", LINKED)
def test_boxes_have_the_phrase_that_they_are_linked_to(kind: str) -> None:
    box_format = BoxFormat(kind, 1000)  # type: ignore[arg-type]
    found, failures = box_format.find(LINKED[kind])
    spans = [(start, end) for start, end, _ in found]
    two = "two [1, 2] dogs" if kind == "integers" else "two dogs"
    assert failures == []
    assert linked_phrases(LINKED[kind], spans) == [two, two, "", "a"]


def test_an_answer_of_linked_boxes_is_boxes() -> None:
    box = (0.1, 0.2, 0.5, 0.6)
    for box_format in (BoxFormat("integers"), BoxFormat("location_tokens", 100)):
        expected = box_format.parse(box_format.answers([box, box])).boxes
        assert box_format.parse(box_format.link("a crab", [box, box])).boxes == expected
        assert box_format.parse("<p>a crab</p>").failure == "not_a_box"
    head = BoxFormat("location_tokens", 100, head=True)
    assert head.parse(head.link("a crab", [box]), [box]).boxes == [box]
