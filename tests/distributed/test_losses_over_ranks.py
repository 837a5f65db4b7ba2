"""Loss and gradients on two and three gloo ranks equal the full matrix of one process (C5).

The processes of a world size start once and go through every case.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cloc_mllm import distributed
from cloc_mllm.config import LossConfig
from cloc_mllm.data.collate import ClocBatch
from cloc_mllm.losses import cloc_loss as loss_module
from cloc_mllm.losses.contrastive import contrastive_loss
from cloc_mllm.models.cloc import Cloc
from tests.distributed.ranks import run_ranks
from tests.models.batches import random_batch
from tests.models.tiny import tiny_cloc

LAYOUTS = {  # regions of the six images; a rank has three of them, or two
    "ragged": (2, 0, 3, 1, 0, 4),
    "more than a tile": (40, 26, 0, 0, 1, 0),
    "none on one rank": (2, 3, 1, 0, 0, 0),
    "one on each": (1, 0, 0, 1, 0, 1),
    "one": (0, 0, 0, 1, 0, 0),
    "no region": (0,) * 6,
}
KINDS = ("softmax", "sigmoid")
ALL_ROWS = 1000
# (rows of a tile, images of a micro-batch)
VARIANTS = [(1, 0), (7, 0), (64, 0), (ALL_ROWS, 0), (7, 1)]
# between the cosines of the tiny model's texts: leaves some pairs out, keeps others
LOSS = LossConfig(same_text_threshold=0.7)


def full_matrix_loss(  # noqa: PLR0913  those of `contrastive_loss`
    features: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    threshold: float = 1.0,
    *,
    logit_bias: Tensor | None = None,
    text_log_prior: Tensor | None = None,
    counts: object = None,
    filtered_share: Tensor | None = None,
) -> Tensor:
    """Computes `contrastive_loss` from the full matrix of logits; `counts` only saves it time."""
    features, texts = F.normalize(features, dim=1), F.normalize(texts, dim=1)
    logits = logit_scale.exp() * features @ texts.T
    if text_log_prior is not None:
        logits = logits - text_log_prior
    own = torch.eye(len(texts), dtype=torch.bool)
    left_out = (texts.detach() @ texts.detach().T > threshold) & ~own
    if filtered_share is not None:
        filtered_share.copy_(left_out.sum().double() / max(1, len(texts) * (len(texts) - 1)))
    if not len(texts):
        return logits.sum() + (0 if logit_bias is None else 0 * logit_bias.sum())
    if logit_bias is not None:
        losses = -F.logsigmoid(torch.where(own, 1.0, -1.0) * (logits + logit_bias))
        return losses.masked_fill(left_out, 0).sum() / len(texts)
    logits, labels = logits.masked_fill(left_out, float("-inf")), torch.arange(len(texts))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def whole_batch(model: Cloc, layout: str) -> ClocBatch:
    """In float64; every fourth phrase is the same."""
    batch = random_batch(model, LAYOUTS[layout])
    batch.phrase_input_ids[::4] = batch.phrase_input_ids[:1].clone()
    return dataclasses.replace(
        batch, pixel_values=batch.pixel_values.double(), boxes=batch.boxes.double()
    )


def part_of(batch: ClocBatch, first: int, last: int) -> ClocBatch:
    """Images `first` .. `last` of a batch with their regions, as a rank would collate them."""
    keep = (batch.region_image_index >= first) & (batch.region_image_index < last)
    log_prior = batch.phrase_log_prior
    return dataclasses.replace(
        batch,
        pixel_values=batch.pixel_values[first:last],
        caption_input_ids=batch.caption_input_ids[first:last],
        caption_image_index=torch.arange(last - first),
        phrase_input_ids=batch.phrase_input_ids[keep],
        phrase_log_prior=None if log_prior is None else log_prior[keep],
        boxes=batch.boxes[keep],
        region_image_index=batch.region_image_index[keep] - first,
        region_phrase_index=torch.arange(int(keep.sum())),
    )


def losses_and_gradients(model: Cloc, batch: ClocBatch) -> dict[str, Tensor]:
    model.zero_grad()
    terms = loss_module.cloc_loss(model(batch), batch, LOSS)
    terms["loss"].backward()
    result = {f"loss/{name}": value.detach().clone() for name, value in terms.items()}
    return result | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def using(loss: object) -> mock._patch:
    return mock.patch.object(loss_module, "contrastive_loss", loss)


def cases() -> Iterator[tuple[str, str, tuple[int, int]]]:
    return itertools.product(LAYOUTS, KINDS, VARIANTS)  # type: ignore[return-value]


def go_through_cases(directory: Path) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    models = {kind: tiny_cloc(contrastive_loss=kind).double() for kind in KINDS}
    averaged = {}
    for case in cases():
        layout, kind, (tile_rows, micro_batch_size) = case
        model, images = models[kind], 6 // world_size
        model.micro_batch_size = micro_batch_size
        batch = part_of(whole_batch(model, layout), images * rank, images * (rank + 1))
        with using(functools.partial(contrastive_loss, tile_rows=tile_rows)):
            result = losses_and_gradients(model, batch)
        averaged[repr(case)] = {
            name: distributed.all_reduce_sum(value) / world_size for name, value in result.items()
        }
    if rank == 0:
        torch.save(averaged, directory / "averaged.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def over_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp("ranks")
    run_ranks(go_through_cases, directory, num_ranks=request.param)
    return torch.load(directory / "averaged.pt", weights_only=True)


@functools.cache
def expected_of(layout: str, kind: str) -> dict[str, Tensor]:
    model = tiny_cloc(contrastive_loss=kind).double()  # type: ignore[arg-type]
    with using(full_matrix_loss):
        return losses_and_gradients(model, whole_batch(model, layout))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_equal_the_full_matrix_of_one_process(
    over_ranks: dict[str, dict[str, Tensor]], layout: str, kind: str
) -> None:
    expected = expected_of(layout, kind)
    assert ("region_logit_bias" in expected) == (kind == "sigmoid")
    for variant in VARIANTS:
        actual = over_ranks[repr((layout, kind, variant))]
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_the_filter_leaves_out_some_pairs_of_these_texts() -> None:
    model = tiny_cloc().double()
    texts = F.normalize(model.encode_text(whole_batch(model, "ragged").phrase_input_ids), dim=1)
    share = (texts @ texts.T > LOSS.same_text_threshold).double().mean()
    assert 0.1 < share < 0.9
