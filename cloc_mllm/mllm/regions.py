"""Regions of the MLLM: what a `<region>` token is made of.

Letters: B images, N image tokens, R regions (packed), D_i widths of their features.
"""

from __future__ import annotations

from torch import Tensor

from cloc_mllm.models.cloc import ClocVision
from cloc_mllm.models.region_pooling import roi_align_tokens
from cloc_mllm.models.vision_encoder import ImageFeatures


def region_dims(kind: str, vision: ClocVision) -> list[int]:
    """D_i of `read_regions`. `kind`: `MllmConfig.region_features`."""
    if kind == "coordinates":
        return []
    return [vision.token_dim if kind == "roi" else vision.embed_dim]


def read_regions(
    kind: str, vision: ClocVision, image: ImageFeatures, boxes: Tensor, image_index: Tensor
) -> list[Tensor]:
    """Features of `boxes: float[R, 4]` (canvas frame) on images int64[R]: float[R, D_i] each."""
    if kind == "coordinates":
        return []
    if kind == "roi":
        pooled = roi_align_tokens(image.tokens, image.grid_hw, boxes, image_index)
        return [pooled.to(image.tokens.dtype)]
    return [vision.embed_boxes(image, boxes, image_index)]
