"""A step of stage 2 with the frozen encoder's tokens out of the cache, and with the pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cloc_mllm.config import (
    ConversationConfig,
    MllmConfig,
    Stage2Config,
    Stage2DataConfig,
    Stage2RunConfig,
)
from cloc_mllm.data.parquet import load_records
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.feature_cache import FeatureCache
from cloc_mllm.train.features import fill_features
from cloc_mllm.train.stage2 import answer_step

_LOSS_TOLERANCE = 1e-4

Step = Callable[[], float]


def matched_steps(
    model: MllmConfig, data: str, num_images: int, num_questions: int, cache_dir: str
) -> tuple[Step, Step]:
    """(cached, plain): the batch is made, the loss and its gradient computed.

    Raises:
        ValueError: the losses differ; nothing to compare.
    """
    config = Stage2Config(
        model=model,
        data=Stage2DataConfig(train=data, feature_cache=cache_dir, num_workers=0),
        conversations=ConversationConfig(questions_per_image=num_questions),
        run=Stage2RunConfig(steps=1, global_batch_size=num_images, precision="fp32"),
    )
    torch.manual_seed(0)
    mllm, processor = build_mllm(config.model)
    records = load_records(data)[:num_images]
    cache = fill_features(mllm, processor, records, config)
    mllm.train()

    def step(features: FeatureCache | None) -> float:
        collator = ConversationCollator(processor, config.conversations, features=features)
        loss = answer_step(mllm, collator(list(enumerate(records))))["loss"]
        loss.backward()
        mllm.zero_grad()
        return float(loss.detach())

    losses = step(cache), step(None)
    if abs(losses[0] - losses[1]) > _LOSS_TOLERANCE:
        raise ValueError(f"the losses of the two sides are {losses}; nothing to compare")
    return lambda: step(cache), lambda: step(None)
