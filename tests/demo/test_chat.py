"""Chats about a picture, on the smallest real models."""

from __future__ import annotations

import pytest

from cloc_mllm.demo.chat import MAX_TURNS, Mention, Turn, chat
from cloc_mllm.demo.engine import DemoEngine
from cloc_mllm.demo.pictures import Picture, example_pictures
from cloc_mllm.demo.strokes import Stroke
from cloc_mllm.demo.tabs.chat import marks_of, talk_html
from cloc_mllm.inference.chat import Chat, answer_chat
from cloc_mllm.inference.sampling import Sampling

BOX = (0.1, 0.2, 0.3, 0.4)
DRAWN = Stroke("box", ((0.1, 0.2), (0.3, 0.4)))


@pytest.fixture(scope="module")
def picture() -> Picture:
    return example_pictures("scenes")[0]


def test_turns_are_answered_as_one_chat(full_engine: DemoEngine, picture: Picture) -> None:
    first = list(chat(full_engine, picture, (), "What?", DRAWN))[-1]
    assert first.box == BOX
    first = Turn("What?", BOX, "a crab")  # what the model of this test writes fills its context
    *heard, second = chat(full_engine, picture, (first,), "Where is it?", None)
    assert heard and all(second.text.startswith(turn.text.strip()) for turn in heard)

    grounding = full_engine.grounding
    assert grounding is not None
    write_box = grounding.processor.coordinates.encode
    texts = [f"What? {write_box(BOX)} <region>", first.text, "Where is it?"]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in zip(["user", "assistant", "user"], texts, strict=True)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    request = Chat(messages, [picture.image], [[BOX]])
    expected = answer_chat(grounding, request, Sampling(128), lambda piece: None)
    assert second.text == expected.text


def test_what_cannot_be_asked(
    full_engine: DemoEngine, cloc_engine: DemoEngine, picture: Picture
) -> None:
    with pytest.raises(ValueError, match="needs a language model"):
        next(chat(cloc_engine, picture, (), "Hi", None))
    with pytest.raises(ValueError, match="leave it out"):
        next(chat(full_engine, picture, (), "the <image>", None))
    with pytest.raises(ValueError, match="start a new one"):
        next(chat(full_engine, picture, [Turn("a", None, "b")] * MAX_TURNS, "Hi", None))
    long = [Turn("crab " * 50, None, "boat " * 50)] * 9
    with pytest.raises(ValueError, match="shorten"):
        next(chat(full_engine, picture, long, "Hi", None))


def test_boxes_of_all_turns_are_numbered_and_texts_escaped() -> None:
    turns = (
        Turn("<b>?", BOX, "<i> [1] and [2]", (Mention(4, 7, BOX, 0.9), Mention(12, 15, BOX, 0.8))),
        Turn("more", None, "[3]", (Mention(0, 3, BOX, 0.7),)),
    )
    marks = marks_of(turns)
    assert [mark.tag for mark in marks] == ["1", "2", "3", "4"]
    assert [mark.score for mark in marks] == [None, 0.9, 0.8, 0.7]
    html = talk_html(turns)
    assert "&lt;b&gt;?" in html and "&lt;i&gt; <button" in html and "[" not in html
    assert html.count("<button") == 4
