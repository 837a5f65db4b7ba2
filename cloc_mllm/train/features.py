"""Fills the feature cache: before stage 2 the frozen encoder reads each image of the run once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cloc_mllm.config import AlignmentConfig, Stage2Config
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.feature_cache import FeatureCache, Picture
from cloc_mllm.data.mixture import parts_of
from cloc_mllm.data.records import Record
from cloc_mllm.distributed import all_reduce_sum, barrier, is_main, rank, world_size
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor
from cloc_mllm.mllm.feature_cache import encoder_identity
from cloc_mllm.mllm.image_processing import ClocMllmImageProcessor
from cloc_mllm.stopping import become_loader_worker
from cloc_mllm.train.data_order import DataOrder, choose_workers, iterate
from cloc_mllm.train.engine import start_processes

_BATCH = 32  # images encoded at a time


def fill_features(
    model: ClocMllmForConditionalGeneration,
    processor: ClocMllmProcessor,
    dataset: Sequence[Record | Chat],
    config: Stage2Config,
) -> FeatureCache | None:
    """Encodes the images that the run will see and that the cache lacks.

    Every rank must call this, and encodes its share. The encoder must be frozen, see
    `check_encoder_is_frozen`.

    Returns:
        the cache; None if `data.feature_cache` is empty.
    """
    if not config.data.feature_cache:
        return None
    device = start_processes()
    model.vision.to(device)
    assert config.run.precision != "auto"
    bf16 = config.run.precision == "bf16"
    cache = FeatureCache(config.data.feature_cache, encoder_identity(model, processor, bf16=bf16))
    wanted = _seen(dataset, config)
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        _BATCH,
        sampler=wanted[rank() :: world_size()],
        collate_fn=_Missing(cache, processor.image_processor),
        num_workers=choose_workers(config.data.num_workers),
        worker_init_fn=become_loader_worker,
    )
    start, num_encoded = time.monotonic(), 0
    encoder = model.vision.encoder.eval()
    with closing(iterate(loader)) as batches:
        for pictures, pixel_values in batches:
            if not pictures:
                continue
            # no `no_grad`: torch then chooses the attention kernel that it chooses in training
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens = encoder(pixel_values.to(device)).tokens
            for picture, picture_tokens in zip(pictures, tokens, strict=True):
                cache.save(picture, {"tokens": picture_tokens})
            num_encoded += len(pictures)
    total = int(all_reduce_sum(torch.tensor(num_encoded, device=device)))
    if is_main():
        seconds = time.monotonic() - start
        what = f"{total:,} images of {len(wanted):,} samples"
        print(f"{cache.root}: {what} encoded in {seconds:.0f} s, the others were there")
    barrier()
    return cache


def check_encoder_is_frozen(
    model: ClocMllmForConditionalGeneration, alignment: AlignmentConfig
) -> None:
    """Checks that the encoder's tokens can be cached.

    Raises:
        ValueError: a part of the encoder learns or is aligned, so its tokens change; or images have
            tiles, whose tokens are not kept.
    """
    if "max_tiles" in model.config.fingerprint:
        raise ValueError(
            "data.feature_cache keeps one canvas per image, without tiles; set model.max_tiles to "
            '0, or data.feature_cache to ""'
        )
    if alignment.steps and alignment.vision_lr:
        raise ValueError(
            "data.feature_cache keeps what the vision encoder computes, but alignment.vision_lr "
            'changes it; set one of them to 0 or ""'
        )
    learns = [name for name, p in model.vision.encoder.named_parameters() if p.requires_grad]
    if learns:
        raise ValueError(
            f"data.feature_cache keeps what the vision encoder computes, but {len(learns)} of its "
            f"parameters learn (vision.encoder.{learns[0]}); set model.freeze_vision_encoder to "
            'true, or optim.layer_lr to {"vision.encoder": 0}, or data.feature_cache to ""'
        )


class _Missing:
    """Picks the pictures that the cache lacks and prepares them, in a loader worker.

    Returns the pictures and their canvases, float[I, 3, S, S].
    """

    def __init__(self, cache: FeatureCache, image_processor: ClocMllmImageProcessor) -> None:
        self.cache = cache
        self.image_processor = image_processor

    def __call__(self, items: list[Record | Chat]) -> tuple[list[Picture], Tensor]:
        of_items = [of for item in items for of in _pictures_of(item)]
        missing = list({of.image: of for of in of_items if not self.cache.has(of)}.values())
        pixels = [self.image_processor.prepare(of.load_image()) for of in missing]
        return missing, torch.stack(pixels) if pixels else torch.empty(0)


def _pictures_of(item: Record | Chat) -> Sequence[Picture]:
    return item.images if isinstance(item, Chat) else [item]


def _seen(dataset: Sequence[Record | Chat], config: Stage2Config) -> list[int]:
    """Finds the samples that stage 2 and its alignment see; both start at the same sample."""
    run, alignment, parts = config.run, config.alignment, parts_of(dataset)
    positions = max(
        run.steps * run.global_batch_size, alignment.steps * alignment.global_batch_size
    )
    if not parts:
        positions = min(len(dataset), positions)  # an epoch has every sample
    order = DataOrder(len(dataset), positions, run.seed, parts)
    return sorted({index for _, index in order.batch(0)})
