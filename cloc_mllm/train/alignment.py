"""Before stage 2: the projectors learn to write scenes in the language model's own embeddings.

For each image token the target is the scene token (`mllm/scene_tokens.py`) of what the records say
lies there: a dense answer for all tokens of an image, without running the language model. LLaVA
aligns its projector first, too, with captions through the language model.
With `alignment.vision_lr` the vision encoder learns along with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloc_mllm.config import AlignmentConfig, OptimConfig, Stage2Config
from cloc_mllm.data.mixture import parts_of
from cloc_mllm.data.records import Record
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor
from cloc_mllm.mllm.feature_cache import FeatureCache, record_inputs
from cloc_mllm.mllm.modeling import VisionInputs
from cloc_mllm.mllm.scene_tokens import SceneTargets, embed_scene, scene_targets
from cloc_mllm.train.engine import StepFn
from cloc_mllm.train.loop import Job, TrainResult, train

_PROJECTORS = ("projector.", "region_projector.")


@dataclass
class AlignmentBatch:
    """`vision`: the processor's tensors for pictures with all their regions."""

    vision: dict[str, Tensor]
    scene: SceneTargets

    def to(self, device: torch.device | str) -> AlignmentBatch:
        vision = {name: value.to(device, non_blocking=True) for name, value in self.vision.items()}
        return AlignmentBatch(vision, self.scene.to(device))


class AlignmentCollator:
    """`(sample_seed, Record)` items -> AlignmentBatch; nothing is random."""

    def __init__(self, processor: ClocMllmProcessor, features: FeatureCache | None = None) -> None:
        self.processor = processor
        self.features = features

    def __call__(self, items: Sequence[tuple[int, Record]]) -> AlignmentBatch:
        records = [record for _, record in items]
        boxes = [[region.box for region in record.regions] for record in records]
        vision = record_inputs(self.processor, records, boxes, self.features)
        regions = [record.regions for record in records]
        return AlignmentBatch(vision, scene_targets(self.processor, records, regions))


def align_projectors(
    model: ClocMllmForConditionalGeneration,
    processor: ClocMllmProcessor,
    dataset: Sequence[Record],
    config: Stage2Config,
    features: FeatureCache | None = None,
) -> TrainResult | None:
    """Trains `model`'s projectors in place, in `config.run.output_dir/alignment`, resumable.

    Returns:
        None where `config.alignment.steps` is 0.

    Raises:
        ValueError: boxes are not written as location tokens, which scene tokens are made of.
    """
    if not config.alignment.steps:
        return None
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    settings = config.alignment
    learning = taught_parts(settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(learning))
    job = Job(
        model,
        alignment_step(processor),
        dataset,
        AlignmentCollator(processor, features),
        lambda trained, directory: None,  # a finished run resumes from its last checkpoint, too
        resolved_config=dataclasses.asdict(config),
        fingerprint=processor.fingerprint,
        num_workers=config.data.num_workers,
        mixture=parts_of(dataset),
        kept_frozen=(),
    )
    run = dataclasses.replace(
        config.run,
        output_dir=str(Path(config.run.output_dir) / "alignment"),
        steps=settings.steps,
        global_batch_size=settings.global_batch_size,
    )
    optim = OptimConfig(
        settings.optimizer,
        lr=settings.lr,
        weight_decay=0.0,
        layer_lr={"vision": settings.vision_lr},
    )
    result = train(job, run, optim)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return result


def taught_parts(settings: AlignmentConfig) -> tuple[str, ...]:
    """Prefixes of the names of the parameters that alignment changes."""
    if not settings.steps:
        return ()
    return (*_PROJECTORS, "vision.") if settings.vision_lr else _PROJECTORS


def check_alignment(model: ClocMllmForConditionalGeneration, settings: AlignmentConfig) -> None:
    """
    Raises:
        ValueError: the projector's tokens have no place in the image.
    """
    if settings.steps and model.config.projector == "resampler":
        raise ValueError(
            "alignment tells each image token what lies at its place, but the resampler's tokens "
            "have none; set alignment.steps to 0, or model.projector to mlp, linear or "
            "pixel_shuffle"
        )
    if settings.steps and "max_tiles" in model.config.fingerprint:
        raise ValueError(
            "alignment knows the whole image's tokens alone; set alignment.steps or "
            "model.max_tiles to 0"
        )


def alignment_step(processor: ClocMllmProcessor) -> StepFn:
    """Squared distance between what the projectors write and the scene tokens, in units of the
    scene tokens' variance: 1 is as good as their mean."""
    location: Any = processor.tokenizer.convert_tokens_to_ids(processor.coordinates.tokens())
    if not location:
        raise ValueError(
            "alignment needs location tokens; set model.box_format to location_tokens or "
            "alignment.steps to 0"
        )

    def step(model: nn.Module, batch: AlignmentBatch) -> dict[str, Tensor]:
        assert isinstance(model, ClocMllmForConditionalGeneration)
        with torch.no_grad():
            location_ids = torch.tensor(location, device=model.device)
            cells, regions = embed_scene(batch.scene, model.get_input_embeddings(), location_ids)
        inputs = VisionInputs(**batch.vision)
        image_features, region_features = model.encode_vision(inputs)
        variance = cells.var((0, 1)).mean()
        cell_loss = _mean_square(image_features - cells) / variance
        region_loss = _mean_square(region_features - regions) / variance
        return {"loss": cell_loss + region_loss, "cells": cell_loss, "regions": region_loss}

    return step


def _mean_square(errors: Tensor) -> Tensor:
    """0 where there is nothing (a batch without regions)."""
    return errors.square().sum() / max(1, errors.numel())
