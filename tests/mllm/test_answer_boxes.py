"""A head that reads boxes off the `<box>` token: learns, saves, loads and answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from cloc_mllm.config import ConversationConfig, LoraConfig, MllmConfig
from cloc_mllm.data.records import Record
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm import build_mllm, merge_and_save
from cloc_mllm.mllm.answer_boxes import AnswerBoxHead, answer_box_loss, writing_states
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.coordinates import BoxFormat

ASK = ConversationConfig(questions_per_image=3, refer=1, ground=1, caption=0.5, locate=1)


@pytest.mark.parametrize(
    ("text", "regressed", "expected"),
    [
        ("<box>", [(0.1, 0.2, 0.3, 1.5)], [(0.1, 0.2, 0.3, 1.0)]),
        ("<box><box>", [(0, 0, 0.5, 0.5), (0, 0, 1, 1)], [(0, 0, 0.5, 0.5), (0, 0, 1, 1)]),
        ("<box> there", [(0, 0, 1, 1)], "not_a_box"),
        ("<box>", [], "not_a_box"),
        ("<box>", [(0.2, 0.2, 0.2, 0.4)], "zero_area"),
        ("<box>", [(float("nan"), 0, 1, 1)], "zero_area"),
        ("not in the image", [], "not_there"),
        ("", [], "empty"),
    ],
)
def test_parsing(text: str, regressed: list[tuple[float, ...]], expected: object) -> None:
    parsed = BoxFormat("location_tokens", 20, head=True).parse(text, regressed)
    assert (parsed.failure or parsed.boxes) == expected


def test_loss_is_smaller_for_the_right_box_and_zero_without_one() -> None:
    torch.manual_seed(0)
    head = AnswerBoxHead(8)
    hidden = torch.randn(2, 8)
    right = head(hidden)[0].detach()
    wrong = torch.tensor([[0.0, 0.0, 0.1, 0.1]]).expand(2, 4)
    assert answer_box_loss(head, hidden, right) < answer_box_loss(head, hidden, wrong)
    assert answer_box_loss(head, hidden[:0], right[:0]) == 0


def test_the_state_that_writes_the_token_is_read() -> None:
    hidden = torch.arange(8.0).reshape(2, 4, 1)
    labels = torch.tensor([[-100, -100, 7, 1], [7, 5, 7, 7]])
    assert writing_states(hidden, labels, 7).flatten().tolist() == [1, 5, 6]


@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "lora"])
def test_it_learns_saves_and_answers_in_one_token(
    mllm_config: MllmConfig, tiny_scenes: list[Record], tmp_path: Path, rank: int
) -> None:
    config = dataclasses.replace(mllm_config, box_head=True, lora=LoraConfig(rank=rank))
    torch.manual_seed(0)
    model, processor = build_mllm(config)
    collator = ConversationCollator(processor, ASK)
    batch = collator([(seed, record) for seed, record in enumerate(tiny_scenes[:4])])
    num_boxes = int((batch.inputs["labels"] == model.config.box_token_id).sum())
    assert batch.inputs["answer_boxes"].shape == (num_boxes, 4) and num_boxes > 0
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model.train()(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=f"labels have {num_boxes} <box> tokens but"):
        model(**{**batch.inputs, "answer_boxes": batch.inputs["answer_boxes"][1:]})

    merge_and_save(model, processor, tmp_path)
    predictor = GroundingPredictor.from_pretrained(tmp_path, device="cpu")
    result = predictor.ground(Image.new("RGB", (64, 48), "red"), ["a crab", "the clock"])
    assert result.text == ["<box>", "<box>"] and result.failures == [None, None]
    assert result.query_index.tolist() == [0, 1] and len(result.boxes) == 2
    assert ((result.scores >= 0) & (result.scores <= 1)).all()


def test_a_model_and_a_processor_of_different_answers_refuse_each_other(
    mllm_config: MllmConfig,
) -> None:
    model, _ = build_mllm(dataclasses.replace(mllm_config, box_head=True))
    _, processor = build_mllm(mllm_config)
    with pytest.raises(ValueError, match="box_head"):
        GroundingPredictor(model, processor)
