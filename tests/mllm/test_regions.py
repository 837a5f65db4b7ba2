"""What a `<region>` token is made of: Prompter, RoI-Align, or its box alone."""

import dataclasses

import pytest
import torch
from PIL import Image

from cloc_mllm.config import ConversationConfig
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, build_mllm, merge_and_save
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.regions import read_regions
from cloc_mllm.models.position import token_cells

BOX = [0.25, 0.25, 0.75, 0.5]
KINDS = ("prompter", "roi", "coordinates")


@pytest.fixture
def build(mllm_config):
    def build_kind(kind: str):
        torch.manual_seed(0)
        return build_mllm(dataclasses.replace(mllm_config, region_features=kind))

    return build_kind


def noise(seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(
        torch.randint(0, 256, (48, 96, 3), generator=generator, dtype=torch.uint8).numpy()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_takes_one_step_and_comes_back_with_the_same_logits(
    build, tiny_scenes, tmp_path, kind
):
    model, processor = build(kind)
    config = ConversationConfig(questions_per_image=2, ground=0, caption=0)  # `refer` alone
    batch = ConversationCollator(processor, config)(list(enumerate(tiny_scenes[:2])))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model.train()(**batch.inputs).loss
    loss.backward()
    for name, parameter in model.region_projector.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    optimizer.step()
    with torch.no_grad():
        assert model(**batch.inputs).loss < loss
        expected = model.eval()(**{**batch.inputs, "labels": None}).logits

    merge_and_save(model, processor, tmp_path)

    loaded = ClocMllmForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        actual = loaded(**{**batch.inputs, "labels": None}).logits
    # a model loads with another attention kernel than it trains with
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert loaded.config.region_features == kind


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_region_token_sees_of_the_picture(build, kind):
    model, processor = build(kind)
    one, other = (
        model.encode_vision(vision_of(processor, noise(seed), [BOX]))[1] for seed in (0, 1)
    )
    moved = model.encode_vision(vision_of(processor, noise(0), [[0.3, 0.25, 0.75, 0.5]]))[1]

    assert torch.equal(one, other) == (kind == "coordinates")
    assert not torch.allclose(one, moved)


@torch.no_grad()
def test_roi_of_tokens_that_tell_their_place_is_the_centre_of_the_box(build):
    model, _ = build("roi")
    image = model.vision.encode_image(torch.randn(2, 3, 64, 64))
    cells = token_cells(image.grid_hw, torch.device("cpu"))
    image.tokens[1, :, :2] = (cells[:, :2] + cells[:, 2:]) / 2
    boxes = torch.tensor([[0.25, 0.375, 0.5, 0.875]])

    (actual,) = read_regions("roi", model.vision, image, boxes, torch.tensor([1]))

    torch.testing.assert_close(actual[0, :2], torch.tensor([0.375, 0.625]))


def test_an_unknown_kind_is_refused(build):
    with pytest.raises(ValueError, match=r"region_features must be one of .* got 'pixels'"):
        build("pixels")


def vision_of(processor, picture, regions):
    from cloc_mllm.mllm.vision_inputs import VisionInputs

    return VisionInputs(**processor.vision_inputs([picture], [regions]))
