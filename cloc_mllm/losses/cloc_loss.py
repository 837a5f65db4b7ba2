"""L = L_CLIP + lambda (L_CLOC + L_grounding), equation 4."""

from __future__ import annotations

import torch
from torch import Tensor

from cloc_mllm.config import LossConfig
from cloc_mllm.distributed import all_reduce_sum
from cloc_mllm.losses.contrastive import contrastive_loss
from cloc_mllm.losses.grounding import grounding_loss
from cloc_mllm.models.cloc import ClocInputs, ClocOutputs


def cloc_loss(outputs: ClocOutputs, batch: ClocInputs, config: LossConfig) -> dict[str, Tensor]:
    """Computes the terms by name and their weighted sum `loss`, each scaled so that its mean over
    ranks is the single-process value.

    lambda = `config.region_weight` * (images with regions) / (images), counted over all ranks. For
    a plain CLIP there is `clip` alone; a region encoder that predicts no boxes has no `grounding`.
    `same_text` is the share of pairs that L_CLOC leaves out because their texts say the same.
    """
    clip = contrastive_loss(
        outputs.image_features,
        outputs.caption_features,
        outputs.temperature.logit_scale,
        1.0,  # captions are not filtered
        logit_bias=outputs.temperature.logit_bias,
    )
    terms = {"loss": clip, "clip": clip.detach()}
    if outputs.region_features is None:
        return terms
    assert outputs.region_text_features is not None and outputs.region_temperature is not None
    index = batch.region_image_index
    counts = torch.tensor(
        [len(index.unique()), len(batch.pixel_values), len(index)],
        dtype=torch.float32,
        device=index.device,
    )
    with_regions, images, num_regions = all_reduce_sum(counts).tolist()
    weight = config.region_weight * with_regions / images
    filtered = torch.zeros((), device=index.device)
    region = contrastive_loss(
        outputs.region_features,
        outputs.region_text_features,
        outputs.region_temperature.logit_scale,
        config.same_text_threshold,
        logit_bias=outputs.region_temperature.logit_bias,
        filtered_share=filtered,
    )
    terms |= {"loss": terms["loss"] + weight * region, "cloc": region.detach()}
    terms["same_text"] = filtered
    if outputs.located_boxes is not None and config.grounding_weight > 0:
        boxes = grounding_loss(outputs.located_boxes, batch.boxes, int(num_regions), config.box)
        terms["loss"] = terms["loss"] + weight * config.grounding_weight * boxes
        terms["grounding"] = boxes.detach()
    return terms
