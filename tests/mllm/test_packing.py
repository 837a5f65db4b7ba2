"""Questions packed behind one image: the same loss as one question at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cloc_mllm.mllm.losses import IGNORE_INDEX, answer_loss
from cloc_mllm.mllm.packing import pack_questions, pad_rows

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
def test_packing_changes_neither_loss_nor_gradient(attention: str) -> None:
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
    batch = pad_rows(rows, pad_token_id=0)
    labels = batch.pop("labels")
    actual = answer_loss(model(**batch).logits, labels)
    (actual_gradient,) = torch.autograd.grad(actual, weight)

    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_gradient, expected_gradient)


def test_what_does_not_fit_is_left_out_whole() -> None:
    row = pack_questions(QUESTIONS, IMAGE, max_length=9)
    assert row.kept == [0, 1]
    assert row.input_ids.count(IMAGE) == 2
    with pytest.raises(ValueError, match="max_length 4 holds no question: the image takes 3"):
        pack_questions(QUESTIONS, IMAGE, max_length=4)


def test_rows_must_start_alike() -> None:
    with pytest.raises(ValueError, match="start with the same image tokens"):
        pack_questions([QUESTIONS[0], ([2, IMAGE, IMAGE, 4], [X] * 4)], IMAGE, 20)
