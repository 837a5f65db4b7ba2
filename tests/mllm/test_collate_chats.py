"""Chats in batches: labels are the assistant's words, pictures and regions go where they belong."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from cloc_mllm.config import ConversationConfig, MllmConfig
from cloc_mllm.data.chats import Chat, ChatImage, Piece, Turn, image_mark, words, write_turn
from cloc_mllm.data.records import Record
from cloc_mllm.geometry import Boxes
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.losses import IGNORE_INDEX
from tests.mllm.test_collate import answers_in

CONFIG = ConversationConfig(questions_per_image=2, max_length=600)
LEFT, RIGHT = (0.0, 0.1, 0.4, 0.9), (0.5, 0.2, 1.0, 0.7)


def turn(role: Any, *pieces: Piece | str) -> Turn:
    return Turn(role, tuple(words(p) if isinstance(p, str) else p for p in pieces))


def place(image: int, *boxes: Any, phrase: str = "") -> Piece:
    return Piece("place", "?", image, phrase, tuple(boxes))


@pytest.fixture
def chats(tiny_scenes: list[Record]) -> list[Chat]:
    images = [ChatImage(r.image, r.width, r.height, r.id) for r in tiny_scenes[:2]]
    two = [
        turn("system", "Be brief."),
        turn("user", image_mark(0), image_mark(1), "What is in ", place(1, LEFT), " and in ",
             place(0, RIGHT), "?"),
        turn("assistant", "A crab ", place(0, LEFT, RIGHT, phrase="and two boats"), ", 猫."),
        turn("user", "And ", place(0, LEFT), "?"),
        turn("assistant", "\n[0.1, 0.2] is no box"),
    ]  # fmt: skip
    one = [turn("user", image_mark(0), "\nWhere?"), turn("assistant", place(0, LEFT))]
    text = [turn("user", "Hi"), turn("assistant", "Hello\n\n| a | b |")]
    return [
        Chat("two", images, two, "llava"),
        Chat("one", images[:1], one, "llava"),
        Chat("text", [], text, "llava"),
    ]


FORMATS = [
    {"box_format": "integers"},
    {"box_format": "location_tokens"},
    {"box_format": "location_tokens", "box_head": True},
    {"box_format": "location_tokens", "box_head": True, "box_reader": "prompter"},
]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "changes", FORMATS, ids=["integers", "location tokens", "box head", "prompter"]
)
def test_labels_decode_to_exactly_the_words_of_the_assistant(
    mllm_config: MllmConfig, chats: list[Chat], changes: dict[str, Any], pack: bool
) -> None:
    model, processor = build_mllm(replace(mllm_config, **changes))
    batch = ConversationCollator(processor, replace(CONFIG, pack=pack))(list(enumerate(chats)))
    by_id = {chat.id: chat for chat in chats}
    expected = [
        write_turn(of, processor.coordinates).strip()
        for chat_id in batch.ids
        for of in by_id[chat_id].turns
        if of.role == "assistant"
    ]
    actual = answers_in(batch.inputs["labels"], processor)
    # the tiny tokenizer writes a blank before each text that follows a token of its own
    assert [re.sub(r"(?<=>) ", "", text) for text in actual] == expected
    assert batch.num_dropped == 0
    model.train()(**batch.inputs).loss.backward()
    if processor.box_head:
        boxes = [
            box
            for chat_id in batch.ids
            for of in by_id[chat_id].turns
            if of.role == "assistant"
            for piece in of.pieces
            for box in piece.boxes
        ]
        assert batch.inputs["answer_boxes"].tolist() == [pytest.approx(box) for box in boxes]
        assert len(batch.inputs["answer_image_index"]) == len(boxes)


def test_regions_stand_in_the_order_in_which_the_question_mentions_them(
    mllm_config: MllmConfig, chats: list[Chat]
) -> None:
    _, processor = build_mllm(mllm_config)
    inputs = ConversationCollator(processor, CONFIG)([(0, chats[0])]).inputs
    expected_images = [1, 0, 0]
    assert inputs["region_image_index"].tolist() == expected_images
    for box, image, region in zip(
        (LEFT, RIGHT, LEFT), expected_images, inputs["region_boxes"], strict=True
    ):
        of = chats[0].images[image]
        view = processor.views((of.width, of.height))[0]
        torch.testing.assert_close(region, view.to_canvas(Boxes.normalized([box])).xyxy[0].float())
    region_id = processor.tokenizer.convert_tokens_to_ids("<region>")
    assert int((inputs["input_ids"] == region_id).sum()) == 3
    without = ConversationCollator(processor, replace(CONFIG, region_tokens=False))([(0, chats[0])])
    assert int((without.inputs["input_ids"] == region_id).sum()) == 0
    assert len(without.inputs["region_boxes"]) == 0


@pytest.mark.parametrize("changes", FORMATS[1:], ids=["written", "head", "prompter"])
def test_packed_chats_and_records_have_the_loss_and_gradients_of_single_ones(
    mllm_config: MllmConfig, chats: list[Chat], tiny_scenes: list[Record], changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, processor = build_mllm(replace(mllm_config, **changes))
    model.train()
    items: list[Any] = list(enumerate([*chats, tiny_scenes[2], tiny_scenes[0]]))
    packed = ConversationCollator(processor, CONFIG)(items)
    assert len(packed.inputs["input_ids"]) < len(items)
    actual = model(**packed.inputs, num_items_in_batch=1).loss
    actual.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected = torch.tensor(0.0)
    for item in items:
        single = ConversationCollator(processor, CONFIG)([item])
        expected = expected + model(**single.inputs, num_items_in_batch=1).loss
    expected.backward()
    torch.testing.assert_close(actual, expected)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # sums of other orders, as for records: see test_collate
            tolerance = 1e-5 * float(parameter.grad.abs().max()) + 1e-8
            torch.testing.assert_close(gradients[name], parameter.grad, atol=tolerance, rtol=0)


def test_a_batch_of_texts_alone(mllm_config: MllmConfig, chats: list[Chat]) -> None:
    model, processor = build_mllm(mllm_config)
    batch = ConversationCollator(processor, CONFIG)([(0, chats[2]), (1, chats[2])])
    assert "pixel_values" not in batch.inputs
    loss = model.train()(**batch.inputs).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_a_picture_that_is_shown_twice_is_prepared_once(
    mllm_config: MllmConfig, chats: list[Chat]
) -> None:
    _, processor = build_mllm(mllm_config)
    batch = ConversationCollator(processor, CONFIG)([(0, chats[0]), (1, chats[1])])
    assert len(batch.inputs["pixel_values"]) == 2
    assert sorted(batch.inputs["image_index"].tolist()) == [0, 0, 1]


def test_a_long_chat_is_cut_between_turns_and_counted(mllm_config: MllmConfig) -> None:
    _, processor = build_mllm(mllm_config)
    ask, tell = turn("user", "Hi"), turn("assistant", "Hello")
    long = Chat("long", [], [ask, tell] * 5_000, "llava")
    batch = ConversationCollator(processor, replace(CONFIG, max_length=100))([(0, long)])
    answers = answers_in(batch.inputs["labels"], processor)
    assert answers == ["Hello"] * len(answers) and len(answers) > 2
    assert batch.inputs["input_ids"].shape[1] <= 100
    assert batch.num_dropped == 5_000 - len(answers)
    with pytest.raises(ValueError, match=r"chat long: conversations\.max_length 5 does not hold"):
        ConversationCollator(processor, replace(CONFIG, max_length=5))([(0, long)])


def test_questions_are_never_learnt(mllm_config: MllmConfig, chats: list[Chat]) -> None:
    _, processor = build_mllm(mllm_config)
    inputs = ConversationCollator(processor, CONFIG)([(0, chats[2])]).inputs
    learnt = inputs["labels"] != IGNORE_INDEX
    unlearnt = processor.tokenizer.decode(inputs["input_ids"][~learnt])
    assert "Hi" in unlearnt and "Hello" not in unlearnt
