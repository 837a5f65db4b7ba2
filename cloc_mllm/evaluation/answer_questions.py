"""A benchmark's questions as prompts to an MLLM, its answers as rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from cloc_mllm.evaluation.benchmarks.questions import REGION, Question, QuestionSet
from cloc_mllm.evaluation.predictions import PredictionRow
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.inference.grounding_predictor import Question as ImageQuestion
from cloc_mllm.inference.results import Answer
from cloc_mllm.mllm.coordinates import BoxFormat


@dataclass(frozen=True)
class Asked:
    """A question as the model sees it, and how it is answered."""

    question: Question
    prompt: str
    settings: dict[str, Any]


def answer_questions(
    predictor: GroundingPredictor,
    question_set: QuestionSet,
    *,
    model: str,
    batch_size: int = 64,
    finished: Collection[str] = (),
) -> Iterator[PredictionRow]:
    """One row a question, as soon as its batch is answered; boxes first, then words.

    Args:
        model: its name, for the rows.
        finished: ids of questions to leave out, because their rows are there already.
    """
    coordinates = predictor.processor.coordinates
    # one token more than a box needs, so that an answer that does not stop there fails to parse
    box_tokens = len(predictor.processor.tokenize(coordinates.encode((0.5, 0.5, 1, 1)))) + 1
    limits = {"box": box_tokens, "text": question_set.max_new_tokens}
    asked = [_asked(q, coordinates, limits[q.expects]) for q in question_set.questions]
    todo = [item for item in asked if item.question.id not in finished]
    images = {record.id: record for record in question_set.records}
    with tqdm(total=len(asked), initial=len(asked) - len(todo), desc=question_set.name) as bar:
        for batch in _batches(todo, batch_size):
            # questions about one photo share the object, so the predictor encodes it once
            loaded = {i: images[i].load_image() for i in {x.question.image_id for x in batch}}
            requests = [
                ImageQuestion(loaded[x.question.image_id], x.prompt, _regions(x.question))
                for x in batch
            ]
            limit, boxes_only = _kind(batch[0])
            answers = predictor.answer(requests, max_new_tokens=limit, boxes_only=boxes_only)
            yield from (_row(x, answer, model) for x, answer in zip(batch, answers, strict=True))
            bar.update(len(batch))


def _asked(question: Question, coordinates: BoxFormat, max_new_tokens: int) -> Asked:
    """Writes each region's box in front of its `<region>`, as training did."""
    pieces = question.text.split(REGION)
    prompt = pieces[0]
    for box, piece in zip(question.boxes, pieces[1:], strict=True):
        prompt += f"{coordinates.encode(box)} {REGION}{piece}"
    settings: dict[str, Any] = {
        "box_format": coordinates.kind,
        "num_bins": coordinates.num_bins,
        "decoding": "greedy",
        "precision": "fp32",
        "max_new_tokens": max_new_tokens,
    }
    if question.region_prompt:
        settings["region_prompt"] = question.region_prompt
    return Asked(question, prompt, settings)


def _batches(items: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Groups of at most `size` that are answered alike."""
    for kind in dict.fromkeys(map(_kind, items)):
        same = [item for item in items if _kind(item) == kind]
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _kind(asked: Asked) -> tuple[int, bool]:
    """The length limit, and whether decoding allows boxes alone: where a thing is that is there, as
    `GroundingPredictor.ground` answers it. What may be absent can be answered in any words."""
    return asked.settings["max_new_tokens"], asked.question.task == "rec"


def _regions(question: Question) -> Boxes | None:
    return Boxes.normalized([list(box) for box in question.boxes]) if question.boxes else None


def _row(asked: Asked, answer: Answer, model: str) -> PredictionRow:
    """Words are no failure for not being a box, so only box answers carry the parse."""
    question = asked.question
    wants_box = question.expects == "box"
    return PredictionRow(
        question.id,
        question.image_id,
        question.task,
        asked.prompt,
        answer.text,
        boxes=answer.boxes.xyxy.tolist() if wants_box and answer.failure is None else [],
        confidence=answer.confidence,
        failure=answer.failure if wants_box else None,
        model=model,
        settings=asked.settings,
    )
