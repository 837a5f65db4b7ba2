"""L = L_CLIP + lambda (L_CLOC + L_grounding), equation 4."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cloc_mllm.config import LossConfig
from cloc_mllm.distributed import gather_counts
from cloc_mllm.losses.contrastive import contrastive_loss
from cloc_mllm.losses.grounding import grounding_loss
from cloc_mllm.models.cloc import ClocInputs, ClocOutputs
from cloc_mllm.models.position import at_least_float32


class _Counts(NamedTuple):
    """Numbers of every rank's batch."""

    captions: tuple[int, ...]
    regions: tuple[int, ...]
    images: tuple[int, ...]
    with_regions: tuple[int, ...]

    @classmethod
    def gather(cls, batch: ClocInputs) -> _Counts:
        index = batch.on_host.region_image_index
        own = (
            len(batch.caption_image_index),
            len(index),
            len(batch.pixel_values),
            len(index.unique()),
        )
        return cls(*zip(*gather_counts(own, batch.pixel_values.device), strict=True))


def cloc_loss(outputs: ClocOutputs, batch: ClocInputs, config: LossConfig) -> dict[str, Tensor]:
    """Computes the terms by name and their weighted sum `loss`, each scaled so that its mean over
    ranks is the single-process value.

    lambda = `config.region_weight` * (images with regions) / (images), counted over all ranks. For
    a plain CLIP there is `clip` alone; a region encoder that predicts no boxes has no `grounding`.
    `same_text` is the share of pairs that L_CLOC leaves out because their texts say the same.
    """
    counts = _Counts.gather(batch)
    clip = contrastive_loss(
        outputs.image_features,
        outputs.caption_features,
        outputs.temperature.logit_scale,
        1.0,  # captions are not filtered
        logit_bias=outputs.temperature.logit_bias,
        counts=counts.captions,
    )
    terms = {"loss": clip, "clip": clip.detach()}
    if outputs.region_features is None:
        return terms
    assert outputs.region_text_features is not None and outputs.region_temperature is not None
    weight = config.region_weight * sum(counts.with_regions) / sum(counts.images)
    filtered = at_least_float32(outputs.region_features).new_zeros(())
    log_prior = batch.phrase_log_prior
    region = contrastive_loss(
        outputs.region_features,
        outputs.region_text_features,
        outputs.region_temperature.logit_scale,
        config.same_text_threshold,
        logit_bias=outputs.region_temperature.logit_bias,
        text_log_prior=None if log_prior is None else log_prior[batch.region_phrase_index],
        counts=counts.regions,
        filtered_share=filtered,
    )
    terms |= {"loss": terms["loss"] + weight * region, "cloc": region.detach()}
    terms["same_text"] = filtered
    if outputs.located_boxes is not None and config.grounding_weight > 0:
        targets, of_region = batch.boxes, None
        if config.box_target == "nearest":
            targets, of_region = batch.phrase_boxes, batch.phrase_box_region
        total = sum(counts.regions)
        answers = [
            grounding_loss(answer, targets, total, config.box, of_region)
            for answer in outputs.located_boxes
        ]
        boxes = torch.stack(answers).sum()
        terms["loss"] = terms["loss"] + weight * config.grounding_weight * boxes
        terms["grounding"] = boxes.detach()
    return terms
