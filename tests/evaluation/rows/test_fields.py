"""Values as other tools write them."""

from __future__ import annotations

import math

import pytest

from cloc_mllm.evaluation.rows.fields import column, field_value

BOX = [0.2, 0.2, 0.5, 0.75]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("id", 7, "7"),
        ("id", 7.0, "7"),
        ("id", " 7.0 ", "7"),
        ("id", "007", "007"),
        ("image_id", None, None),
        ("raw_text", "two\nlines", "two\nlines"),
        ("raw_text", "", ""),
        ("raw_text", ["text"], "text"),
        ("raw_text", [["text"]], "text"),
        ("raw_text", [1, 2, 3, 4], "[1, 2, 3, 4]"),
        ("raw_text", ["1", "2", "3", "4"], '["1", "2", "3", "4"]'),
        ("raw_text", [{"bbox_2d": [1, 2, 3, 4], "label": "é"}],
         '[{"bbox_2d": [1, 2, 3, 4], "label": "é"}]'),
        ("raw_text", 5, "5"),
        ("failure", "", None),
        ("kind", 3, "3"),
        ("boxes", [BOX], [BOX]),
        ("boxes", BOX, [BOX]),
        ("boxes", ["0.2", ".2", "5e-1", "0.75"], [BOX]),
        ("boxes", "[0.2, 0.2, 0.5, 0.75]", [BOX]),
        ("boxes", "0.2 0.2 0.5 0.75", [BOX]),
        ("boxes", "0.2,0.2; 0.5,0.75", [BOX]),
        ("boxes", [], []),
        ("boxes", None, None),
        ("width", "640", 640),
        ("width", 640.0, 640),
        ("width", "６４０", 640),
        ("width", None, None),
        ("width", math.nan, None),
        ("raw_text", math.nan, None),
        ("confidence", "0.7", 0.7),
        ("confidence", "", None),
        ("labels", "crab", ["crab"]),
        ("labels", "[old] crab", ["[old] crab"]),
        ("labels", '["crab", 5]', ["crab", "5"]),
        ("labels", ["crab", 5.0], ["crab", "5"]),
        ("scores", "[0.5, 1]", [0.5, 1]),
        ("settings", '{"resized_width": "3"}', {"resized_width": "3"}),
    ],
)  # fmt: skip
def test_a_value_with_one_meaning_is_taken(name, value, expected):
    assert field_value(name, value) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("id", True, "expected a text or a number in the column id, got 'True'"),
        ("id", [1], "expected a text or a number in the column id"),
        ("raw_text", True, "expected one text in the column raw_text, got 'True'"),
        ("raw_text", ["one", "two"], "expected one text in the column raw_text"),
        ("boxes", [[1, 2, 3]], "expected JSON in the column boxes: four numbers"),
        ("boxes", [BOX, "x"], "in the column boxes: four numbers"),
        ("boxes", {"x1": 1}, "in the column boxes: four numbers"),
        ("boxes", [[0.1, float("nan"), 0.2, 0.3]], "in the column boxes: four numbers"),
        ("boxes", [[True, 0, 1, 1]], "in the column boxes: four numbers"),
        ("width", "wide", "expected a whole number in the column width, got 'wide'"),
        ("width", 640.5, "expected a whole number in the column width, got '640.5'"),
        ("width", -1, "expected a whole number in the column width"),
        ("confidence", "high", "expected a number in the column confidence, got 'high'"),
        ("confidence", float("inf"), "expected a number in the column confidence"),
        ("labels", [None], "expected a text or a list of texts in the column labels"),
        ("scores", "0.5", "expected JSON in the column scores: a list of numbers"),
        ("settings", "[1]", "expected JSON in the column settings: an object"),
    ],
)
def test_another_value_is_refused_in_one_line(name, value, message):
    with pytest.raises(ValueError, match=message) as refused:
        field_value(name, value)
    assert "\n" not in str(refused.value)


def test_columns_inside_others():
    row = {"a.b": 1, "doc": {"box": [5, 6], "a": {"b": 2}}, "answers": [["x"], ["y"]]}
    assert column(row, "a.b") == 1
    assert column(row, "doc.a.b") == 2
    assert column(row, "doc.box.1") == 6
    assert column(row, "answers.1.0") == "y"
    for path in ("doc.c", "answers.2", "answers.-1", "a", "doc.box.x", ""):
        with pytest.raises(KeyError):
            column(row, path)
