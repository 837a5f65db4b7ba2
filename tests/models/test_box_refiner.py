"""The second look at a text's box."""

from __future__ import annotations

import pytest
import torch

from cloc_mllm.config import LossConfig
from cloc_mllm.losses.cloc_loss import cloc_loss
from cloc_mllm.models.box_refiner import BoxRefiner
from tests.models.batches import random_batch
from tests.models.tiny import tiny_cloc

GRID_HW = (12, 12)


def test_it_starts_as_the_identity_and_counts_its_looks() -> None:
    torch.manual_seed(0)
    refiner = BoxRefiner(16, 8, looks=3)
    boxes = torch.tensor([[0.2, 0.3, 0.6, 0.8], [0.0, 0.0, 1.0, 1.0]])
    texts, index = torch.randn(2, 8), torch.tensor([1, 0])
    similarity, tokens = torch.rand(2, 144), torch.randn(2, 144, 16)
    answers = refiner(boxes, texts, similarity, index, tokens, GRID_HW)
    assert answers.shape == (3, 2, 4)
    torch.testing.assert_close(answers, boxes.expand(3, 2, 4))


def test_it_learns_where_a_thing_ends() -> None:
    """A rectangle of marked tokens, and a first box that is off by a tenth of the canvas."""
    torch.manual_seed(0)
    refiner = BoxRefiner(4, 8, looks=2)
    optimizer = torch.optim.Adam(refiner.parameters(), 2e-3)
    index, text = torch.arange(32), torch.zeros(32, 8)
    centres = (torch.arange(12) + 0.5) / 12
    errors = []
    for _ in range(150):
        corner = 0.1 + 0.3 * torch.rand(32, 2)
        boxes = torch.cat([corner, corner + 0.2 + 0.3 * torch.rand(32, 2)], 1)
        inside = [
            (centres > boxes[:, axis, None]) & (centres < boxes[:, axis + 2, None])
            for axis in (0, 1)
        ]
        marked = (inside[1][:, :, None] & inside[0][:, None]).float().flatten(1)
        tokens = torch.cat([marked[..., None], torch.zeros(32, 144, 3)], -1)
        first = boxes + 0.1 * (2 * torch.rand(32, 4) - 1)
        answers = refiner(first, text, torch.zeros(32, 144), index, tokens, GRID_HW)
        loss = (answers - boxes).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append((answers[-1] - boxes).abs().mean().item() / (first - boxes).abs().mean())
    assert sum(errors[-10:]) / 10 < 0.5


def test_a_model_that_looks_again_locates_and_trains() -> None:
    model = tiny_cloc(box_looks=2)
    batch = random_batch(model)
    assert isinstance(batch.pixel_values, torch.Tensor)
    image = model.encode_image(batch.pixel_values)
    texts = model.encode_text(batch.phrase_input_ids)
    once, again = tiny_cloc(), model.locate(image, texts, batch.region_image_index)
    assert again.shape == (5, 4)
    missing, unexpected = once.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(".refiner." in name for name in unexpected)
    # fresh, the refiner is the identity: a paper's model can be continued with it
    torch.testing.assert_close(again, once.locate(image, texts, batch.region_image_index))
    _, boxes = model.vision.read_tokens(image)
    torch.testing.assert_close(boxes, once.vision.read_tokens(image)[1])
    assert len(model(batch).located_boxes) == 3


@pytest.mark.parametrize("regions_of_images", [(2, 0, 3), (0, 0)])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(
    regions_of_images: tuple[int, ...],
) -> None:
    gradients = []
    for size in (0, 1):
        model = tiny_cloc(box_looks=2).train()
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".refiner.change." in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.micro_batch_size = size
        batch = random_batch(model, regions_of_images)
        cloc_loss(model(batch), batch, LossConfig())["loss"].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None or "refiner" not in name
        torch.testing.assert_close(gradients[1][name], expected, msg=name)
