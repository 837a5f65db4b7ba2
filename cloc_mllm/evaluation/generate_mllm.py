"""Predictions of an MLLM: each query becomes a question about its image, each answer a row."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from PIL import Image
from tqdm import tqdm

from cloc_mllm.data.conversations import PROMPTS
from cloc_mllm.data.records import Record
from cloc_mllm.evaluation.generate_cloc import Settings
from cloc_mllm.evaluation.predictions import PredictionRow
from cloc_mllm.evaluation.queries import Benchmark, Query
from cloc_mllm.inference.grounding_predictor import GroundingPredictor, Question
from cloc_mllm.inference.results import Answer

_MAX_PHRASE_TOKENS = 24


def predict_mllm(
    predictor: GroundingPredictor,
    records: Sequence[Record],
    bench: Benchmark,
    settings: Settings,
    finished: Collection[str] = (),
) -> Iterator[PredictionRow]:
    """One row for each `rec` and `referring` query, as soon as its batch is answered.

    Args:
        records: those the benchmark was built from, in the same order.
        finished: ids of queries to leave out, because their rows are there already.
        settings: `batch_size` questions are prepared at a time; precision is the predictor's.
    """
    coordinates = predictor.processor.coordinates
    row_settings = {"box_format": coordinates.kind, "decoding": "greedy", "precision": "fp32"}
    position = {image_id: index for index, image_id in enumerate(bench.image_ids)}
    for task in ("rec", "referring"):
        queries = [query for query in bench.of_task(task) if query.id not in finished]
        bar = tqdm(total=len(queries), desc=f"MLLM {task}", disable=not settings.progress)
        for start in range(0, len(queries), settings.batch_size):
            batch = queries[start : start + settings.batch_size]
            # questions about one image share the object, so the predictor encodes it once
            image_ids = dict.fromkeys(query.image_id for query in batch)
            images = {i: records[position[i]].load_image() for i in image_ids}
            requests = [_request(predictor, query, images[query.image_id]) for query in batch]
            answers = predictor.answer(
                requests, max_new_tokens=_MAX_PHRASE_TOKENS, boxes_only=task == "rec"
            )
            for query, request, answer in zip(batch, requests, answers, strict=True):
                yield _row(query, request.text, answer, settings.name, row_settings)
            bar.update(len(batch))
        bar.close()


def _request(predictor: GroundingPredictor, query: Query, image: Image.Image) -> Question:
    if query.box is None:
        return Question(image, PROMPTS["ground"].format(phrase=query.text))
    return predictor.refer_questions(image, [query.box])[0]


def _row(
    query: Query, question: str, answer: Answer, name: str, settings: dict[str, str]
) -> PredictionRow:
    """A phrase is no failure for not being a box, so `referring` rows carry no box parse."""
    asks_for_box = query.box is None
    boxes = answer.boxes.xyxy.tolist() if asks_for_box and answer.failure is None else []
    return PredictionRow(
        query.id,
        query.image_id,
        query.task,
        question,
        answer.text,
        boxes=boxes,
        confidence=answer.confidence,
        failure=answer.failure if asks_for_box else None,
        model=name,
        settings=settings,
    )
