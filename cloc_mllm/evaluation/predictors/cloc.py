"""Rows of a CLOC model: every image and every distinct text is encoded once for all tasks.

Letters: K keys, Q queries, C candidates, E embedding width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cloc_mllm.box import Box
from cloc_mllm.config import Precision, RegionPrompt, Templates
from cloc_mllm.data.tokenizer import TextTokenizer
from cloc_mllm.devices import resolve_precision
from cloc_mllm.evaluation.predictors.class_names import class_embeddings
from cloc_mllm.evaluation.predictors.cloc_batch import (
    Batch,
    Located,
    embed_boxes,
    embed_otherwise,
    encode_batch,
    locate_texts,
    packed_index,
    proposals,
    rank_boxes,
)
from cloc_mllm.evaluation.queries import ABSENT, PRESENT, Query, QuerySet, RegionFeatures
from cloc_mllm.evaluation.rows.resume import model_identity
from cloc_mllm.evaluation.rows.rows import PredictionRow
from cloc_mllm.evaluation.scores.binary import best_threshold
from cloc_mllm.models.build import load_cloc
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.shipped import find_model

TOP_K = 10
_TEXT_BATCH = 256


@dataclass(frozen=True)
class ClocSettings:
    """The settings of a run, the same for all queries.

    Args:
        name: name of the model, for the rows.
        batch_size: images at a time.
        precision: of autocast; `fp32` is exact.
        progress: shows a progress bar.
        region_prompt: how CLOC is told of a region: its `box`, or a `point`, `scribble` or `mask`
            drawn in it (always the same for the same box).
        templates: what class names are put into.
    """

    name: str = ""
    batch_size: int = 64
    precision: Precision = "fp32"
    progress: bool = False
    region_prompt: RegionPrompt = "box"
    templates: Templates = "none"


@dataclass(frozen=True)
class ClocRows:
    """A stage-1 model directory, or a shipped model, as a `Predictor`."""

    directory: str
    device: torch.device
    settings: ClocSettings

    def identity(self) -> dict[str, Any]:
        return {
            "cloc": model_identity(find_model("cloc", self.directory)),
            "precision": self.settings.precision,
            "region_prompt": self.settings.region_prompt,
            "templates": self.settings.templates,
        }

    def can_answer(self, asked: QuerySet) -> bool:
        return asked.answer != "text"

    def rows(
        self, query_sets: Sequence[QuerySet], finished: Collection[str]
    ) -> Iterator[PredictionRow]:
        """Makes all rows at once, because rankings need every image's features."""
        model, tokenizer, _ = load_cloc(self.directory, self.device)
        rows = predict_cloc(model, tokenizer, query_sets, self.settings)
        yield from (row for row in rows if row.id not in finished)


def predict_cloc(
    model: Cloc, tokenizer: TextTokenizer, query_sets: Sequence[QuerySet], settings: ClocSettings
) -> list[PredictionRow]:
    """Makes one row per query, set by set.

    Each module of the model keeps its mode (train or eval).
    """
    about: dict[int, list[QuerySet]] = {}  # sets that ask about the same records, together
    for asked in query_sets:
        about.setdefault(id(asked.records), []).append(asked)
    with in_inference(model, settings.precision) as precision:
        encoded = {key: _encode(model, tokenizer, sets, settings) for key, sets in about.items()}
        rows = [
            row
            for asked in query_sets
            for row in _answers(encoded[id(asked.records)], asked, settings)
        ]
    common = {
        "image_size": model.vision.encoder.image_size,
        "precision": precision,
        "region_prompt": settings.region_prompt,
    }
    rows = [replace(r, model=settings.name, settings={**common, **r.settings}) for r in rows]
    thresholds = {
        asked.task: _threshold(model, tokenizer, asked, settings)
        for asked in query_sets
        if asked.answer == "box_or_refusal"
    }
    return [_refused_below(thresholds[r.task], r) if r.task in thresholds else r for r in rows]


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


@dataclass
class _Encoded:
    """Features and boxes of some records, which all answers about them are read from.

    Attributes:
        features: float[E] each, not normalised: `texts`, `class_names` and `images` by text, name
            and image id; `regions` by (image id, box), or by query id where they are not the region
            encoder's.
        located: by query id: where the text is, and where else it may be.
        notes: by query id, for the row's settings.
    """

    features: dict[str, dict[Hashable, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    located: dict[str, tuple[Located, list[Box]]] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, kind: str, keys: Iterable[Hashable], features: Tensor) -> None:
        self.features[kind] |= zip(keys, features, strict=True)

    def stack(self, kind: str, keys: Iterable[Hashable]) -> Tensor:
        return torch.stack([self.features[kind][key] for key in keys])


@dataclass
class _ImagePlan:
    """Everything that the queries need of one image.

    Attributes:
        boxes: boxes for CLOC's region encoder, each once.
        otherwise: queries whose regions are embedded otherwise.
        located, ranked: texts to place, with one box or with all that come into question.
    """

    boxes: dict[Box, None] = field(default_factory=dict)
    otherwise: dict[RegionFeatures, list[Query]] = field(default_factory=dict)
    located: list[Query] = field(default_factory=list)
    ranked: list[Query] = field(default_factory=list)


def _plan(query_sets: Sequence[QuerySet]) -> dict[str, _ImagePlan]:
    """Plans each image that a query is about."""
    plans: dict[str, _ImagePlan] = {}
    for asked in query_sets:
        for query in asked.queries:
            plan = plans.setdefault(query.image_id, _ImagePlan())
            if asked.answer == "ranked_boxes":
                plan.ranked.append(query)
            elif asked.answer != "label":
                plan.located.append(query)
            elif query.boxes and asked.region_features == "cloc":
                plan.boxes[query.boxes[0]] = None
            elif query.boxes:
                plan.otherwise.setdefault(asked.region_features, []).append(query)
        if asked.candidates is not None:
            for region in asked.candidates.regions:
                plans.setdefault(region.image_id, _ImagePlan()).boxes[region.box] = None
            for image_id in asked.candidates.names if asked.candidates.kind == "images" else ():
                plans.setdefault(image_id, _ImagePlan())
    return plans


def _encode(
    model: Cloc, tokenizer: TextTokenizer, query_sets: Sequence[QuerySet], settings: ClocSettings
) -> _Encoded:
    """Encodes the texts, and in one pass all images that a query is about."""
    encoded = _Encoded()
    _encode_texts(encoded, model, tokenizer, query_sets, settings)
    plans = _plan(query_sets)
    records, image_ids = query_sets[0].records, query_sets[0].image_ids
    steps = range(0, len(records), settings.batch_size)
    for start in tqdm(steps, "CLOC", unit="batch", disable=not settings.progress):
        stop = min(start + settings.batch_size, len(records))
        chosen = [records[i] for i in range(start, stop) if image_ids[i] in plans]
        if chosen:
            batch = encode_batch(model, chosen)
            own = [plans[record.id] for record in chosen]
            encoded.add("images", [record.id for record in chosen], batch.image.image_features)
            _encode_regions(encoded, model, batch, own, settings)
            _locate(encoded, model, batch, own)
    return encoded


def _encode_texts(
    encoded: _Encoded,
    model: Cloc,
    tokenizer: TextTokenizer,
    query_sets: Sequence[QuerySet],
    settings: ClocSettings,
) -> None:
    texts = {query.text for asked in query_sets for query in asked.queries} - {""}
    names: dict[str, None] = {}
    for asked in query_sets:
        if asked.candidates is not None and asked.candidates.kind == "texts":
            texts |= set(asked.candidates.names)
        elif asked.candidates is not None and asked.candidates.kind == "class_names":
            names |= dict.fromkeys(asked.candidates.names)
    ordered, device = sorted(texts), next(model.parameters()).device
    for start in range(0, len(ordered), _TEXT_BATCH):
        chunk = ordered[start : start + _TEXT_BATCH]
        encoded.add("texts", chunk, model.encode_text(tokenizer(chunk).to(device)))
    if names:
        features = class_embeddings(model, tokenizer, list(names), settings.templates)
        encoded.add("class_names", names, features)


def _encode_regions(
    encoded: _Encoded,
    model: Cloc,
    batch: Batch,
    plans: Sequence[_ImagePlan],
    settings: ClocSettings,
) -> None:
    boxes = [list(plan.boxes) for plan in plans]
    if any(boxes):
        keys = [(r.id, box) for r, own in zip(batch.records, boxes, strict=True) for box in own]
        z = embed_boxes(model, batch, boxes, settings.region_prompt)
        encoded.add("regions", keys, z)
    for features in {name: None for plan in plans for name in plan.otherwise}:
        queries = [plan.otherwise.get(features, []) for plan in plans]
        z, notes = embed_otherwise(model, batch, features, queries, settings.batch_size)
        ids = [query.id for own in queries for query in own]
        encoded.add("regions", ids, z)
        for query_id, note in zip(ids, notes, strict=True):
            encoded.notes[query_id] = {"region_features": features, **note}


def _locate(encoded: _Encoded, model: Cloc, batch: Batch, plans: Sequence[_ImagePlan]) -> None:
    for ranked in (False, True):
        groups = [plan.ranked if ranked else plan.located for plan in plans]
        queries = [query for own in groups for query in own]
        if not queries:
            continue
        texts = encoded.stack("texts", [query.text for query in queries])
        image_index = packed_index(groups, texts.device)
        found = locate_texts(model, batch, texts, image_index)
        others = proposals(model, batch, texts, image_index) if ranked else ([] for _ in queries)
        for query, located, other in zip(queries, found, others, strict=True):
            boxes = rank_boxes(located.box, other, TOP_K) if ranked and located.box else []
            encoded.located[query.id] = located, boxes


def _answers(encoded: _Encoded, asked: QuerySet, settings: ClocSettings) -> Iterator[PredictionRow]:
    if asked.answer == "label" and asked.queries:
        yield from _rankings(encoded, asked, settings)
        return
    for query in asked.queries:
        located, ranked = encoded.located[query.id]
        boxes = ranked or [located.box] if located.box else []
        failure = None if located.box else "not_finite"
        yield _row(query, boxes=boxes, confidence=located.confidence, failure=failure)


def _rankings(
    encoded: _Encoded, asked: QuerySet, settings: ClocSettings
) -> Iterator[PredictionRow]:
    """Answers by the cosine of what is asked (all queries of a set ask alike) and candidates."""
    candidates = asked.candidates
    assert candidates is not None
    keys = [(r.image_id, r.box) for r in candidates.regions] or candidates.names
    features = encoded.stack(candidates.kind, keys)
    in_templates = {"templates": settings.templates} if candidates.kind == "class_names" else {}
    scores, order = nearest(_asked_features(encoded, asked), features)
    for query, row_scores, row_order in zip(asked.queries, scores, order, strict=True):
        labels = [candidates.names[index] for index in row_order]
        row_settings = {**in_templates, **encoded.notes.get(query.id, {})}
        yield _row(query, labels=labels, scores=row_scores, settings=row_settings)


def _asked_features(encoded: _Encoded, asked: QuerySet) -> Tensor:
    """Features of what is asked, a region, a text or the image: float[Q, E]."""
    queries = asked.queries
    if queries[0].boxes and asked.region_features == "cloc":
        return encoded.stack("regions", [(query.image_id, query.boxes[0]) for query in queries])
    if queries[0].boxes:
        return encoded.stack("regions", [query.id for query in queries])
    if queries[0].text:
        return encoded.stack("texts", [query.text for query in queries])
    return encoded.stack("images", [query.image_id for query in queries])


def nearest(queries: Tensor, candidates: Tensor) -> tuple[list[list[float]], list[list[int]]]:
    """Cosine similarity and index of the closest candidates of each query, closest first.

    Args:
        queries: float[Q, E].
        candidates: float[C, E].
    """
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
    if query.boxes:
        prompt = str([round(value, 4) for value in query.boxes[0]])
    return PredictionRow(query.id, query.image_id, query.task, prompt, **answer)


def _threshold(
    model: Cloc, tokenizer: TextTokenizer, asked: QuerySet, settings: ClocSettings
) -> float:
    """The confidence below which CLOC refuses, found on the calibration queries if not given."""
    if asked.threshold is not None:
        return asked.threshold
    assert asked.calibration is not None
    known = replace(asked.calibration, answer="box")
    rows = predict_cloc(model, tokenizer, [known], settings)
    confidences = [-1.0 if row.confidence is None else row.confidence for row in rows]
    present = [reference.labels[0] == PRESENT for reference in known.references]
    return best_threshold(np.array(confidences), np.array(present))


def _refused_below(threshold: float, row: PredictionRow) -> PredictionRow:
    settings = {**row.settings, "threshold": threshold}
    if row.confidence is None:
        return replace(row, settings=settings)
    label = ABSENT if row.confidence < threshold else PRESENT
    return replace(row, labels=[label], settings=settings)
