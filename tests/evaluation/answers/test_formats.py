"""Formats that users define, and writing as the inverse of reading."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloc_mllm.evaluation.answers import FORMATS, answer_format, read_lenient, read_strict

BOX = (0.2, 0.2, 0.5, 0.75)
SIZE = (640.0, 480.0)

OWN = {
    "yxyx in JSON": ({"order": "yxyx", "scale": 1000, "key": "at"}, '{"at": [200, 200, 750, 500]}'),
    "xywh": ({"order": "xywh", "scale": "pixels"}, "[128, 96, 192, 264]"),
    "cxcywh": ({"order": "cxcywh", "scale": 1}, "[0.35, 0.475, 0.3, 0.55]"),
    "brackets": ({"scale": 100, "brackets": "()"}, "(20, 20, 50, 75)"),
    "two brackets": ({"scale": 100, "brackets": "[[]]"}, "[[20, 20, 50, 75]]"),
    "words": ({"scale": "100", "brackets": ["<b>", "</b>"]}, "<b>20,20,50,75</b>"),
    "pattern": ({"scale": 100, "pattern": r"L(\d+) T(\d+) R(\d+) B(\d+)"}, "L20 T20 R50 B75"),
    "percent": ({"scale": 100, "brackets": ["100%<", ">"]}, "100%<20, 20, 50, 75>"),
    "resized": ({"scale": "resized-pixels", "order": "yxyx"}, "[96, 128, 360, 320]"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_format_of_ones_own_is_read(name):
    definition, text = OWN[name]
    declared = answer_format(json.dumps(definition))
    for read in (read_strict, read_lenient):
        assert read(declared, text, SIZE).boxes[0] == pytest.approx(BOX)
    assert read_strict(declared, f"it is {text}", SIZE).failure == "not_a_box"
    assert read_lenient(declared, f"it is {text}", SIZE).boxes[0] == pytest.approx(BOX)


def test_a_definition_in_a_file(tmp_path):
    (tmp_path / "mine.json").write_text('{"order": "yxyx", "scale": 1000, "key": "where"}')
    (tmp_path / "mine.YAML").write_text("order: yxyx\nscale: 1000\nkey: where\n")
    for name in ("mine.json", "mine.YAML"):
        declared = answer_format(str(tmp_path / name))
        assert declared.example == '[{"where": [200, 200, 750, 500]}]'
        assert declared.meaning == "yxyx, n / 1000 of the original image"
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        answer_format(str(tmp_path / "other.json"))


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ('{"scale": 1000', "no valid JSON"),
        ('{"order": "yxyx"}', "scale must be a positive number .* got None"),
        ('{"scale": 0}', "scale must be .* got 0"),
        ('{"scale": true}', "scale must be .* got True"),
        ('{"scale": "points"}', "scale must be .* got 'points'"),
        ('{"scale": 1, "order": "xyhw"}', "order must be xyxy, yxyx, xywh, cxcywh, got 'xyhw'"),
        ('{"scale": 1, "order": ["xyxy"]}', "order must be"),
        ('{"scale": 1, "keys": "box"}', "expected an object with scale and some of order, scale"),
        ('{"scale": 1, "key": "a", "brackets": "()"}', r"one of key, brackets and pattern, got \["),
        ('{"scale": 1, "key": 3}', "key must be a text, got 3"),
        ('{"scale": 1, "brackets": "["}', r"brackets must be two alike in length.* got '\['"),
        ('{"scale": 1, "brackets": ""}', "brackets must be"),
        ('{"scale": 1, "pattern": "("}', "pattern is no regular expression"),
        ('{"scale": 1, "pattern": 3}', "pattern is no regular expression"),
        ('{"scale": 1, "pattern": "(.)(.)"}', "pattern must have four groups.* got 2"),
    ],
)  # fmt: skip
def test_a_wrong_definition_is_refused_in_one_line(definition, message):
    with pytest.raises(ValueError, match=message) as refused:
        answer_format(definition)
    assert "\n" not in str(refused.value)


sides = st.tuples(st.integers(0, 880), st.integers(60, 120)).map(
    lambda side: (side[0] / 1000, (side[0] + side[1]) / 1000)
)
DEFINED = {
    f"{order} {scale} {kind}": json.dumps({"order": order, "scale": scale, **how})
    for order in ("xyxy", "yxyx", "xywh", "cxcywh")
    for scale in (1, 100, 1000, "pixels", "resized-pixels")
    for kind, how in {
        "list": {},
        "JSON": {"key": 'a "key"'},
        "tags": {"brackets": ["<b", "b>"]},
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("name", [*FORMATS, *DEFINED])
@given(x=sides, y=sides)
@settings(max_examples=20)
def test_what_is_written_is_read_again_to_the_nearest_step(name, x, y):
    declared = answer_format(DEFINED.get(name, name))
    box = (x[0], y[0], x[1], y[1])
    coordinates = declared.coordinates
    if coordinates.kind == "patches":
        step = 1 / 32
    elif coordinates.needs_size:
        step = 1 / min(SIZE)
    else:
        step = max(1 / coordinates.divisor, 0.001) if coordinates.divisor > 1 else 0.001
    tolerance = (
        step if coordinates.order == "cxcywh" or coordinates.kind == "patches" else 0.5 * step
    )
    if coordinates.order == "xywh":
        tolerance = step  # the rounded corner and the rounded side add up
    text = declared.write(box, SIZE)
    for read in (read_strict, read_lenient):
        reading = read(declared, text, SIZE)
        assert reading.failure is None
        assert reading.boxes[0] == pytest.approx(box, abs=tolerance + 1e-9)


def test_a_pattern_cannot_be_written():
    declared = answer_format('{"scale": 1, "pattern": "(.) (.) (.) (.)"}')
    assert declared.write(BOX) == declared.example == ""


def test_the_page_lists_each_format_with_its_example(project_root):
    page = (project_root / "docs" / "how-to" / "score.md").read_text(encoding="utf-8")
    for declared in FORMATS.values():
        example = declared.example.replace("|", r"\|")
        assert f"| `{declared.name}` | {declared.meaning} | `{example}` |" in page
