"""Reading and scoring captions with boxes."""

from __future__ import annotations

from cloc_mllm.data.records import Record, Region
from grounded_captions import Score, score, things_of, true_things

LEFT, RIGHT, TOP = (0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.3)
RECORD = Record(
    "1",
    b"",
    10,
    10,
    ["Two dogs under a kite ."],
    [
        Region(LEFT, "Two dogs", group="1"),
        Region(RIGHT, "Two dogs", group="1"),
        Region(TOP, "a kite", expressions=["the red toy"], group="2"),
    ],
    "test",
)


def said(*pieces: str) -> tuple[str, list[tuple[int, int]]]:
    """Joins pieces; those that are `#` are boxes."""
    spans, text = [], ""
    for piece in pieces:
        if piece == "#":
            spans.append((len(text), len(text) + 1))
        text += piece
    return text, spans


def test_words_before_boxes_name_them() -> None:
    text, spans = said("<p>Two dogs</p>", "#", "#", " under the red toy ", "#", ".")
    caption, things = things_of(text, spans, [LEFT, RIGHT, TOP])
    assert caption == "two dogs under the red toy"
    assert [(thing.heads, thing.boxes) for thing in things] == [
        ({"dog"}, [LEFT, RIGHT]),
        ({"toy"}, [TOP]),
    ]
    assert score(things, true_things(RECORD)) == Score(2, 2, 2, 2)


def test_a_right_name_in_a_wrong_place_a_wrong_name_and_a_name_said_twice() -> None:
    text, spans = said("a dog", "#", " a cat", "#", " a kite", "#", " a kite", "#")
    _, things = things_of(text, spans, [TOP, LEFT, TOP, TOP])
    actual = score(things, true_things(RECORD))
    assert actual == Score(num_said=4, num_named_right=3, num_right=1, num_true=2)
    assert actual.f1 == 2 * 1 / 6


def test_words_alone_name_nothing() -> None:
    assert things_of("A dog runs.", [], []) == ("a dog runs", [])
    assert score([], true_things(RECORD)).f1 == 0
