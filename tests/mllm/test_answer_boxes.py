"""A head that reads boxes off the `<box>` token: learns, saves, loads and answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cloc_mllm.config import BoxReader, ConversationConfig, LoraConfig, MllmConfig
from cloc_mllm.data.records import Record
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.inputs import EncodedImage
from cloc_mllm.mllm import build_mllm, merge_and_save
from cloc_mllm.mllm.answer_boxes import AnswerBoxHead, SeenImages, writing_states
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.modeling import ClocMllmForConditionalGeneration
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.models.region_encoders import Nearness

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
    assert head.loss(hidden, right) < head.loss(hidden, wrong)
    assert head.loss(hidden[:0], right[:0]) == 0


def test_the_state_that_writes_the_token_is_read() -> None:
    hidden = torch.arange(8.0).reshape(2, 4, 1)
    labels = torch.tensor([[-100, -100, 7, 1], [7, 5, 7, 7]])
    assert writing_states(hidden, labels, 7).flatten().tolist() == [1, 5, 6]


@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "lora"])
@pytest.mark.parametrize("reader", ["state", "prompter"])
def test_it_learns_saves_and_answers_in_one_token(
    mllm_config: MllmConfig, tiny_scenes: list[Record], tmp_path: Path, rank: int, reader: BoxReader
) -> None:
    config = dataclasses.replace(
        mllm_config, box_head=True, box_reader=reader, lora=LoraConfig(rank=rank)
    )
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


@pytest.fixture
def looking(mllm_config: MllmConfig) -> tuple[ClocMllmForConditionalGeneration, ClocMllmProcessor]:
    """A model whose box head looks for boxes in the images, and its processor."""
    torch.manual_seed(0)
    return build_mllm(dataclasses.replace(mllm_config, box_head=True, box_reader="prompter"))


def test_the_prompter_looks_in_the_image_that_answers_best(looking: Any) -> None:
    model, processor = looking
    pictures = [Image.new("RGB", (64, 48), color) for color in ("red", "blue", "green")]
    predictor = GroundingPredictor(model, processor)
    encoded = [predictor.encode(picture) for picture in pictures]
    token = torch.tensor([model.config.box_token_id])
    hidden = torch.randn(1, model.config.text_config.hidden_size)

    def read(*images: EncodedImage) -> tuple[list[list[float]], list[float]]:
        return predictor.read_boxes(token, hidden, images)

    alone = [read(image) for image in encoded]
    assert len({str(boxes) for boxes, _ in alone}) == 3
    together = read(*encoded)
    assert any(torch.allclose(torch.tensor(together[0]), torch.tensor(b)) for b, _ in alone)
    assert read(*encoded[::-1])[0] == [pytest.approx(together[0][0])]
    assert read() == ([], [])


def test_the_prompter_finds_what_its_prompt_says(looking: Any) -> None:
    """The box is the one that CLOC answers to the prompt, moved to the original image."""
    model, processor = looking
    image = GroundingPredictor(model, processor).encode(Image.new("RGB", (64, 32), "red"))
    with torch.no_grad():
        model.box_head.near.zero_()
        hidden = torch.randn(3, model.config.text_config.hidden_size)
        prompts = model.box_head.prompt(model.box_head.norm(hidden))
        index = torch.zeros(3, dtype=torch.long)
        canvas = model.vision.locate(image.features, prompts, index)
        frame = processor.views((64, 32))[0].frame()
        boxes, _ = model.read_answer_boxes(hidden, SeenImages(image.features, frame, index))
    # the letterbox of a 2:1 picture is its width high, from -0.5 to 1.5 of its height
    expected = canvas * torch.tensor([1, 2, 1, 2]) - torch.tensor([0, 0.5, 0, 0.5])
    torch.testing.assert_close(boxes, expected)


def test_the_rough_box_draws_the_prompter_near(looking: Any) -> None:
    model, processor = looking
    image = GroundingPredictor(model, processor).encode(Image.new("RGB", (64, 64), "red"))
    texts, index = torch.randn(1, model.vision.embed_dim), torch.zeros(1, dtype=torch.long)
    prompter = model.vision.region_encoder.prompter
    context = prompter.prepare(image.features)
    cell = 5
    centre = (context.cells[cell, :2] + context.cells[cell, 2:])[None] / 2
    # so near that the attention sees one token alone
    near = Nearness(centre, torch.tensor(1e6))
    moved = context._replace(values=context.values.clone())
    moved.values[:, :cell] += 1.0
    moved.values[:, cell + 1 :] += 1.0
    prompter.text_gate = None
    actual = prompter.embed_texts(moved, texts, index, None, near)
    torch.testing.assert_close(actual, prompter.embed_texts(context, texts, index, None, near))


def test_a_reader_that_does_not_fit_is_refused(mllm_config: MllmConfig) -> None:
    with pytest.raises(ValueError, match="box_head to true"):
        build_mllm(dataclasses.replace(mllm_config, box_reader="prompter"))
