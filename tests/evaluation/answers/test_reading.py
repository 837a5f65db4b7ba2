"""Strict and lenient reading of each format, and that no text makes them raise."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloc_mllm.evaluation.answers import FORMATS, answer_format, read_lenient, read_strict
from cloc_mllm.evaluation.answers.formats import describe_formats
from cloc_mllm.evaluation.answers.frames import smart_resize
from cloc_mllm.mllm.coordinates import BoxFormat

SIZE = (640.0, 480.0)
BOX = (0.2, 0.2, 0.5, 0.75)
THOUSAND = "[200, 200, 500, 750]"


def strict(name, text):
    reading = read_strict(answer_format(name), text, SIZE)
    return reading.failure or [pytest.approx(box, abs=1e-9) for box in reading.boxes]


def lenient(name, text):
    reading = read_lenient(answer_format(name), text, SIZE)
    return reading.failure or [pytest.approx(box, abs=1e-9) for box in reading.boxes]


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_of_each_format_is_the_same_box(name):
    declared = FORMATS[name]
    tolerance = 0.02 if name in ("cloc", "kosmos-2") else 0.002  # bins and patches are coarse
    for read in (read_strict, read_lenient):
        assert read(declared, declared.example, SIZE).boxes == [pytest.approx(BOX, abs=tolerance)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("0-1", "[0.2,0.2,0.5,0.75]", [BOX]),
        ("0-1", " [0.2, 0.2, 0.5, 0.75]\n", [BOX]),
        ("0-1", "[0.2, 0.2, 0.5, 0.75], [0, 0, 1, 1]", [BOX, (0, 0, 1, 1)]),
        ("0-1", "", "empty"),
        ("0-1", "the crab", "not_a_box"),
        ("0-1", "The box is [0.2, 0.2, 0.5, 0.75]", "not_a_box"),
        ("0-1", "(0.2, 0.2, 0.5, 0.75)", "not_a_box"),
        ("0-1", THOUSAND, "out_of_range"),
        ("0-1000", "[500, 750, 200, 200]", "inverted"),
        ("0-1000", "[200, 200, 200, 750]", "zero_area"),
        ("0-1000", "[200, 200, 500, 1001]", "out_of_range"),
        ("0-1000", "[0.2, 0.2, 0.5, 0.75]", "not_a_box"),
        ("0-999", "[0, 0, 999, 999]", [(0, 0, 1, 1)]),
        ("pixels", "[128, 96, 320.0, 360]", [BOX]),
        ("pixels", "[128, 96, 644, 360]", "out_of_range"),
        ("location-tokens-3", "<loc_0><loc_1><loc_2><loc_2>", [(0, 0.5, 1, 1)]),
        ("location-tokens-3", "<p>the crab</p><loc_0><loc_1><loc_2><loc_2>", [(0, 0.5, 1, 1)]),
        ("0-999", "<p>a [1, 2, 3, 4]</p>[0, 0, 999, 999]", [(0, 0, 1, 1)]),
        ("0-999", "<p>a</p>[0, 0, 999, 999] <p>b</p> [0, 0, 999, 999]", [(0, 0, 1, 1)] * 2),
        ("location-tokens-3", "<loc_0><loc_1><loc_2>", "not_a_box"),
        ("location-tokens-3", "<loc_0><loc_1><loc_2><loc_3>", "out_of_range"),
        ("qwen-vl", "<ref>the crab</ref><box>(200,200),(500,750)</box>", [BOX]),
        ("qwen2-vl", "(200,200),(500,750)", [BOX]),
        ("qwen2-vl", "the crab(200,200),(500,750)", [BOX]),
        ("qwen2-vl", THOUSAND, "not_a_box"),
        ("qwen3-vl", '```json\n[{"bbox_2d": [200, 200, 500, 750], "label": "x"}]\n```', [BOX]),
        ("qwen3-vl", '{"bbox_2d": [200, 200, 500, 750]}', [BOX]),
        ("qwen3-vl", '[{"bbox_2d": [200, 200, 500, 750]}, {"point": [1, 2]}]', "not_a_box"),
        ("qwen3-vl", '[{"bbox_2d": [200, 200, 500, 7', "not_a_box"),
        ("qwen3-vl", '[{"bbox_2d": [200, 200, 500, true]}]', "not_a_box"),
        ("qwen3-vl", '[{"bbox_2d": [200, 200, 500, NaN]}]', "not_a_box"),
        ("qwen3-vl", f'[{{"bbox_2d": [200, 200, 500, {"9" * 400}]}}]', "out_of_range"),
        ("qwen3-vl", "[]", "no_box"),
        ("qwen3-vl", "[" * 100_000, "not_a_box"),
        ("qwen2.5-vl", '[{"bbox_2d": [128, 96, 320, 360]}]', [BOX]),
        ("internvl", "the crab[[200, 200, 500, 750]]", [BOX]),
        ("internvl", "<box>[[200,200,500,750], [0,0,1000,1000]]</box>", [BOX, (0, 0, 1, 1)]),
        ("internvl", THOUSAND, "not_a_box"),
        (
            "paligemma",
            "<loc0000><loc0512><loc1023><loc1023> a ; <loc0000><loc0000><loc0512><loc0256> b",
            [(0.5, 0, 1023 / 1024, 1023 / 1024), (0, 0, 0.25, 0.5)],
        ),
        ("paligemma", "<loc0000><loc0512><loc1023><loc1024> a", "out_of_range"),
        (
            "florence-2",
            "a<loc_0><loc_0><loc_999><loc_499>",
            [(0.0005, 0.0005, 0.9995, 0.4995)],
        ),
        (
            "kosmos-2",
            "<grounding> It is<phrase> a crab</phrase><object><patch_index_0000>"
            "<patch_index_1023></object>.",
            [(0.5 / 32, 0.5 / 32, 31.5 / 32, 31.5 / 32)],
        ),
        ("kosmos-2", "<object><patch_index_0033><patch_index_0000></object>", "inverted"),
        ("ferret", "the crab [200, 200, 500, 750].", [BOX]),
        # words may hold brackets
        ("ferret", "the [old] crab [200, 200, 500, 750].", [BOX]),
        ("ferret", "the crab [12] [200, 200, 500, 750].", "not_a_box"),
        ("ferret", "[200, 200, 500, 750] is the crab", "not_a_box"),
        ("qwen-vl", "<ref>gate (no. 3, left)</ref><box>(200,200),(500,750)</box>", [BOX]),
        ("qwen2-vl", "the gate (left)(200,200),(500,750)", [BOX]),
        ("qwen2-vl",
         "<|object_ref_start|>(1,2),(3,4)<|object_ref_end|><|box_start|>(200,200),(500,750)"
         "<|box_end|>", [BOX]),
        ("internvl", "<ref>plate [B-12]</ref><box>[[200, 200, 500, 750]]</box>", [BOX]),
        ("internvl", "plate [B-12][[200, 200, 500, 750]]", [BOX]),
        ("gemini", '```json\n[{"box_2d": [200, 200, 750, 500], "label": "x"}]\n```', [BOX]),
        ("gemini", '[{"box_2d": [200, 200, 1001, 500]}]', "out_of_range"),
        ("gemini", '[{"bbox_2d": [200, 200, 750, 500]}]', "not_a_box"),
    ],
)  # fmt: skip
def test_strict_reading(name, text, expected):
    assert strict(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("0-1000", "The box is [200, 200, 500, 750].", [BOX]),
        ("0-1000", "from (200, 200) to (500, 750)", [BOX]),
        ("0-1000", "200 200 500 750", [BOX]),
        ("0-1000", "[500, 750, 200, 200]", [BOX]),
        ("0-1000", "[200, 200, 1040, 750]", [(0.2, 0.2, 1, 0.75)]),
        ("0-1000", "[200, 200, 1800, 750]", [(0.2, 0.2, 1, 0.75)]),
        ("0-1000", "[200, 200, 1801, 750]", "out_of_range"),
        ("0-1000", "[-20, 200, 500, 750]", [(0, 0.2, 0.5, 0.75)]),
        ("0-1000", "[0, 0, 0, 0] or rather [200, 200, 500, 750]", [BOX]),
        ("0-1000", "[200, 200, 200, 750]", "zero_area"),
        ("0-1000", "<think>[1, 2, 3, 4]?</think><answer>[200, 200, 500, 750]</answer>", [BOX]),
        ("0-1000", "3 dogs and 2 cats", "not_a_box"),
        ("0-1000", "  ", "empty"),
        # the frame stays the declared one, whatever the size of the numbers
        ("0-1", THOUSAND, "out_of_range"),
        ("0-1000", "[0.2, 0.2, 0.5, 0.75]", [(0.0002, 0.0002, 0.0005, 0.00075)]),
        ("pixels", "[128, 96, 644, 360]", [(0.2, 0.2, 1, 0.75)]),
        ("qwen3-vl", 'Sure: ["{"bbox_2d": [200, 200, 500, 750], "label": "x"}]', [BOX]),
        ("qwen3-vl", '[{"bbox_2d": [200, 200, 500, 750], "la', [BOX]),
        ("qwen3-vl", THOUSAND, [BOX]),
        ("paligemma", "[200, 200, 600, 400]", [(200 / 1024, 200 / 1024, 400 / 1024, 600 / 1024)]),
        ("kosmos-2", "a <patch_index_0000><patch_index_1023>",
         [(0.5 / 32, 0.5 / 32, 31.5 / 32, 31.5 / 32)]),
        ("kosmos-2", "[0.2, 0.2, 0.5, 0.75]", "not_a_box"),
        # numbers as people and models write them
        ("0-1000", '["200", "200", "500", "750"]', [BOX]),
        ("qwen3-vl", '{"bbox_2d": ["200", "200", "500", "750"]}', [BOX]),
        ("0-1000", "[2e2, 2.00E+2, +500, 750.]", [BOX]),
        ("0-1", "(.2, .2, .5, .75)", [BOX]),
        ("0-1000", "［２００，２００、５００，７５０］", [BOX]),
        ("qwen3-vl", "｛＂bbox_2d＂：［200，200，500，750］｝", [BOX]),
        ("0-1000", "The box is 200, 200, 500, 750.", [BOX]),
        ("0-1000", "[20 %, 20 %, 50 %, 75 %]", "not_a_box"),
        ("pixels", "[1_28, 96, 320, 360]", "not_a_box"),
        # corners by name, whose order is theirs
        ("0-1000", '{"x1": 200, "y1": "200", "x2": 500, "y2": 750}', [BOX]),
        ("0-1000", "xmin=200 ymin=200 xmax=500 ymax=750", [BOX]),
        ("paligemma", "Y1: 256, X1: 512, Y2: 1024, X2: 768", [(0.5, 0.25, 0.75, 1)]),
        ("0-1000", "left: 200, top: 200, right: 500", "not_a_box"),
        ("0-1000", "x1: 200, y1: 200, x2: 50%, y2: 750", "not_a_box"),
        # the end of the text cuts a number off
        ("0-1000", "[200, 200, 500, 75", "not_a_box"),
        ("0-1", "[0.2, 0.2, 0.5, 0.7", "not_a_box"),
        ("0-1", "0.2, 0.2, 0.5, 0.", "not_a_box"),
        ("qwen3-vl", '[{"bbox_2d": ["200", "200", "500", "75', "not_a_box"),
        ("0-1000", '{"x1": 200, "y1": 200, "x2": 500, "y2": 75', "not_a_box"),
        ("0-1000", "[200, 200, 500, 750], [1, 2, 3, 4", [BOX]),
        # a thought without end holds no answer
        ("0-1000", "<think>perhaps [200, 200, 500, 750], or", "empty"),
        ("0-1000", "<THINKING>so <answer>[200, 200, 500, 750]</answer>", "empty"),
        ("0-1000", "[200, 200, 500, 750] <think>or [0, 0, 9, 9]", [BOX]),
        ("0-1000", "<think>[0, 0, 9, 9]</think>[200, 200, 500, 750]", [BOX]),
        # brackets of a label are no box
        ("qwen3-vl", '{"label": "sign [12, 3, 50, 60]", "bbox": [[200, 200, 500, 750]]}', [BOX]),
        ("0-1000", '{"label": "sign [12, 3, 50, 60]", "bbox_2d": [200, 200, 500, 750]}', [BOX]),
        ("0-1000", "{'name': 'sign [12, 3, 50, 60]', 'found': [200, 200, 500, 750]}", [BOX]),
        ("0-1000", '{"label": "sign [12, 3, 50, 60]"}', "not_a_box"),
        ("internvl", "<ref>sign [12, 3, 50, 60]</ref> [200, 200, 500, 750]", [BOX]),
        ("gemini", 'Here:\n```json\n{"box_2d": [200, 200, 750, 500]}', [BOX]),
    ],
)  # fmt: skip
def test_lenient_reading(name, text, expected):
    assert lenient(name, text) == expected


@pytest.mark.parametrize("name", ["nonsense", "location-tokens-1", "location-tokens-x", "0_1000"])
def test_an_unknown_format_lists_all(name):
    with pytest.raises(ValueError, match=f"unknown format '{name}'.*0-1000.*kosmos-2"):
        answer_format(name)


def test_help_shows_frame_and_example_of_each():
    text = describe_formats()
    for declared in FORMATS.values():
        assert declared.name in text and declared.meaning in text and declared.example in text


PIECES = [
    *"0123456789.,-+[](){}<>/|\"' \n\t:;eE",
    "٣",
    "bbox_2d",
    "```json",
    "```",
    "<loc_",
    "<box>",
    "<ref>",
    "</ref>",
    '"label": "',
    "x1: ",
    "y2=",
    "<think>",
    "９",
]
PIECES += ["<loc0123>", "<loc_12>", "<patch_index_0044>", "</think>", "<answer>", "NaN", "1" * 400]
texts = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.builds(str.__add__, st.sampled_from([f.example for f in FORMATS.values()]), st.text()),
)


@pytest.mark.parametrize("name", FORMATS)
@given(text=texts)
@settings(max_examples=100)
@example(text="[" * 5000)
@example(text="\ud800")
def test_no_text_makes_a_reading_raise(name, text):
    for read in (read_strict, read_lenient):
        reading = read(FORMATS[name], text, SIZE)
        assert (reading.failure is None) == bool(reading.boxes)
        for x1, y1, x2, y2 in reading.boxes:
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


@pytest.mark.parametrize(
    "piece",
    [
        "[",
        " ",
        "1 ",
        "1,",
        "(",
        "<loc_1>",
        "a<",
        "`",
        "[1, 2, 3, ",
        "(a",
        "(a)",
        "[1a",
        "<ref>",
        '"label": "a',
        "x1: 1 ",
        "<think>",
        ".1e1 ",
        '"1", ',
    ],
)
def test_long_texts_are_read_in_a_moment(piece):
    start = time.process_time()
    for declared in FORMATS.values():
        read_strict(declared, piece * 5_000, SIZE)
        read_lenient(declared, piece * 5_000, SIZE)
    assert time.process_time() - start < 5


boxes_text = st.lists(st.integers(0, 105), min_size=1, max_size=9)


@given(numbers=boxes_text)
def test_our_own_formats_read_as_our_own_model_does(numbers):
    tokens = "".join(f"<loc_{number}>" for number in numbers)
    integers = f"[{', '.join(str(number * 10) for number in numbers)}]"
    for name, own, text in (
        ("cloc", BoxFormat("location_tokens", 100), tokens),
        ("location-tokens-50", BoxFormat("location_tokens", 50), tokens),
        ("0-999", BoxFormat("integers"), integers),
    ):
        actual, expected = read_strict(answer_format(name), text), own.parse(text)
        assert actual.boxes == expected.boxes
        assert (actual.failure is None) == (expected.failure is None)


def test_patches_are_decoded_as_kosmos_2_does():
    from transformers.models.kosmos2.processing_kosmos2 import patch_index_to_coordinate

    for first, last in np.random.default_rng(0).integers(1024, size=(500, 2)).tolist():
        box = FORMATS["kosmos-2"].coordinates.fractions([first, last], None)
        assert box == pytest.approx(patch_index_to_coordinate(first, last, 32))


def test_bins_are_decoded_as_florence_2_does():
    from transformers.models.florence2.processing_florence2 import Florence2PostProcessor

    bins = SimpleNamespace(quantize_bins=(1000, 1000))
    numbers = torch.randint(1000, (100, 4))
    expected = Florence2PostProcessor.dequantize(bins, numbers, (100_000, 100_000)) / 100_000
    actual = [FORMATS["florence-2"].coordinates.fractions(row, None) for row in numbers.tolist()]
    torch.testing.assert_close(torch.tensor(actual), expected, atol=1e-5, rtol=0)


def test_resized_sizes_are_those_of_qwen():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as expected

    for width, height in np.random.default_rng(0).integers(20, 8000, size=(300, 2)).tolist():
        if max(width, height) / min(width, height) > 200:
            continue
        bounds = {"min_pixels": 56 * 56, "max_pixels": 12845056}
        assert smart_resize(width, height)[::-1] == expected(height, width, **bounds)
