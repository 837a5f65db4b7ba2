"""Loss and gradients on two gloo ranks equal one process (contract C5), with ragged regions."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cloc_mllm import distributed
from cloc_mllm.config import LossConfig
from cloc_mllm.data.collate import ClocBatch
from cloc_mllm.losses.cloc_loss import cloc_loss
from cloc_mllm.models.cloc import Cloc
from tests.models.batches import random_batch
from tests.models.tiny import tiny_cloc

LAYOUTS = {
    "ragged": (2, 0, 3, 1),
    "none on one rank": (2, 3, 0, 0),
    "one": (0, 0, 1, 0),
    "no region": (0,) * 4,
}


def _part(batch: ClocBatch, first: int, last: int) -> ClocBatch:
    """Images `first` .. `last` of a batch with their regions, as a rank would collate them."""
    keep = (batch.region_image_index >= first) & (batch.region_image_index < last)
    return dataclasses.replace(
        batch,
        pixel_values=batch.pixel_values[first:last],
        caption_input_ids=batch.caption_input_ids[first:last],
        caption_image_index=torch.arange(last - first),
        phrase_input_ids=batch.phrase_input_ids[keep],
        boxes=batch.boxes[keep],
        region_image_index=batch.region_image_index[keep] - first,
        region_phrase_index=torch.arange(int(keep.sum())),
    )


def _losses_and_gradients(model: Cloc, batch: ClocBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    terms = cloc_loss(
        model(batch), batch, model.logit_scale, model.region_logit_scale, LossConfig(), "l1_giou"
    )
    terms["loss"].backward()
    result = {f"loss/{name}": value.detach().clone() for name, value in terms.items()}
    return result | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _rank(rank: int, port: int, directory: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = tiny_cloc().double()
    for name, regions in LAYOUTS.items():
        batch = _double(random_batch(model, regions))
        result = _losses_and_gradients(model, _part(batch, 2 * rank, 2 * rank + 2))
        averaged = {k: distributed.all_reduce_sum(v) / 2 for k, v in result.items()}
        if rank == 0:
            torch.save(averaged, Path(directory) / f"{name}.pt")
    dist.destroy_process_group()


def _double(batch: ClocBatch) -> ClocBatch:
    return dataclasses.replace(
        batch, pixel_values=batch.pixel_values.double(), boxes=batch.boxes.double()
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(port, str(directory)), nprocs=2)
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_equal_one_process(two_ranks: Path, name: str) -> None:
    model = tiny_cloc().double()
    expected = _losses_and_gradients(model, _double(random_batch(model, LAYOUTS[name])))
    actual = torch.load(two_ranks / f"{name}.pt", weights_only=True)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=1e-10, rtol=1e-8)
