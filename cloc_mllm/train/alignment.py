"""Alignment, before stage 2: the projectors learn to write scene tokens.

The target of each image token is the scene token (`mllm/scene_tokens.py`) of what the records say
lies there, in the language model's own embeddings. So every token of an image has a target, and the
language model does not run. (LLaVA also aligns its projector first, but with captions through the
language model.) With `alignment.vision_lr` the vision encoder learns along with the projectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cloc_mllm.config import AlignmentConfig, OptimConfig, Stage2Config
from cloc_mllm.data.chats import MentionedBox
from cloc_mllm.data.feature_cache import FeatureCache
from cloc_mllm.data.mixture import parts_of
from cloc_mllm.data.records import Record
from cloc_mllm.devices import without_waiting
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor
from cloc_mllm.mllm.feature_cache import picture_inputs
from cloc_mllm.mllm.modeling import VisionInputs
from cloc_mllm.mllm.processing import token_ids
from cloc_mllm.mllm.scene_tokens import SceneTargets, embed_scene, scene_targets
from cloc_mllm.train.engine import StepFn
from cloc_mllm.train.loop import Job, TrainResult, train

_PROJECTORS = ("projector.", "region_projector.")


@dataclass
class AlignmentBatch:
    """One rank's batch.

    Attributes:
        vision: the processor's tensors for the images with all their regions.
        scene: the targets.
        most_regions: the most regions that any image has.
    """

    vision: dict[str, Tensor]
    scene: SceneTargets
    most_regions: int

    def to(self, device: torch.device | str) -> AlignmentBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> AlignmentBatch:
        """Pins the tensors, for `DataLoader(pin_memory=True)`, which looks for this method."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> AlignmentBatch:
        vision = {name: change(value) for name, value in self.vision.items()}
        return AlignmentBatch(vision, self.scene.each(change), self.most_regions)


class AlignmentCollator:
    """Makes an `AlignmentBatch` of `(sample_seed, Record)` items; nothing in it is random."""

    def __init__(self, processor: ClocMllmProcessor, features: FeatureCache | None = None) -> None:
        self.processor = processor
        self.features = features

    def __call__(self, items: Sequence[tuple[int, Record]]) -> AlignmentBatch:
        records = [record for _, record in items]
        boxes = [[MentionedBox(0, region.box) for region in of.regions] for of in records]
        rows = [[record] for record in records]
        vision = picture_inputs(self.processor, rows, boxes, self.features)
        regions = [record.regions for record in records]
        most = int(vision["region_image_index"].bincount().max()) if any(regions) else 0
        return AlignmentBatch(vision, scene_targets(self.processor, records, regions), most)


def align_projectors(
    model: ClocMllmForConditionalGeneration,
    processor: ClocMllmProcessor,
    dataset: Sequence[Record],
    config: Stage2Config,
    features: FeatureCache | None = None,
) -> TrainResult | None:
    """Trains the model's projectors in place. The run is in `config.run.output_dir/alignment`.

    It resumes as any run does, even if it has finished.

    Args:
        features: the cached tokens of the frozen encoder, if they are used.

    Returns:
        the result of the run; None if `config.alignment.steps` is 0.

    Raises:
        ValueError: boxes are not written as location tokens, of which scene tokens are made.
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
        lambda trained, directory: None,  # the last checkpoint is all that stage 2 needs
        resolved_config=dataclasses.asdict(config),
        default_config=dataclasses.asdict(Stage2Config()),
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
        spike_bound=config.optim.spike_bound,
        layer_lr={"vision": settings.vision_lr},
    )
    result = train(job, run, optim)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return result


def taught_parts(settings: AlignmentConfig) -> tuple[str, ...]:
    """Lists the parameters that alignment changes, by prefixes of their names."""
    if not settings.steps:
        return ()
    return (*_PROJECTORS, "vision.") if settings.vision_lr else _PROJECTORS


def forget_phrases(processor: ClocMllmProcessor, taught: Sequence[str]) -> None:
    """Drops the list of phrases where alignment teaches the encoder, whose regions move from it."""
    if "vision." in taught:
        processor.phrases = None


def check_alignment(model: ClocMllmForConditionalGeneration, settings: AlignmentConfig) -> None:
    """Checks that the model can be aligned.

    Raises:
        ValueError: the projector's tokens have no place in the image, or the image has tiles.
    """
    if settings.steps and model.config.projector == "resampler":
        raise ValueError(
            "alignment tells each image token what lies at its place, but the resampler's tokens "
            "have none; set alignment.steps to 0, or model.projector to mlp, linear or "
            "pixel_shuffle"
        )
    if settings.steps and "max_tiles" in model.config.fingerprint:
        raise ValueError(
            "alignment has targets for the whole image, but none for its tiles; set "
            "alignment.steps or model.max_tiles to 0"
        )


def alignment_step(processor: ClocMllmProcessor) -> StepFn:
    """Makes the step: the squared distance of the projectors' tokens from the scene tokens.

    It is divided by the variance of the scene tokens, so a projector that always writes their mean
    has a loss of 1.
    """
    location = token_ids(processor.tokenizer, processor.coordinates.tokens())
    if not location:
        raise ValueError(
            "alignment needs location tokens; set model.box_format to location_tokens or "
            "alignment.steps to 0"
        )

    def step(model: nn.Module, batch: AlignmentBatch) -> dict[str, Tensor]:
        assert isinstance(model, ClocMllmForConditionalGeneration)
        with torch.no_grad():
            location_ids = without_waiting(torch.tensor(location), model.device)
            cells, regions = embed_scene(batch.scene, model.get_input_embeddings(), location_ids)
        inputs = VisionInputs(**batch.vision)
        image_features, region_features = model.encode_vision(inputs, batch.most_regions)
        variance = cells.var((0, 1)).mean()
        cell_loss = _mean_square(image_features - cells) / variance
        region_loss = _mean_square(region_features - regions) / variance
        return {"loss": cell_loss + region_loss, "cells": cell_loss, "regions": region_loss}

    return step


def _mean_square(errors: Tensor) -> Tensor:
    """The mean of the squares; 0 if there are none, as in a batch without regions."""
    return errors.square().sum() / max(1, errors.numel())
