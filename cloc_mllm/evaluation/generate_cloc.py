"""Predictions of a CLOC model: every image and every distinct text is encoded once.

Letters: I images, R regions, P texts, Q queries, E embedding width, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cloc_mllm.config import Precision, RegionPrompt, Templates
from cloc_mllm.data.records import Record
from cloc_mllm.data.shapes import sample_shape
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.data.transforms import preprocess
from cloc_mllm.devices import resolve_precision
from cloc_mllm.evaluation.predictions import Box, PredictionRow
from cloc_mllm.evaluation.prompts import class_embeddings
from cloc_mllm.evaluation.queries import Benchmark, Query, RegionItem
from cloc_mllm.geometry import CANVAS, Boxes, Letterbox
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.vision_encoder import ImageFeatures

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
        templates: that class names are put into, for true boxes and zero-shot classification.
    """

    name: str = ""
    batch_size: int = 64
    precision: Precision = "fp32"
    progress: bool = False
    region_prompt: RegionPrompt = "box"
    templates: Templates = "none"


@dataclass
class Texts:
    """Features of each distinct text, float[P, E], not normalised."""

    index: dict[str, int]
    features: Tensor

    def of(self, texts: Sequence[str]) -> Tensor:
        return self.features[[self.index[text] for text in texts]]


class Located(NamedTuple):
    """Where a text is: a box cut to the image (None if not finite), and the cosine of the text
    and the box's embedding."""

    box: Box | None
    confidence: float | None


@dataclass
class _Encoded:
    """Everything the answers are read from; features are not normalised."""

    texts: Texts
    image_features: Tensor  # float[I, E]
    region_features: Tensor  # float[R, E]
    image_classes: Tensor  # float[C, E], names of whole images in their templates
    located: dict[str, Located]  # by query id


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
    with in_inference(model, settings.precision) as precision:
        encoded = _encode(model, tokenizer, records, bench, settings)
    row_settings = {
        "image_size": model.vision.encoder.image_size,
        "precision": precision,
        "region_prompt": settings.region_prompt,
    }
    answers = [*_rankings(encoded, bench), *_boxes(encoded, bench)]
    return [replace(row, model=settings.name, settings=row_settings) for row in answers]


@contextmanager
def in_inference(model: torch.nn.Module, precision: Precision) -> Iterator[str]:
    """Evaluation mode without gradients, under autocast for bf16; gives the resolved precision.

    Afterwards every module is in the mode it was in.
    """
    modes = {module: module.training for module in model.modules()}
    resolved = resolve_precision(precision)
    device = next(model.parameters()).device
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=resolved == "bf16"),
        ):
            yield resolved
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
    names = {*bench.class_names, *bench.phrases, *bench.captions}
    texts = encode_texts(model, tokenizer, sorted(names))
    images: list[Tensor] = []
    regions: list[Tensor] = []
    located: dict[str, Located] = {}
    regions_of = _by_image(bench.regions)
    queries_of = _by_image(bench.of_task("text_to_box"))
    steps = range(0, len(records), settings.batch_size)
    for start in tqdm(steps, "CLOC", unit="batch", disable=not settings.progress):
        batch = [records[i] for i in range(start, min(start + settings.batch_size, len(records)))]
        image, letterboxes = encode_images(model, batch)
        images.append(image.image_features)
        boxes = [[item.box for item in regions_of.get(record.id, [])] for record in batch]
        regions.append(_embed_regions(model, image, letterboxes, boxes, settings.region_prompt))
        queries = [queries_of.get(record.id, []) for record in batch]
        if any(queries):
            asked = texts.of([query.text for items in queries for query in items])
            index = index_of_images(queries, asked.device)
            answers = locate_texts(model, image, asked, index, letterboxes)
            ids = [query.id for items in queries for query in items]
            located.update(zip(ids, answers, strict=True))
    classes = class_embeddings(model, tokenizer, bench.image_classes, settings.templates)
    return _Encoded(texts, torch.cat(images), torch.cat(regions), classes, located)


def encode_texts(model: Cloc, tokenizer: TextTokenizer, texts: Sequence[str]) -> Texts:
    """Features of texts that are all different."""
    device = next(model.parameters()).device
    features = [
        model.encode_text(tokenizer(texts[start : start + _TEXT_BATCH]).to(device))
        for start in range(0, len(texts), _TEXT_BATCH)
    ]
    index = {text: position for position, text in enumerate(texts)}
    return Texts(index, torch.cat(features) if features else torch.empty(0, device=device))


def encode_images(
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
    image_index = index_of_images(boxes, device)
    if prompt == "box" or not len(canvas):
        return model.embed_boxes(image, canvas.to(device), image_index)
    shapes = [sample_shape(prompt, box, _rng_of(box)) for box in canvas.tolist()]
    return model.vision.embed_masks(image, torch.stack(shapes).to(device), image_index)


def _rng_of(box: Sequence[float]) -> np.random.Generator:
    return np.random.default_rng([int(1e6 * value) for value in box])


def locate_texts(
    model: Cloc,
    image: ImageFeatures,
    texts: Tensor,
    image_index: Tensor,
    letterboxes: Sequence[Letterbox],
) -> list[Located]:
    """The box of each text, `texts: float[R, E]` in the order of the images."""
    canvas = model.locate(image, texts, image_index)
    finite = canvas.isfinite().all(1)
    z = model.embed_boxes(image, canvas.nan_to_num(0, 0, 0), image_index)
    cosine = F.cosine_similarity(z.float(), texts.float(), dim=-1).tolist()
    boxes = in_original(canvas, image_index, letterboxes)
    return [
        Located(box, round(score, 4) if math.isfinite(score) else None)
        if is_finite
        else Located(None, None)
        for box, score, is_finite in zip(boxes, cosine, finite.tolist(), strict=True)
    ]


def in_original(canvas: Tensor, image_index: Tensor, letterboxes: Sequence[Letterbox]) -> list[Box]:
    """Canvas boxes float[R, 4] -> boxes normalised to their original images, cut to them."""
    parts = canvas.float().cpu().split(image_index.bincount(minlength=len(letterboxes)).tolist())
    original = [
        letterbox.to_original(Boxes(part, CANVAS)).xyxy.clamp(0, 1)
        for letterbox, part in zip(letterboxes, parts, strict=True)
    ]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in torch.cat(original).tolist()]


def index_of_images(groups: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
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
        box, confidence = encoded.located[query.id]
        failure = None if box else "not_finite"
        yield _row(query, boxes=[box] if box else [], failure=failure, confidence=confidence)


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
        "zero_shot_classification": (bench.image_classes, encoded.image_classes),
    }
    for task, (names, features) in candidates.items():
        queries = bench.of_task(task)
        if queries:
            scores, order = nearest(_asked_features(encoded, bench, queries), features)
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


def nearest(queries: Tensor, candidates: Tensor) -> tuple[list[list[float]], list[list[int]]]:
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
