"""True boxes named by several region features of one image tower, side by side.

Letters: B images, R regions of a batch, C classes, E embedding width, N tokens, S canvas side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cloc_mllm.data.records import Record
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.data.transforms import preprocess
from cloc_mllm.evaluation.generate_cloc import (
    Settings,
    encode_images,
    in_inference,
    index_of_images,
    nearest,
)
from cloc_mllm.evaluation.predictions import Box, PredictionRow
from cloc_mllm.evaluation.prompts import class_embeddings
from cloc_mllm.evaluation.true_boxes import TrueBox, TrueBoxes
from cloc_mllm.geometry import Boxes, Letterbox
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.position import cell_coverage, mask_coverage, token_cells
from cloc_mllm.models.region_encoders.pooling import pool_under_masks
from cloc_mllm.models.region_encoders.roi_align import roi_align_tokens
from cloc_mllm.models.vision_encoder import ImageFeatures

RegionFeatures = Literal["cloc", "roi_align", "crop", "mask"]
# row task -> how its regions are embedded
TRUE_BOX_TASKS: dict[str, RegionFeatures] = {
    "true_box_cloc": "cloc",
    "true_box_roi_align": "roi_align",
    "true_box_crop": "crop",
    "true_box_mask": "mask",
}


@dataclass
class _Batch:
    """Encoded images with their boxes, packed: `canvas: float[R, 4]` is `items` on the canvas."""

    records: Sequence[Record]
    items: list[TrueBox]
    letterboxes: Sequence[Letterbox]
    image: ImageFeatures
    canvas: Tensor
    image_index: Tensor


def predict_true_boxes(
    model: Cloc,
    tokenizer: TextTokenizer,
    records: Sequence[Record],
    boxes: TrueBoxes,
    tasks: Sequence[str],
    settings: Settings,
) -> list[PredictionRow]:
    """One row a box and task (of `TRUE_BOX_TASKS`): the ten nearest class names by cosine.

    Rows of `true_box_mask` say in `settings["mask"]` whether they used the box's own mask
    (`segmentation`) or, where that is absent, unreadable or empty, its box (`box`).
    """
    items_of: dict[str, list[TrueBox]] = {}
    for item in boxes.items:
        items_of.setdefault(item.image_id, []).append(item)
    rows: list[PredictionRow] = []
    with in_inference(model, settings.precision) as precision:
        classes = class_embeddings(model, tokenizer, boxes.class_names, settings.templates)
        shared = {
            "image_size": model.vision.encoder.image_size,
            "precision": precision,
            "templates": settings.templates,
        }
        steps = range(0, len(records), settings.batch_size)
        for start in tqdm(steps, "true boxes", unit="batch", disable=not settings.progress):
            stop = min(start + settings.batch_size, len(records))
            chosen = [record for i in range(start, stop) if (record := records[i]).id in items_of]
            if chosen:
                batch = _encode(model, chosen, [items_of[record.id] for record in chosen])
                for task in tasks:
                    answers = _answer(model, batch, task, classes, settings.batch_size)
                    rows += _rows(batch.items, task, answers, boxes.class_names, settings, shared)
    return rows


def _encode(model: Cloc, records: list[Record], items: Sequence[list[TrueBox]]) -> _Batch:
    image, letterboxes = encode_images(model, records)
    canvas = [
        letterbox.to_canvas(Boxes.normalized([item.box for item in own])).xyxy.float()
        for letterbox, own in zip(letterboxes, items, strict=True)
    ]
    device = image.tokens.device
    return _Batch(
        records,
        [item for own in items for item in own],
        letterboxes,
        image,
        torch.cat(canvas).to(device),
        index_of_images(items, device),
    )


@dataclass
class _Answers:
    scores: list[list[float]]
    order: list[list[int]]
    notes: list[dict[str, str]]  # of each row, for its settings


def _answer(model: Cloc, batch: _Batch, task: str, classes: Tensor, chunk: int) -> _Answers:
    kind = TRUE_BOX_TASKS[task]
    notes: list[dict[str, str]] = [{} for _ in batch.items]
    if kind == "cloc":
        z = model.embed_boxes(batch.image, batch.canvas, batch.image_index)
    elif kind == "crop":
        z = _embed_crops(model, batch, chunk)
    else:
        tokens = model.vision.encoder.project_tokens(batch.image.tokens)
        if kind == "roi_align":
            z = roi_align_tokens(tokens, batch.image.grid_hw, batch.canvas, batch.image_index)
        else:
            shares, notes = _mask_shares(batch)
            z = pool_under_masks(tokens, shares, batch.image_index)
    return _Answers(*nearest(z, classes), notes)


def _embed_crops(model: Cloc, batch: _Batch, chunk: int) -> Tensor:
    """Each box cut out of the original image and encoded as an image of its own: float[R, E]."""
    parameter = next(model.parameters())
    image_index, size = batch.image_index.tolist(), model.vision.encoder.image_size
    pictures: dict[int, Image.Image] = {}
    parts = []
    for start in range(0, len(batch.items), chunk):
        pixels = []
        for r in range(start, min(start + chunk, len(batch.items))):
            if image_index[r] not in pictures:  # boxes are in the order of the images
                pictures = {image_index[r]: batch.records[image_index[r]].load_image()}
            crop = crop_box(pictures[image_index[r]], batch.items[r].box)
            pixels.append(preprocess(crop, size)[0])
        canvas = torch.stack(pixels).to(parameter.device, parameter.dtype)
        parts.append(model.encode_image(canvas).image_features)
    return torch.cat(parts)


def crop_box(image: Image.Image, box: Box) -> Image.Image:
    """The whole pixels that a normalised box touches; no context around it."""
    left, top = math.floor(box[0] * image.width), math.floor(box[1] * image.height)
    right, bottom = math.ceil(box[2] * image.width), math.ceil(box[3] * image.height)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _mask_shares(batch: _Batch) -> tuple[Tensor, list[dict[str, str]]]:
    """float[R, N]: share of each token's cell under each region's mask, or under its box."""
    grid_hw = batch.image.grid_hw
    cells = token_cells(grid_hw, batch.canvas.device)
    shares = cell_coverage(batch.canvas, cells)
    notes = []
    for r, (item, i) in enumerate(zip(batch.items, batch.image_index.tolist(), strict=True)):
        mask = decode_mask(item)
        if mask is not None:
            canvas = batch.letterboxes[i].mask_to_canvas(torch.from_numpy(mask))
            shares[r] = mask_coverage(canvas[None], grid_hw)[0].to(shares)
        notes.append({"mask": "box" if mask is None else "segmentation"})
    return shares, notes


def decode_mask(item: TrueBox) -> np.ndarray | None:
    """uint8[H, W] of a COCO segmentation: polygons, run lengths or a compressed string of them.

    None where there is none, it is of another shape, or nothing of it is on the image.
    """
    from pycocotools import mask as coco_mask

    segmentation, (height, width) = item.segmentation, item.image_hw
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


def _rows(
    items: Sequence[TrueBox],
    task: str,
    answers: _Answers,
    class_names: Sequence[str],
    settings: Settings,
    shared: dict[str, Any],
) -> Iterator[PredictionRow]:
    for item, scores, order, note in zip(
        items, answers.scores, answers.order, answers.notes, strict=True
    ):
        yield PredictionRow(
            f"{task}/{item.id}",
            item.image_id,
            task,
            prompt=str([round(value, 4) for value in item.box]),
            labels=[class_names[index] for index in order],
            scores=scores,
            model=settings.name,
            settings={"region_features": TRUE_BOX_TASKS[task], **shared, **note},
        )
