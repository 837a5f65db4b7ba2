"""Rows of our MLLM: each query becomes a question about its image."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from cloc_mllm.config import ModelDtype
from cloc_mllm.data.wordings import Task, Wordings
from cloc_mllm.evaluation.queries import REGION, AskedIn, Query, QuerySet
from cloc_mllm.evaluation.rows.resume import model_identity
from cloc_mllm.evaluation.rows.rows import PredictionRow
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question, whole_mllm
from cloc_mllm.inference.results import Answer
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.shipped import DEFAULT_MODELS, find_model

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class MllmRows:
    """A stage-2 model directory, or a shipped model, as a `Predictor`."""

    directory: str
    device: torch.device
    batch_size: int = 64
    wordings: AskedIn = "first"
    dtype: ModelDtype = "float32"

    def identity(self) -> dict[str, Any]:
        whole_mllm(self.directory)  # it may be wrong, and CLOC answers first
        identity: dict[str, Any] = {"mllm": model_identity(find_model("mllm", self.directory))}
        if self.wordings != "first":
            identity["wordings"] = self.wordings
        if self.dtype != "float32":
            identity["dtype"] = self.dtype
        return identity

    def can_answer(self, asked: QuerySet) -> bool:
        return asked.answer in ("box", "box_or_refusal", "boxes", "text")

    def rows(
        self, query_sets: Sequence[QuerySet], finished: Collection[str]
    ) -> Iterator[PredictionRow]:
        predictor = GroundingPredictor.from_pretrained(
            self.directory or None, device=self.device, dtype=self.dtype
        )
        name = self.directory or DEFAULT_MODELS["mllm"]
        for asked in query_sets:
            asked = replace(asked, asked_in=self.wordings)
            yield from predict_mllm(predictor, asked, name, self.batch_size, finished)


def predict_mllm(
    predictor: GroundingPredictor,
    asked: QuerySet,
    name: str,
    batch_size: int = 64,
    finished: Collection[str] = (),
    *,
    progress: bool = True,
) -> Iterator[PredictionRow]:
    """Yields one row per query, as soon as its batch is answered.

    If the thing is known to be there, the answer is held to a box. If it may be absent, the model
    answers in any words, as for every other question.

    Args:
        name: of the model, for the rows.
        batch_size: questions at a time.
        finished: ids of queries to leave out, because their rows are there already.
        progress: shows a bar.
    """
    coordinates = predictor.processor.coordinates
    box_tokens = len(predictor.processor.tokenize(coordinates.encode((0.5, 0.5, 1, 1))))
    # one token more than a box needs, so that an answer that does not stop there fails to parse
    limit = asked.max_new_tokens if asked.answer == "text" else box_tokens + 1
    if asked.answer == "boxes":
        limit = predictor.grammar.max_tokens
    settings = {
        "box_format": coordinates.kind,
        "num_bins": coordinates.num_bins,
        "decoding": "greedy",
        "precision": _PRECISIONS[predictor.model.dtype],
        "max_new_tokens": limit,
    }
    todo = [query for query in asked.queries if query.id not in finished]
    num_done = len(asked.queries) - len(todo)
    title, total = f"MLLM {asked.task}", len(asked.queries)
    with tqdm(total=total, initial=num_done, desc=title, disable=not progress) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            # queries about one image share the object, so the predictor encodes it once
            image_ids = dict.fromkeys(query.image_id for query in batch)
            images = {image_id: asked.load_image(image_id) for image_id in image_ids}
            questions = [_question(predictor, asked, q, images[q.image_id]) for q in batch]
            answers = predictor.answer(
                questions,
                max_new_tokens=limit,
                boxes_only=asked.answer in ("box", "boxes"),
                batch_size=batch_size,
            )
            for query, question, answer in zip(batch, questions, answers, strict=True):
                yield _row(asked, query, question.text, answer, name, settings)
            bar.update(len(batch))


def _question(
    predictor: GroundingPredictor, asked: QuerySet, query: Query, image: Image.Image
) -> Question:
    task: Task = "ground" if asked.answer != "text" else "refer"
    wording = _wording(predictor.processor.asked_in, task, query.id, asked.asked_in)
    if task == "ground":
        return predictor.ground_questions(image, [query.text], [wording])[0]
    if not query.text:
        return predictor.refer_questions(image, [query.boxes[0]], wording)[0]
    question = with_box_texts(query, predictor.processor.coordinates)
    regions = Boxes.normalized([list(box) for box in query.boxes]) if query.boxes else None
    return Question(image, question, regions)


def _wording(known: Wordings, task: Task, query_id: str, wordings: AskedIn) -> str:
    if wordings == "first":
        return known.first(task)
    pool = known.of(task) if wordings == "trained" else known.held_out_of(task)
    return pool[zlib.crc32(query_id.encode()) % len(pool)]


def with_box_texts(query: Query, coordinates: BoxFormat) -> str:
    """The question with each region's box in front of its `<region>`, as in training."""
    question, *pieces = query.text.split(REGION)
    for box, piece in zip(query.boxes, pieces, strict=True):
        question += f"{coordinates.encode(box)} {REGION}{piece}"
    return question


def _row(
    asked: QuerySet,
    query: Query,
    question: str,
    answer: Answer,
    name: str,
    settings: dict[str, Any],
) -> PredictionRow:
    """Words are no failure for not being a box, so only box answers carry the parse."""
    wants_box = asked.answer != "text"
    if query.region_prompt:
        settings = {**settings, "region_prompt": query.region_prompt}
    has_boxes = wants_box and answer.failure is None
    return PredictionRow(
        query.id,
        query.image_id,
        query.task,
        question,
        answer.text,
        boxes=answer.boxes.xyxy.tolist() if has_boxes else [],
        box_scores=answer.scores.tolist() if has_boxes else [],
        confidence=answer.confidence,
        failure=answer.failure if wants_box else None,
        model=name,
        settings=settings,
    )
