"""Nothing that a visitor or a model wrote reaches the page as HTML."""

from __future__ import annotations

from cloc_mllm.demo.answers import found_html, found_outlines, named_html
from cloc_mllm.demo.engine import Found, FoundBoxes, Named

EVIL = "<img src=x onerror=alert(1)>"
BOX = (0.1, 0.2, 0.3, 0.4)


def answer(*boxes: tuple, text: str = "", failure: str | None = None) -> FoundBoxes:
    return FoundBoxes(boxes if failure else boxes or (BOX,), text, 0.5, failure, 12.3)


def test_texts_are_escaped() -> None:
    found = Found(answer(), answer(text=EVIL, failure=EVIL), 3.0)
    named = Named(EVIL, ((EVIL, 0.9),), "probability", 1.0, 1.0, 0.0)
    for html in (found_html(found), named_html(named)):
        assert "<img" not in html
        assert html.count("&lt;img") == 2


def test_both_answers_are_drawn_and_told_apart() -> None:
    outlines = found_outlines(Found(answer(), answer(), 3.0))
    assert len({outline.color for outline in outlines}) == 2
    assert [outline.tag for outline in outlines] == ["CLOC head", "Language model"]


def test_confidences_are_named_for_what_they_are() -> None:
    html = found_html(Found(answer(), answer(), 3.0))
    assert "confidence 0.50" in html and "similarity 0.50" in html


def test_an_answer_without_a_box_is_said_not_drawn() -> None:
    found = Found(answer(), answer(text="a crab", failure="no box in the answer"), 3.0)
    assert [outline.tag for outline in found_outlines(found)] == ["CLOC head"]
    assert "no box in the answer" in found_html(found)
    assert "a crab" in found_html(found)


def test_all_boxes_of_an_answer_are_drawn_and_listed() -> None:
    found = Found(answer(), answer(BOX, (0.5, 0.5, 0.9, 0.9)), 3.0)
    assert [outline.tag for outline in found_outlines(found)][1:] == ["Language model"] * 2
    assert "[0.10, 0.20, 0.30, 0.40] [0.50, 0.50, 0.90, 0.90]" in found_html(found)


def test_what_is_not_there_is_an_answer_and_no_failure() -> None:
    html = found_html(Found(answer(), answer(failure="not_there"), 3.0))
    assert "not in the image" in html and "failed" not in html


def test_without_a_language_model_only_cloc_answers() -> None:
    found = Found(answer(), None, 0.0)
    named = Named(None, (("crab", 1.0),), "probability", 0.0, 1.0, 0.0)
    assert "Language model" not in found_html(found) + named_html(named)
    assert "already encoded" in found_html(found)
    assert "100.0 %" in named_html(named)
