"""Regions of the MLLM: brings boxes, points and masks to the canvas and reads their features.

Letters: B images, N image tokens, R regions (packed), D_i widths of their features, S canvas side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from cloc_mllm.data.wordings import REGION_TOKEN
from cloc_mllm.geometry import Boxes
from cloc_mllm.mllm.views import View, sharpest_view
from cloc_mllm.mllm.vision_inputs import VisionInputs
from cloc_mllm.models.cloc import ClocVision
from cloc_mllm.models.position import mask_coverage
from cloc_mllm.models.region_encoders.pooling import pool_under_masks
from cloc_mllm.models.region_encoders.roi_align import roi_align_tokens
from cloc_mllm.models.region_like import RegionLike, around, as_mask
from cloc_mllm.models.vision_encoder import ImageFeatures

Regions = Boxes | Sequence[RegionLike] | None


def regions_on_canvas(
    regions: Regions, views: Sequence[View]
) -> tuple[Tensor, list[Tensor | None], list[int]]:
    """Brings the regions of one image to the canvas of one of its views each.

    Returns:
        boxes float[R, 4] in the canvas frame (for a mask or point the box around it); the mask
        float[S, S] of each region over the canvas, None for a box; and the view of each region,
        which for a mask is always the first.

    Raises:
        ValueError: see `as_mask`.
    """
    boxes, masks = _boxes_and_masks(regions, views[0].image_wh)
    xyxy = boxes.to_normalized().xyxy.tolist()
    seen_on = [
        sharpest_view(views, box) if mask is None else 0
        for box, mask in zip(xyxy, masks, strict=True)
    ]
    on_each = torch.stack([view.to_canvas(boxes).xyxy.float() for view in views])
    whole = views[0].transform
    return (
        on_each[seen_on, range(len(seen_on))],
        [None if mask is None else whole.mask_to_canvas(mask) for mask in masks],
        seen_on,
    )


def _boxes_and_masks(
    regions: Regions, image_wh: tuple[int, int]
) -> tuple[Boxes, list[Tensor | None]]:
    if isinstance(regions, Boxes):
        return regions, [None] * len(regions)
    given = [] if regions is None else list(regions)
    masks = [as_mask(region, image_wh) for region in given]
    boxes = [
        torch.as_tensor(region, dtype=torch.float64).tolist() if mask is None else around(mask)
        for region, mask in zip(given, masks, strict=True)
    ]
    return Boxes.normalized(boxes), masks


def regions_by_image(regions: Any, num_images: int) -> list[Any]:
    """Splits a row's regions by image; a row of one image may give them without the outer list."""
    if num_images > 1 and regions is not None:
        parts = list(regions)
        if len(parts) != num_images:
            raise ValueError(
                f"got regions for {len(parts)} images in a row of {num_images}; pass one list per "
                "image (an empty one where there are none)"
            )
    else:
        parts = [regions] * min(1, num_images) if num_images <= 1 else [None] * num_images
    return [[] if part is None else part for part in parts]


def check_placeholders(row: int, text: str, regions: Sequence[Sized]) -> None:
    """Raises `ValueError` unless the text of a row has one `<region>` per region."""
    found, given = text.count(REGION_TOKEN), sum(map(len, regions))
    if found != given:
        raise ValueError(
            f"sample {row} has {found} {REGION_TOKEN} placeholders but {given} region boxes; "
            "write one placeholder per box"
        )


def place_regions(
    views: Sequence[Sequence[View]],
    rows: Sequence[Sequence[int]],
    regions: Sequence[Sequence[Regions]],
) -> dict[str, Tensor]:
    """Makes all of `VisionInputs` but the pixels.

    Args:
        views: the views of each distinct image.
        rows: for each row the numbers of its images.
        regions: for each row the regions of each of its images.

    Raises:
        ValueError: see `as_mask`; names the row.
    """
    first_of = list(itertools.accumulate(map(len, views), initial=0))
    image_index: list[int] = []
    boxes: list[Tensor] = []
    masks: list[Tensor | None] = []
    region_image_index: list[int] = []
    for sample, (row, row_regions) in enumerate(zip(rows, regions, strict=True)):
        for image, image_regions in zip(row, row_regions, strict=True):
            try:
                canvas_boxes, canvas_masks, seen_on = regions_on_canvas(image_regions, views[image])
            except ValueError as error:
                raise ValueError(f"sample {sample}: {error}") from error
            boxes.append(canvas_boxes)
            masks += canvas_masks
            region_image_index += [len(image_index) + view for view in seen_on]
            image_index += range(first_of[image], first_of[image + 1])
    placed = {
        "image_frame": torch.cat([view.frame() for image_views in views for view in image_views]),
        "image_index": torch.tensor(image_index),
        "region_boxes": torch.cat(boxes),
        "region_image_index": torch.tensor(region_image_index, dtype=torch.long),
    }
    some = next((mask for mask in masks if mask is not None), None)
    if some is not None:
        filled = [torch.zeros_like(some) if mask is None else mask for mask in masks]
        placed["region_masks"] = torch.stack(filled)
    return placed


def region_dims(kind: str, vision: ClocVision) -> list[int]:
    """Returns the widths D_i of what `read_regions` returns.

    Args:
        kind: `MllmConfig.region_features`.
    """
    if kind == "coordinates":
        return []
    return list(vision.token_dims) if kind == "roi" else [vision.embed_dim]


def read_regions(
    kind: str,
    vision: ClocVision,
    image: ImageFeatures,
    inputs: VisionInputs,
    most_regions: int | None = None,
) -> list[Tensor]:
    """Reads the features of all regions: a list of float[R, D_i].

    Args:
        kind: `MllmConfig.region_features`.
        most_regions: see `RegionEncoder.embed_boxes`.

    Raises:
        ValueError: there are masks, but the model knows boxes alone.
    """
    boxes, masks = inputs.region_boxes, inputs.region_masks
    image_index = inputs.image_index[inputs.region_image_index]
    if masks is not None:
        check_takes_masks(kind, vision)
    if kind == "coordinates":
        return []
    if kind == "roi":
        features = roi_align_tokens(image.tokens, image.grid_hw, boxes, image_index)
        features = features.to(image.tokens.dtype)
    else:
        features = vision.embed_boxes(image, boxes, image_index, most_regions)
    if masks is not None:
        masked = masks.flatten(1).any(1).nonzero()[:, 0]
        pooled = _pooled_under_masks(kind, vision, image, (masks[masked], image_index[masked]))
        features = features.index_copy(0, masked, pooled.to(features.dtype))
    return [*vision.split_scales(features)] if kind == "roi" else [features]


def _pooled_under_masks(
    kind: str, vision: ClocVision, image: ImageFeatures, masks_and_index: tuple[Tensor, Tensor]
) -> Tensor:
    masks, image_index = masks_and_index
    if kind == "roi":
        shares = mask_coverage(masks, image.grid_hw)
        return pool_under_masks(image.tokens, shares, image_index)
    return vision.embed_masks(image, masks, image_index)


def takes_masks(kind: str, vision: ClocVision) -> bool:
    """Tells whether a model can take points and masks, or knows boxes alone."""
    return kind == "roi" or (kind == "prompter" and vision.region_encoder.takes_masks)


def check_takes_masks(kind: str, vision: ClocVision) -> None:
    """Checks that a model can take points and masks.

    Raises:
        ValueError: the model knows boxes alone, so points and masks would mean nothing to it.
    """
    if takes_masks(kind, vision):
        return
    why = (
        "its region tokens hold a box alone (model.region_features: coordinates)"
        if kind == "coordinates"
        else "its encoder learnt no points and masks (model.prompter.free_form of stage 1)"
    )
    raise ValueError(
        f"this model takes boxes, not points and masks: {why}; pass the box around them, or a "
        "model of stage 2 with model.region_features roi, or with an encoder of free_form"
    )
