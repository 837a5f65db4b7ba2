"""Chats of the smallest real model, token by token."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from PIL import Image

from cloc_mllm.config import BoxReader, ConversationConfig, MllmConfig
from cloc_mllm.geometry import Boxes, elementwise_iou
from cloc_mllm.inference.chat import Chat, PromptTooLong, answer_chat
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.results import Answer
from cloc_mllm.inference.sampling import Sampling
from cloc_mllm.mllm import build_mllm

PICTURE = Image.new("RGB", (96, 48), "teal")
IMAGE = {"type": "image"}


def user(*items: str | dict) -> dict:
    content = [item if isinstance(item, dict) else {"type": "text", "text": item} for item in items]
    return {"role": "user", "content": content}


def ask(predictor: GroundingPredictor, chat: Chat, **sampling) -> tuple[Answer, list[str]]:
    pieces: list[str] = []
    answer = answer_chat(
        predictor, chat, Sampling(**{"max_new_tokens": 48, **sampling}), pieces.append
    )
    return answer, pieces


def test_a_chat_of_one_question_has_the_predictors_answer(predictor: GroundingPredictor) -> None:
    for question in ("Where is the crab?", "What is there?"):
        actual, pieces = ask(
            predictor, Chat([user(IMAGE, question)], [PICTURE], [Boxes.normalized([])])
        )
        expected = predictor.ask(PICTURE, question)
        assert actual.text == "".join(pieces) == expected.text
        assert actual.boxes.frame == expected.boxes.frame and actual.spans == expected.spans
        torch.testing.assert_close(actual.boxes.xyxy, expected.boxes.xyxy)
        torch.testing.assert_close(actual.scores, expected.scores, atol=1e-4, rtol=0)
        counts = ("num_prompt_tokens", "num_new_tokens", "finish_reason", "failure")
        assert [getattr(actual, c) for c in counts] == [getattr(expected, c) for c in counts]


@pytest.mark.parametrize(
    ("written", "stop", "expected", "reason"),
    [
        ("a red apple", (), "a red apple", "stop"),
        ("a red apple", ("apple",), "a red", "stop"),
        ("a red apple", ("d a", "pple"), "a re", "stop"),
        ("a red apple", ("apples",), "a red apple", "stop"),
        ("  a  é🦀 ", (), "a  é🦀", "stop"),
        ("a" * 60, (), "a" * 48, "length"),
        ("", (), "", "stop"),
    ],
    ids=["end", "stop", "first stop", "stop not reached", "bytes and blanks", "length", "empty"],
)
def test_pieces_join_to_the_text_and_stop_words_are_cut(
    predictor, always, written: str, stop: tuple[str, ...], expected: str, reason: str
) -> None:
    always(written)
    answer, pieces = ask(predictor, Chat([user("Say it.")]), stop=stop)
    assert (answer.text, answer.finish_reason) == (expected, reason)
    assert "".join(pieces) == expected
    assert len(pieces) == answer.num_new_tokens + 1
    assert not any("\ufffd" in piece for piece in pieces)


def test_boxes_between_words_are_found_with_their_confidence(predictor, always) -> None:
    good, inverted = "<loc_0><loc_5><loc_19><loc_10>", "<loc_9><loc_5><loc_3><loc_10>"
    always(f"a crab {good} and {inverted} {good}{good}")
    answer, _ = ask(predictor, Chat([user("What is there?")]))
    texts = [answer.text[start:end] for start, end in answer.spans]
    assert texts == [good, "<loc_9><loc_5><loc_10><loc_10>", good, good]  # held to the grammar
    assert not answer.box_failures and answer.failure == "not_a_box"
    assert answer.boxes.image_wh is None  # there is no picture
    for index in (0, 2, 3):
        assert answer.boxes.xyxy[index].tolist() == pytest.approx([0, 5 / 19, 1, 10 / 19])
        assert answer.scores[index] == pytest.approx(0.9, abs=1e-4)


def test_a_box_cut_by_the_limit_is_a_failure(predictor, always) -> None:
    always("<loc_0><loc_5><loc_19><loc_10> <loc_0><loc_5><loc_19><loc_10>")
    answer, _ = ask(predictor, Chat([user("What is there?")]), max_new_tokens=7)
    assert len(answer.boxes) == len(answer.box_failures) == 1
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("reader", ["state", "prompter"])
def test_a_box_head_is_read_where_the_token_stands(
    mllm_config: MllmConfig, reader: BoxReader
) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(mllm_config, box_head=True, box_reader=reader)
    model, processor = build_mllm(config)
    predictor = GroundingPredictor(model, processor)
    expected = predictor.ground(PICTURE, ["the crab"])
    tokens = iter([model.config.box_token_id, processor.tokenizer.eos_token_id])
    head = model.get_output_embeddings()

    def only_a_box(_, inputs, logits):
        logits[..., :] = -1e4
        logits[..., next(tokens)] = 0.0

    hook = head.register_forward_hook(only_a_box)
    chat = Chat([user(IMAGE, "Where is the crab?")], [PICTURE], [Boxes.normalized([])])
    answer, _ = ask(predictor, chat)
    hook.remove()
    assert (answer.text, answer.spans) == ("<box>", [(0, 5)])
    torch.testing.assert_close(answer.boxes.xyxy, expected.boxes.xyxy, check_dtype=False)
    torch.testing.assert_close(answer.scores, expected.scores, check_dtype=False)


@pytest.mark.parametrize("reader", ["state", "prompter"])
def test_a_model_that_likes_to_go_on_writes_no_box_twice(
    mllm_config: MllmConfig, reader: BoxReader
) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(mllm_config, box_head=True, box_reader=reader)
    model, processor = build_mllm(config, ConversationConfig(several=1.0))
    predictor = GroundingPredictor(model, processor)

    def box_rather_than_end(_, inputs, logits):
        logits[..., :] = -1e4
        logits[..., processor.tokenizer.eos_token_id] = -1.0
        logits[..., model.config.box_token_id] = 0.0

    hook = model.get_output_embeddings().register_forward_hook(box_rather_than_end)
    chat = Chat([user(IMAGE, "Where are they?")], [PICTURE], [Boxes.normalized([])])
    served, _ = ask(predictor, chat)
    asked = predictor.ask(PICTURE, "Where are they?")
    found = predictor.ground(PICTURE, ["they", "those"])
    hook.remove()
    for answer in (served, asked):
        boxes = answer.boxes.xyxy
        for place in range(1, len(boxes)):
            assert elementwise_iou(boxes[:place], boxes[place].expand(place, 4)).max() <= 0.7
        assert answer.finish_reason == "stop" and 0 < len(boxes) < 32
        assert answer.text == "<box>" * len(boxes)
    torch.testing.assert_close(served.boxes.xyxy, asked.boxes.xyxy)
    assert all(text == "<box>" * text.count("<box>") for text in found.text)


def test_turns_images_and_regions_are_read_in_order(predictor: GroundingPredictor) -> None:
    other = Image.new("RGB", (40, 80), "red")
    left, right = Boxes.normalized([[0, 0, 0.5, 1]]), Boxes.normalized([[0.5, 0, 1, 1]])
    turns = [user(IMAGE, "What is in <region>?"), {"role": "assistant", "content": "a crab"}]
    turns.append(user(IMAGE, "And in <region>?"))
    chat = Chat(turns, [PICTURE, other], [left, right])
    text = predictor.processor.render(turns, add_generation_prompt=True)
    inputs = predictor.processor([[PICTURE, other]], [text], [[left, right]])
    # as training splits the turns: all before the last answer
    taught, labels = predictor.processor.encode_conversation([*turns, turns[1]])
    answered = list(itertools.takewhile(lambda label: label != -100, reversed(labels)))
    inputs |= predictor.processor.pad([taught[: -len(answered)]])
    tokens = predictor.model.generate(**inputs, max_new_tokens=48)[
        0, inputs["input_ids"].shape[1] :
    ]
    answer, _ = ask(predictor, chat)
    assert answer.text == predictor.processor.decode_answer(tokens)
    assert answer.num_prompt_tokens == inputs["input_ids"].shape[1]


def test_sampling_follows_its_seed(predictor: GroundingPredictor) -> None:
    chat = Chat([user("Say something.")])
    draws = {seed: ask(predictor, chat, temperature=2.0, seed=seed)[0].text for seed in range(4)}
    assert len(set(draws.values())) > 1
    assert ask(predictor, chat, temperature=2.0, seed=2)[0].text == draws[2]


def test_a_prompt_that_fills_the_context_is_refused(predictor: GroundingPredictor) -> None:
    with pytest.raises(PromptTooLong, match="context holds 256"):
        ask(predictor, Chat([user("a crab " * 200)]))


def test_an_answer_ends_where_the_context_does(predictor, always) -> None:
    always("a" * 300)
    answer, _ = ask(predictor, Chat([user("Say it.")]), max_new_tokens=1000)
    assert answer.finish_reason == "length"
    assert answer.num_prompt_tokens + answer.num_new_tokens == 256


def test_what_a_listener_raises_ends_the_answer(predictor: GroundingPredictor) -> None:
    def refuse(piece: str) -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        answer_chat(predictor, Chat([user("Say it.")]), Sampling(), refuse)
