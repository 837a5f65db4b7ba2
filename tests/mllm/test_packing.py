"""Questions packed behind one image, rows packed into a sequence: the loss of each one alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cloc_mllm.config import LoraConfig, MllmConfig
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor, build_mllm
from cloc_mllm.mllm.losses import IGNORE_INDEX, answer_loss
from cloc_mllm.mllm.packing import (
    PackedRow,
    balanced_sequences,
    pack_questions,
    pad_sequences,
)

IMAGE = 9
X = IGNORE_INDEX
QUESTIONS = [
    ([1, IMAGE, IMAGE, 4, 5, 6], [X, X, X, X, 5, 6]),
    ([1, IMAGE, IMAGE, 7, 8], [X, X, X, X, 8]),
    ([1, IMAGE, IMAGE, 2, 3, 4, 5], [X, X, X, X, X, 4, 5]),
]


def test_packed_row() -> None:
    row = pack_questions(QUESTIONS[:2], IMAGE, max_length=20)
    assert row.input_ids == [1, IMAGE, IMAGE, 4, 5, 6, 7, 8]
    assert row.labels == [X, X, X, X, 5, 6, X, 8]
    assert row.position_ids == [0, 1, 2, 3, 4, 5, 3, 4]
    assert row.segments == [0, 0, 0, 1, 1, 1, 2, 2]
    assert row.kept == [0, 1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("together", [False, True], ids=["a row each", "one sequence"])
def test_packing_changes_neither_loss_nor_gradient(attention: str, together: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
            attn_implementation=attention,
        )
    )
    weight = model.model.layers[0].self_attn.k_proj.weight

    expected = torch.tensor(0.0)
    for ids, labels in QUESTIONS:
        logits = model(torch.tensor([ids])).logits
        expected = expected + answer_loss(logits, torch.tensor([labels]))
    (expected_gradient,) = torch.autograd.grad(expected, weight)

    rows = [pack_questions(QUESTIONS[:2], IMAGE, 20), pack_questions(QUESTIONS[2:], IMAGE, 20)]
    batch = pad_sequences([rows] if together else [[row] for row in rows], pad_token_id=0)
    labels = batch.pop("labels")
    actual = answer_loss(model(**batch).logits, labels)
    (actual_gradient,) = torch.autograd.grad(actual, weight)

    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_gradient, expected_gradient)


RED, BLUE, TEAL = (
    Image.new("RGB", size, color)
    for size, color in (((40, 30), "red"), ((30, 60), "blue"), ((50, 50), "teal"))
)
BOX, OTHER = (0.1, 0.1, 0.4, 0.6), (0.5, 0.2, 0.9, 0.8)


@dataclasses.dataclass
class Chat:
    """Questions behind the same pictures; `regions` as the processor wants them."""

    questions: list[tuple[str, str]]
    images: list[Image.Image]
    regions: list[Any]
    answer_boxes: list[Any]


CHATS = [
    Chat([("Where is the crab?", "<box>"), ("Describe.", "a crab")], [RED], [], [BOX]),
    Chat([("nothing but words", "a clock and a boat, left of a red apple")], [], [], []),
    Chat([("What is in <region>?", "an apple")], [BLUE], [OTHER], []),
    Chat([("Where is <region>, or <region>?", "<box>")], [TEAL, RED], [[OTHER], [BOX]], [OTHER]),
    Chat([("<region>?", "<box>"), ("<region>?", "a boat")], [TEAL], [BOX, OTHER], [BOX]),
]


def row_of(chat: Chat, processor: ClocMllmProcessor) -> PackedRow:
    images = [{"type": "image"}] * len(chat.images)
    encoded = [
        processor.encode_conversation(
            [
                {"role": "user", "content": [*images, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ]
        )
        for question, answer in chat.questions
    ]
    if images:
        return pack_questions(encoded, processor.image_token_id, 200)
    [(ids, labels)] = encoded
    return PackedRow(ids, labels, list(range(len(ids))), [0] * len(ids), [0])


def inputs_of(sequences: list[list[int]], processor: ClocMllmProcessor) -> dict[str, Tensor]:
    chats = [CHATS[index] for sequence in sequences for index in sequence]
    rows = [[row_of(CHATS[index], processor) for index in sequence] for sequence in sequences]
    boxes = [box for chat in chats for box in chat.answer_boxes]
    with_image = [chat for chat in chats if chat.images]
    return {
        **pad_sequences(rows, processor.tokenizer.pad_token_id),
        **processor.vision_inputs(
            [chat.images for chat in with_image], [chat.regions for chat in with_image]
        ),
        "answer_boxes": torch.tensor(boxes),
    }


@pytest.fixture(params=["eager", "sdpa"])
def trained(
    mllm_config: MllmConfig, request: pytest.FixtureRequest
) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """In training mode, everything learns."""
    config = dataclasses.replace(
        mllm_config, box_head=True, freeze_vision_encoder=False, lora=LoraConfig(rank=0)
    )
    torch.manual_seed(0)
    model, processor = build_mllm(config)
    model.language_model.set_attn_implementation(request.param)
    return model.train(), processor


def loss_and_gradients(
    model: ClocMllmForConditionalGeneration, inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: grad.clone() for name, grad in gradients.items()}}


@pytest.mark.parametrize(
    "sequences", [[[0, 1, 2, 3, 4]], [[3, 0], [2, 4, 1]], [[1], [4, 2, 0, 3]]], ids=str
)
def test_rows_of_a_sequence_learn_what_they_learn_alone(trained, sequences) -> None:
    """Text alone, one picture, two; regions; a box head. Measured: a gradient is off by at most
    3e-5 of its largest entry (a gate's, one number in which much cancels), 1e-6 elsewhere; where
    rows see each other, by 4 times its largest."""
    model, processor = trained
    expected = loss_and_gradients(model, inputs_of([[index] for index in range(5)], processor))
    actual = loss_and_gradients(model, inputs_of(sequences, processor))

    assert actual.keys() == expected.keys() and len(actual) > 40
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            actual[name], value, atol=1e-4 * scale + 1e-8, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradient_checkpointing_changes_neither_loss_nor_gradient(trained) -> None:
    model, processor = trained
    inputs = inputs_of([[3, 0], [2, 4, 1]], processor)
    expected = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    actual = loss_and_gradients(model, inputs)

    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize(
    ("lengths", "max_length", "expected"),
    [
        ([5], 100, [[0]]),
        ([9, 9, 9], 100, [[0], [1], [2]]),  # no padding: nothing to gain
        ([90, 10, 50, 30, 60, 40], 100, [[0, 1], [3, 4], [2, 5]]),
        ([90, 10, 50, 30, 60, 40], 20, [[0], [4], [1, 2], [3, 5]]),
        ([10, 90], 50, [[0], [1]]),
        ([900, 500, 500], 1000, [[0], [1, 2]]),
    ],
)
def test_which_rows_share_a_sequence(lengths, max_length, expected) -> None:
    assert balanced_sequences(lengths, max_length) == expected


def test_layouts_are_whole_short_enough_and_never_worse() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 400, rng.integers(1, 40)).tolist()
        max_length = int(rng.integers(1, 900))
        sequences = balanced_sequences(lengths, max_length)
        totals = [sum(lengths[index] for index in sequence) for sequence in sequences]
        assert sorted(index for of in sequences for index in of) == list(range(len(lengths)))
        assert max(totals) <= max(max_length, *lengths)
        assert len(totals) * max(totals) <= len(lengths) * max(lengths)


def test_what_does_not_fit_is_left_out_whole() -> None:
    row = pack_questions(QUESTIONS, IMAGE, max_length=9)
    assert row.kept == [0, 1]
    assert row.input_ids.count(IMAGE) == 2
    with pytest.raises(ValueError, match="max_length 4 holds no question: the image takes 3"):
        pack_questions(QUESTIONS, IMAGE, max_length=4)


def test_rows_must_start_alike() -> None:
    with pytest.raises(ValueError, match="start with the same image tokens"):
        pack_questions([QUESTIONS[0], ([2, IMAGE, IMAGE, 4], [X] * 4)], IMAGE, 20)
