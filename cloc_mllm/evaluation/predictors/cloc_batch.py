"""Runs a batch of images through CLOC: embeds regions in several ways and locates texts.

Letters: B images, R regions of the batch (packed), N image tokens, P texts, E embedding width,
S canvas side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import nms

from cloc_mllm.box import Box
from cloc_mllm.config import RegionPrompt
from cloc_mllm.data.records import Record
from cloc_mllm.data.shapes import sample_shape
from cloc_mllm.evaluation.queries import Query, RegionFeatures
from cloc_mllm.geometry import CANVAS, Boxes, CanvasTransform
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.position import cell_coverage, mask_coverage, token_cells
from cloc_mllm.models.region_encoders.pooling import pool_under_masks
from cloc_mllm.models.region_encoders.roi_align import roi_align_tokens
from cloc_mllm.models.vision_encoder import ImageFeatures

_SAME_BOX_IOU = 0.5  # a proposal closer than this to a better one is that one again


@dataclass(frozen=True)
class Batch:
    """Encoded images, with the transform of each."""

    records: Sequence[Record]
    image: ImageFeatures
    transforms: Sequence[CanvasTransform]


class Located(NamedTuple):
    """The place of a text: a box cut to the image (None if not finite), and the cosine of the text
    and the box's embedding."""

    box: Box | None
    confidence: float | None


def encode_batch(model: Cloc, records: Sequence[Record]) -> Batch:
    parameter = next(model.parameters())
    preprocess = model.vision.encoder.preprocessing
    pixels, transforms = zip(*(preprocess(record.load_image()) for record in records), strict=True)
    image = model.encode_image(torch.stack(pixels).to(parameter.device, parameter.dtype))
    return Batch(records, image, transforms)


def embed_boxes(
    model: Cloc, batch: Batch, boxes: Sequence[Sequence[Box]], prompt: RegionPrompt = "box"
) -> Tensor:
    """Embeds each image's boxes (normalised) with CLOC's region encoder: float[R, E].

    Args:
        prompt: shows the region as a point, scribble or mask drawn in its box instead.
    """
    canvas, image_index = _on_canvas(batch, boxes)
    if prompt == "box" or not len(canvas):
        return model.embed_boxes(batch.image, canvas, image_index)
    shapes = [sample_shape(prompt, box, _box_rng(box)) for box in canvas.tolist()]
    masks = torch.stack(shapes).to(canvas.device)
    return model.vision.embed_masks(batch.image, masks, image_index)


def _box_rng(box: Sequence[float]) -> np.random.Generator:
    """Makes a random stream that depends on the box, so that a box is always shown the same way."""
    return np.random.default_rng([int(1e6 * value) for value in box])


def embed_otherwise(
    model: Cloc,
    batch: Batch,
    features: RegionFeatures,
    queries: Sequence[Sequence[Query]],
    chunk_size: int,
) -> tuple[Tensor, list[dict[str, str]]]:
    """Embeds each image's one-box queries without the region encoder: float[R, E].

    Returns:
        the embeddings, and per query what is to be noted: for `mask` whether the region's own
        `segmentation` was used or, where that is absent, unreadable or empty, its `box`.
    """
    packed = [query for own in queries for query in own]
    canvas, image_index = _on_canvas(batch, [[query.boxes[0] for query in own] for own in queries])
    if features == "crop":
        z = _embed_crops(model, batch, packed, image_index.tolist(), chunk_size)
        return z, [{} for _ in packed]
    tokens = model.vision.encoder.project_tokens(batch.image.tokens)
    if features == "roi_align":
        z = roi_align_tokens(tokens, batch.image.grid_hw, canvas, image_index)
        return z, [{} for _ in packed]
    shares, notes = _mask_shares(batch, packed, canvas, image_index)
    return pool_under_masks(tokens, shares, image_index), notes


def _embed_crops(
    model: Cloc,
    batch: Batch,
    queries: Sequence[Query],
    image_index: Sequence[int],
    chunk_size: int,
) -> Tensor:
    """Cuts each box out of the original image and encodes it as an image of its own."""
    parameter, preprocess = next(model.parameters()), model.vision.encoder.preprocessing
    images: dict[int, Image.Image] = {}
    parts = []
    for start in range(0, len(queries), chunk_size):
        pixels = []
        for r in range(start, min(start + chunk_size, len(queries))):
            if image_index[r] not in images:  # boxes are in the order of the images
                images = {image_index[r]: batch.records[image_index[r]].load_image()}
            crop = crop_box(images[image_index[r]], queries[r].boxes[0])
            pixels.append(preprocess(crop)[0])
        canvas = torch.stack(pixels).to(parameter.device, parameter.dtype)
        parts.append(model.encode_image(canvas).image_features)
    return torch.cat(parts)


def crop_box(image: Image.Image, box: Box) -> Image.Image:
    """The whole pixels that a normalised box touches; no context around it."""
    left, top = math.floor(box[0] * image.width), math.floor(box[1] * image.height)
    right, bottom = math.ceil(box[2] * image.width), math.ceil(box[3] * image.height)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _mask_shares(
    batch: Batch, queries: Sequence[Query], canvas: Tensor, image_index: Tensor
) -> tuple[Tensor, list[dict[str, str]]]:
    """float[R, N]: share of each token's cell under each region's mask, or under its box."""
    grid_hw = batch.image.grid_hw
    shares = cell_coverage(canvas, token_cells(grid_hw, canvas.device))
    notes = []
    for r, (query, i) in enumerate(zip(queries, image_index.tolist(), strict=True)):
        mask = decode_mask(query.segmentation, query.image_hw)
        if mask is not None:
            on_canvas = batch.transforms[i].mask_to_canvas(torch.from_numpy(mask))
            shares[r] = mask_coverage(on_canvas[None], grid_hw)[0].to(shares)
        notes.append({"mask": "box" if mask is None else "segmentation"})
    return shares, notes


def decode_mask(segmentation: Any, image_hw: tuple[int, int]) -> np.ndarray | None:
    """uint8[H, W] of a COCO segmentation: polygons, run lengths or a compressed string of them.

    None where there is none, it is of another shape, or nothing of it is on the image.
    """
    from pycocotools import mask as coco_mask

    height, width = image_hw
    if _are_polygons(segmentation):
        encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif _are_run_lengths(segmentation, height, width):
        is_list = isinstance(segmentation["counts"], list)
        encoded = coco_mask.frPyObjects(segmentation, height, width) if is_list else segmentation
    else:
        return None
    mask = coco_mask.decode(encoded)
    return mask if mask.any() else None


def _are_polygons(segmentation: Any) -> bool:
    """Lists of at least three points; pycocotools would take four numbers for a box."""
    return bool(segmentation) and all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(isinstance(value, (int, float)) for value in polygon)
        for polygon in (segmentation if isinstance(segmentation, list) else [None])
    )


def _are_run_lengths(segmentation: Any, height: int, width: int) -> bool:
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return False
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        return all(isinstance(n, int) and n >= 0 for n in counts) and sum(counts) == height * width
    return isinstance(counts, str)


def locate_texts(model: Cloc, batch: Batch, texts: Tensor, image_index: Tensor) -> list[Located]:
    """The box of each text, `texts: float[P, E]` in the order of the images."""
    canvas = model.locate(batch.image, texts, image_index)
    finite = canvas.isfinite().all(1)
    z = model.embed_boxes(batch.image, canvas.nan_to_num(0, 0, 0), image_index)
    cosine = F.cosine_similarity(z.float(), texts.float(), dim=-1).tolist()
    boxes = _in_original(canvas, image_index, batch.transforms)
    return [
        Located(box, round(score, 4) if math.isfinite(score) else None)
        if is_finite
        else Located(None, None)
        for box, score, is_finite in zip(boxes, cosine, finite.tolist(), strict=True)
    ]


def proposals(
    model: Cloc, batch: Batch, texts: Tensor, image_index: Tensor
) -> Iterator[list[tuple[float, Box]]]:
    """Boxes that the image's tokens stand for (`ClocVision.read_tokens`), with their cosines to
    each text, best first; none for a model without a Prompter."""
    if not model.vision.region_encoder.predicts_boxes:
        yield from ([] for _ in texts)
        return
    z, canvas = model.vision.read_tokens(batch.image)
    num_images, num_tokens = canvas.shape[:2]
    every = torch.arange(num_images, device=canvas.device).repeat_interleave(num_tokens)
    boxes = _in_original(canvas.flatten(0, 1).nan_to_num(0, 0, 0), every, batch.transforms)
    z = F.normalize(z.float(), dim=-1)
    cosine = torch.einsum("pne,pe->pn", z[image_index], F.normalize(texts.float(), dim=-1))
    ranked = cosine.nan_to_num(-1).sort(descending=True)
    for i, scores, order in zip(
        image_index.tolist(), ranked.values.tolist(), ranked.indices.tolist(), strict=True
    ):
        own = boxes[i * num_tokens : (i + 1) * num_tokens]
        yield [(score, own[token]) for score, token in zip(scores, order, strict=True)]


def rank_boxes(first: Box, others: Sequence[tuple[float, Box]], limit: int) -> list[Box]:
    """Ranks `first`, then the others by score, without those that repeat a better box."""
    boxes = torch.tensor([first, *(box for _, box in others)], dtype=torch.float64)
    scores = torch.tensor([float("inf"), *(score for score, _ in others)], dtype=torch.float64)
    kept = nms(boxes, scores, _SAME_BOX_IOU)[:limit]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in boxes[kept].tolist()]


def packed_index(groups: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
    """int64: the position of the image that each item of the packed groups belongs to."""
    counts = torch.tensor([len(items) for items in groups])
    return torch.repeat_interleave(torch.arange(len(groups)), counts).to(device)


def _on_canvas(batch: Batch, boxes: Sequence[Sequence[Box]]) -> tuple[Tensor, Tensor]:
    """Normalised boxes of each image -> canvas boxes float[R, 4] and their images int64[R]."""
    device = batch.image.tokens.device
    canvas = [
        transform.to_canvas(Boxes.normalized(xyxy)).xyxy.float()
        for transform, xyxy in zip(batch.transforms, boxes, strict=True)
    ]
    return torch.cat(canvas).to(device), packed_index(boxes, device)


def _in_original(
    canvas: Tensor, image_index: Tensor, transforms: Sequence[CanvasTransform]
) -> list[Box]:
    """Canvas boxes float[R, 4] -> boxes normalised to their original images, cut to them."""
    parts = canvas.float().cpu().split(image_index.bincount(minlength=len(transforms)).tolist())
    original = [
        transform.to_original(Boxes(part, CANVAS)).xyxy.clamp(0, 1)
        for transform, part in zip(transforms, parts, strict=True)
    ]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in torch.cat(original).tolist()]
