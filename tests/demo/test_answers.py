"""Nothing that a visitor or a model wrote reaches the page as HTML."""

from __future__ import annotations

from cloc_mllm.demo.answers import grounding_html, marks_of, named_html, needs_language_model
from cloc_mllm.demo.engine import Found, FoundBoxes, Grounding, Named

EVIL = "<img src=x onerror=alert(1)>"
BOX = (0.1, 0.2, 0.3, 0.4)
OTHER = (0.5, 0.5, 0.9, 0.9)


def answer(*boxes: tuple, text: str = "", failure: str | None = None) -> FoundBoxes:
    boxes = boxes if failure else boxes or (BOX,)
    return FoundBoxes(boxes, (0.5,) * len(boxes), text, failure, 12.3)


def grounding(*found: Found, writing: str | None = None) -> Grounding:
    return Grounding(found, writing, 3.0)


def test_texts_are_escaped() -> None:
    found = grounding(
        Found(EVIL, answer(), answer(text=EVIL, failure=EVIL)), Found("a", answer()), writing=EVIL
    )
    named = Named(((EVIL, 0.9),), "probability", 1, None, EVIL, 0.0, 1.0)
    for html, count in ((grounding_html(found), 4), (named_html(named), 2)):
        assert "<img" not in html
        assert html.count("&lt;img") == count


def test_each_phrase_has_a_colour_and_its_boxes_share_it() -> None:
    marks = marks_of(grounding(Found("a", answer(BOX, OTHER)), Found("b", answer())))
    assert [(mark.tag, mark.group) for mark in marks] == [("a", 0), ("a", 0), ("b", 1)]
    assert len({(mark.group, mark.color) for mark in marks}) == 2


def test_the_language_models_boxes_lie_on_top_of_dashed_ones() -> None:
    marks = marks_of(grounding(Found("a", answer(), answer(OTHER)), Found("b", answer())))
    assert [mark.dashed for mark in marks] == [True, False, False]
    assert [mark.tag for mark in marks if mark.group == 0] == ["", "a"]


def test_scores_are_named_for_what_they_are() -> None:
    html = grounding_html(grounding(Found("a", answer(), answer())))
    assert "confidence 0.50" in html and "similarity 0.50" in html
    low = FoundBoxes((BOX,), (0.1,), "", None, 1.0)
    assert "perhaps not in the image" in grounding_html(grounding(Found("a", low)))


def test_an_answer_without_a_box_is_said_not_drawn() -> None:
    found = grounding(Found("a", answer(), answer(text="hm", failure="no box in the answer")))
    assert [mark.dashed for mark in marks_of(found)] == [True]
    assert "no box in the answer" in grounding_html(found) and "hm" in grounding_html(found)


def test_what_is_not_there_is_an_answer_and_no_failure() -> None:
    html = grounding_html(grounding(Found("a", answer(), answer(failure="not_there"))))
    assert "not in the image" in html and "failed" not in html


def test_without_a_language_model_only_cloc_answers() -> None:
    found = Grounding((Found("a", answer()),), None, 0.0)
    named = Named((("crab", 1.0),), "probability", 1, BOX, None, 0.0, 1.0)
    assert "Language model" not in grounding_html(found) + named_html(named)
    assert "already encoded" in grounding_html(found)
    assert "100.0 %" in named_html(named) and "learnt boxes alone" in named_html(named)


def test_what_needs_a_language_model_names_the_command() -> None:
    assert "cloc-mllm demo --model scenes" in needs_language_model("This")
