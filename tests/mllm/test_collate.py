"""Batches of conversations: labels are exactly the answers, image tokens are never cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cloc_mllm.config import ConversationConfig, MllmConfig
from cloc_mllm.data.conversations import build_questions
from cloc_mllm.data.records import Record
from cloc_mllm.mllm import ClocMllmProcessor, build_mllm
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.losses import IGNORE_INDEX

CONFIG = ConversationConfig(questions_per_image=4)


@pytest.fixture
def model_and_processor(mllm_config: MllmConfig):
    return build_mllm(mllm_config)


def answers_in(labels: torch.Tensor, processor: ClocMllmProcessor) -> list[str]:
    """What the labels say, row by row, cut at the end tokens, which must be labels too."""
    learnt = labels[labels != IGNORE_INDEX].tolist()
    text = processor.tokenizer.decode(learnt, skip_special_tokens=False)
    assert text.endswith(processor.tokenizer.eos_token)
    return [answer.strip() for answer in text.split(processor.tokenizer.eos_token)[:-1]]


@pytest.fixture
def uneven(tiny_scenes) -> list[tuple[int, Record]]:
    """Items of which one has a row several times as long as the others'."""
    talk = replace(tiny_scenes[0], captions=[", ".join(["a crab and a clock"] * 6)], regions=[])
    return list(enumerate([tiny_scenes[1], talk, *tiny_scenes[2:5]]))


@pytest.mark.parametrize("pack", [False, True])
def test_labels_decode_to_exactly_the_answers(model_and_processor, uneven, pack: bool) -> None:
    _, processor = model_and_processor
    batch = ConversationCollator(processor, replace(CONFIG, pack=pack))(uneven)
    expected = {}
    for seed, record in uneven:
        questions = build_questions(
            record, CONFIG, processor.coordinates, np.random.default_rng(seed)
        )
        expected[record.id] = [pair.answer for pair in questions]
    assert answers_in(batch.inputs["labels"], processor) == [
        answer for record_id in batch.ids for answer in expected[record_id]
    ]
    assert batch.num_dropped == 0
    assert sorted(batch.ids) == sorted(expected)
    assert (len(batch.inputs["input_ids"]) < len(uneven)) == pack
    assert pack or batch.ids == list(expected)


@pytest.mark.parametrize("box_head", [False, True], ids=["written", "head"])
def test_packed_images_have_the_loss_and_gradients_of_padded_ones(
    mllm_config: MllmConfig, uneven, box_head: bool
) -> None:
    """So pictures, regions and answer boxes go where their rows went."""
    torch.manual_seed(0)
    model, processor = build_mllm(replace(mllm_config, box_head=box_head))
    ask = replace(CONFIG, locate=1.0)
    losses, gradients = [], []
    for pack in (True, False):
        batch = ConversationCollator(processor, replace(ask, pack=pack))(uneven)
        assert (len(batch.inputs["input_ids"]) < len(uneven)) == pack
        losses.append(model.train()(**batch.inputs).loss)
        losses[-1].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    torch.testing.assert_close(*losses)
    actual, expected = gradients
    for name, value in expected.items():
        # sums of other orders: measured 6e-7 of a tensor's largest entry, at most
        tolerance = 1e-5 * float(value.abs().max()) + 1e-8
        torch.testing.assert_close(actual[name], value, atol=tolerance, rtol=0)


def test_the_model_accepts_the_batch(model_and_processor, tiny_scenes) -> None:
    model, processor = model_and_processor
    batch = ConversationCollator(processor, CONFIG)([(0, tiny_scenes[0]), (1, tiny_scenes[1])])
    loss = model(**batch.inputs).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert model.region_projector.output.weight.grad.abs().sum() > 0


def test_packed_questions_have_the_loss_of_single_ones(model_and_processor, tiny_scenes) -> None:
    model, processor = model_and_processor
    model.eval()
    record = tiny_scenes[0]
    rng = np.random.default_rng(0)
    questions = build_questions(record, CONFIG, processor.coordinates, rng)
    packed = ConversationCollator(processor, CONFIG)([(0, record)])
    actual = model(**packed.inputs, num_items_in_batch=1).loss
    expected = torch.tensor(0.0)
    for pair in questions:
        single = ConversationCollator(processor, CONFIG)
        single._questions = lambda record, rng, pair=pair: [pair]  # type: ignore[method-assign]
        expected = expected + model(**single([(0, record)]).inputs, num_items_in_batch=1).loss
    torch.testing.assert_close(actual, expected)


def test_questions_that_do_not_fit_are_counted(model_and_processor, tiny_scenes) -> None:
    _, processor = model_and_processor
    whole = ConversationCollator(processor, CONFIG)([(0, tiny_scenes[0])])
    length = whole.inputs["input_ids"].shape[1]
    cut = ConversationCollator(processor, replace(CONFIG, max_length=length - 1))
    batch = cut([(0, tiny_scenes[0])])
    assert batch.num_dropped >= 1
    is_image = batch.inputs["input_ids"] == processor.image_token_id
    assert int(is_image.sum()) == processor.num_image_tokens
    with pytest.raises(ValueError, match=r"raise conversations\.max_length"):
        ConversationCollator(processor, replace(CONFIG, max_length=20))([(0, tiny_scenes[0])])


def test_a_record_without_anything_to_learn_is_refused(model_and_processor, tiny_scenes) -> None:
    _, processor = model_and_processor
    empty: Record = replace(tiny_scenes[0], regions=[], captions=[])
    with pytest.raises(ValueError, match=f"record {empty.id} gives nothing to learn"):
        ConversationCollator(processor, CONFIG)([(0, empty)])
