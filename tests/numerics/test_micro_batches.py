"""Micro-batches hold fewer activations and change neither loss nor gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cloc_mllm.config import LossConfig
from cloc_mllm.data.collate import ClocBatch
from cloc_mllm.losses.cloc_loss import cloc_loss
from cloc_mllm.models.cloc import Cloc
from tests.models.batches import random_batch
from tests.models.tiny import tiny_cloc


def loss_and_gradients(model: Cloc, batch: ClocBatch, micro_batch_size: int) -> list[Tensor]:
    model.micro_batch_size = micro_batch_size
    model.zero_grad()
    loss = cloc_loss(model(batch), batch, LossConfig())["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def shuffled(batch: ClocBatch) -> ClocBatch:
    """In float64, regions in another order than their images."""
    order = torch.randperm(len(batch.boxes), generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(
        batch,
        pixel_values=batch.pixel_values.double(),
        boxes=batch.boxes[order].double(),
        region_image_index=batch.region_image_index[order],
        region_phrase_index=batch.region_phrase_index[order],
    )


@pytest.mark.parametrize("regions", [(2, 0, 3, 1, 4), (0,) * 5], ids=["ragged", "no region"])
@pytest.mark.parametrize("kind", ["prompter", "roi_align", "none"])
def test_equal_loss_and_gradients(kind: str, regions: tuple[int, ...]) -> None:
    model = tiny_cloc(kind=kind).double()
    batch = shuffled(random_batch(model, regions))
    expected = loss_and_gradients(model, batch, 0)
    for micro_batch_size in (1, 2, 5, 9):
        actual = loss_and_gradients(model, batch, micro_batch_size)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_equal_with_recomputed_layers_and_autocast() -> None:
    """Per-layer checkpoints lie inside those of the parts. bf16 rounds sums of parts otherwise: by
    0.5 % of the gradient's length; a lost part would be 0.2 or more."""
    model = tiny_cloc().train()
    batch = random_batch(model, (2, 0, 3, 1, 4))
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(model, batch, 0)
        model.set_gradient_checkpointing(True)
        actual = loss_and_gradients(model, batch, 2)
    ours, theirs = (torch.cat([t.flatten() for t in tensors]) for tensors in (actual, expected))
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


def bytes_kept_for_backward(model: Cloc, batch: ClocBatch, micro_batch_size: int) -> int:
    """Of tensors saved by the forward pass, weights and images aside; parts under a checkpoint
    save none."""
    given = {t.untyped_storage().data_ptr() for t in [*model.parameters(), batch.pixel_values]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.micro_batch_size = micro_batch_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(batch)
    assert outputs.region_features is not None
    return sum(kept.values())


def test_activations_of_the_parts_are_not_kept() -> None:
    model = tiny_cloc()
    batch = random_batch(model, (1, 2) * 16)
    whole = bytes_kept_for_backward(model, batch, 0)
    assert bytes_kept_for_backward(model, batch, 4) < whole / 20
