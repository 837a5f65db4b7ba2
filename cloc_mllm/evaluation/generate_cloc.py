"""Predictions of a CLOC model: every image and every distinct text is encoded once.

Letters: I images, R regions, P texts, Q queries, E embedding width, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cloc_mllm.config import Precision, RegionPrompt
from cloc_mllm.data.records import Record
from cloc_mllm.data.shapes import sample_shape
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.data.transforms import preprocess
from cloc_mllm.evaluation.predictions import Box, PredictionRow
from cloc_mllm.evaluation.queries import Benchmark, Query, RegionItem
from cloc_mllm.geometry import CANVAS, Boxes, Letterbox
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.vision_encoder import ImageFeatures
from cloc_mllm.train.engine import resolve_precision

TOP_K = 10
_TEXT_BATCH = 256
Item = TypeVar("Item", Query, RegionItem)


@dataclass
class Settings:
    """How predictions are made; the same for all queries.

    Args:
        name: of the model, for the rows.
        precision: of autocast; `fp32` is exact.
        progress: show a progress bar.
        region_prompt: how CLOC is told of a region: its `box`, or a `point`, `scribble` or `mask`
            drawn in it (always the same for the same box).
    """

    name: str = ""
    batch_size: int = 64
    precision: Precision = "fp32"
    progress: bool = False
    region_prompt: RegionPrompt = "box"


@dataclass
class _Texts:
    """Features of each distinct text, float[P, E], not normalised."""

    index: dict[str, int]
    features: Tensor

    def of(self, texts: Sequence[str]) -> Tensor:
        return self.features[[self.index[text] for text in texts]]


@dataclass
class _Encoded:
    """Everything the answers are read from; features are not normalised."""

    texts: _Texts
    image_features: Tensor  # float[I, E]
    region_features: Tensor  # float[R, E]
    located: dict[str, Box | None]  # by query id


def predict_cloc(
    model: Cloc,
    tokenizer: TextTokenizer,
    records: Sequence[Record],
    bench: Benchmark,
    settings: Settings,
) -> list[PredictionRow]:
    """One row for each query of the benchmark that CLOC answers (all but the MLLM's).

    Args:
        records: those the benchmark was built from, in the same order.
    """
    device = next(model.parameters()).device
    precision = resolve_precision(settings.precision)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with _inference(model), autocast:
        encoded = _encode(model, tokenizer, records, bench, settings)
    row_settings = {
        "image_size": model.vision.encoder.image_size,
        "precision": precision,
        "region_prompt": settings.region_prompt,
    }
    answers = [*_rankings(encoded, bench), *_boxes(encoded, bench)]
    return [replace(row, model=settings.name, settings=row_settings) for row in answers]


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _encode(
    model: Cloc,
    tokenizer: TextTokenizer,
    records: Sequence[Record],
    bench: Benchmark,
    settings: Settings,
) -> _Encoded:
    texts = _encode_texts(model, tokenizer, bench)
    images: list[Tensor] = []
    regions: list[Tensor] = []
    located: dict[str, Box | None] = {}
    regions_of = _by_image(bench.regions)
    queries_of = _by_image(bench.of_task("text_to_box"))
    steps = range(0, len(records), settings.batch_size)
    for start in tqdm(steps, "CLOC", unit="batch", disable=not settings.progress):
        batch = [records[i] for i in range(start, min(start + settings.batch_size, len(records)))]
        image, letterboxes = _encode_images(model, batch)
        images.append(image.image_features)
        boxes = [[item.box for item in regions_of.get(record.id, [])] for record in batch]
        regions.append(_embed_regions(model, image, letterboxes, boxes, settings.region_prompt))
        queries = [queries_of.get(record.id, []) for record in batch]
        if any(queries):
            asked = texts.of([query.text for items in queries for query in items])
            canvas = model.locate(image, asked, _image_index(queries, asked.device))
            located.update(_located_boxes(canvas, queries, letterboxes))
    return _Encoded(texts, torch.cat(images), torch.cat(regions), located)


def _encode_texts(model: Cloc, tokenizer: TextTokenizer, bench: Benchmark) -> _Texts:
    device = next(model.parameters()).device
    texts = sorted({*bench.class_names, *bench.phrases, *bench.captions})
    features = [
        model.encode_text(tokenizer(texts[start : start + _TEXT_BATCH]).to(device))
        for start in range(0, len(texts), _TEXT_BATCH)
    ]
    index = {text: position for position, text in enumerate(texts)}
    return _Texts(index, torch.cat(features) if features else torch.empty(0, device=device))


def _encode_images(
    model: Cloc, batch: Sequence[Record]
) -> tuple[ImageFeatures, tuple[Letterbox, ...]]:
    parameter = next(model.parameters())
    size = model.vision.encoder.image_size
    pixels, letterboxes = zip(
        *(preprocess(record.load_image(), size) for record in batch), strict=True
    )
    image = model.encode_image(torch.stack(pixels).to(parameter.device, parameter.dtype))
    return image, letterboxes


def _embed_regions(
    model: Cloc,
    image: ImageFeatures,
    letterboxes: Sequence[Letterbox],
    boxes: Sequence[Sequence[Box]],
    prompt: RegionPrompt,
) -> Tensor:
    """z of each image's boxes (normalised), packed: float[R, E]."""
    canvas = torch.cat(
        [
            letterbox.to_canvas(Boxes.normalized(xyxy)).xyxy.float()
            for letterbox, xyxy in zip(letterboxes, boxes, strict=True)
        ]
    )
    device = image.tokens.device
    image_index = _image_index(boxes, device)
    if prompt == "box" or not len(canvas):
        return model.embed_boxes(image, canvas.to(device), image_index)
    shapes = [sample_shape(prompt, box, _rng_of(box)) for box in canvas.tolist()]
    return model.vision.embed_masks(image, torch.stack(shapes).to(device), image_index)


def _rng_of(box: Sequence[float]) -> np.random.Generator:
    return np.random.default_rng([int(1e6 * value) for value in box])


def _located_boxes(
    located: Tensor, queries: Sequence[Sequence[Query]], letterboxes: Sequence[Letterbox]
) -> Iterator[tuple[str, Box | None]]:
    """Query id and its canvas box in the original frame, cut to the image; None if not finite."""
    parts = located.float().cpu().split([len(items) for items in queries])
    for xyxy, items, letterbox in zip(parts, queries, letterboxes, strict=True):
        original = letterbox.to_original(Boxes(xyxy, CANVAS)).xyxy
        for query, box in zip(items, original, strict=True):
            x1, y1, x2, y2 = box.clamp(0, 1).tolist()
            yield query.id, (x1, y1, x2, y2) if box.isfinite().all() else None


def _image_index(groups: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
    """int64: the position of the image each item of the packed groups belongs to."""
    counts = torch.tensor([len(items) for items in groups])
    return torch.repeat_interleave(torch.arange(len(groups)), counts).to(device)


def _by_image(items: Sequence[Item]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.image_id, []).append(item)
    return groups


def _boxes(encoded: _Encoded, bench: Benchmark) -> Iterator[PredictionRow]:
    for query in bench.of_task("text_to_box"):
        box = encoded.located[query.id]
        yield _row(query, boxes=[box] if box else [], failure=None if box else "not_finite")


def _rankings(encoded: _Encoded, bench: Benchmark) -> Iterator[PredictionRow]:
    """Queries that are answered by ranking candidates by cosine similarity."""
    region_ids = [item.id for item in bench.regions]
    texts = encoded.texts.of
    candidates = {
        "region_classification": (bench.class_names, texts(bench.class_names)),
        "region_to_text": (bench.phrases, texts(bench.phrases)),
        "text_to_region": (region_ids, encoded.region_features),
        "image_to_text": (bench.captions, texts(bench.captions)),
        "text_to_image": (bench.image_ids, encoded.image_features),
    }
    for task, (names, features) in candidates.items():
        queries = bench.of_task(task)
        if queries:
            scores, order = _nearest(_asked_features(encoded, bench, queries), features)
            for query, row_scores, row_order in zip(queries, scores, order, strict=True):
                yield _row(query, labels=[names[i] for i in row_order], scores=row_scores)


def _asked_features(encoded: _Encoded, bench: Benchmark, queries: Sequence[Query]) -> Tensor:
    """Features of what is asked (all queries of a task ask alike): a box, a text or the image."""
    if queries[0].box is not None:
        position = {(item.image_id, item.box): i for i, item in enumerate(bench.regions)}
        return encoded.region_features[[position[q.image_id, q.box] for q in queries]]  # type: ignore[index]
    if queries[0].text:
        return encoded.texts.of([query.text for query in queries])
    index = {image_id: i for i, image_id in enumerate(bench.image_ids)}
    return encoded.image_features[[index[query.image_id] for query in queries]]


def _nearest(queries: Tensor, candidates: Tensor) -> tuple[list[list[float]], list[list[int]]]:
    """Cosine similarity and index of the closest candidates of each query, closest first."""
    candidates = F.normalize(candidates.float(), dim=-1)
    scores: list[list[float]] = []
    order: list[list[int]] = []
    for chunk in F.normalize(queries.float(), dim=-1).split(4096):
        best = (chunk @ candidates.T).topk(min(TOP_K, len(candidates)))
        scores += [[round(score, 4) for score in row] for row in best.values.tolist()]
        order += best.indices.tolist()
    return scores, order


def _row(query: Query, **answer: Any) -> PredictionRow:
    prompt = query.text
    if query.box is not None:
        prompt = str([round(value, 4) for value in query.box])
    return PredictionRow(query.id, query.image_id, query.task, prompt, **answer)
