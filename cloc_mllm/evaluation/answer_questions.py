"""Answers of an MLLM to a benchmark's questions, written as they come: a stopped run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cloc_mllm.evaluation.benchmarks.questions import (
    REGION,
    Question,
    QuestionSet,
    drop_cut_line,
)
from cloc_mllm.evaluation.predictions import PredictionRow, read_predictions, write_rows
from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.grounding_predictor import (
    ChatRequest,
    GroundedAnswer,
    GroundingPredictor,
)
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
    path: str | Path,
    *,
    model: str,
    batch_size: int = 64,
) -> list[PredictionRow]:
    """One row a question, in the order of the questions.

    Args:
        path: rows that are there already are kept; new ones are appended a batch at a time.
        model: its name, for the rows.

    Raises:
        ValueError: `path` holds answers of another model, or to other questions.
    """
    coordinates = predictor.processor.coordinates
    # one token more than a box needs, so that an answer that does not stop there fails to parse
    box_tokens = len(predictor.processor.tokenize(coordinates.encode((0.5, 0.5, 1, 1)))) + 1
    limits = {"box": box_tokens, "text": question_set.max_new_tokens}
    asked = [_asked(q, coordinates, limits[q.expects]) for q in question_set.questions]
    done = _answers_so_far(Path(path), asked, model)
    todo = [item for item in asked if item.question.id not in done]
    images = {record.id: record for record in question_set.records}
    bar = tqdm(total=len(asked), initial=len(done), desc=question_set.name)
    with bar:
        for batch in _batches(todo, batch_size):
            # questions about one photo share the object, so the predictor encodes it once
            loaded = {i: images[i].load_image() for i in {x.question.image_id for x in batch}}
            requests = [
                ChatRequest(loaded[x.question.image_id], x.prompt, _regions(x.question))
                for x in batch
            ]
            limit = batch[0].settings["max_new_tokens"]
            answers = predictor.answer(requests, max_new_tokens=limit)
            rows = [_row(x, answer, model) for x, answer in zip(batch, answers, strict=True)]
            write_rows(rows, path, append=True)
            done.update({row.id: row for row in rows})
            bar.update(len(rows))
    return [done[question.id] for question in question_set.questions]


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


def _answers_so_far(path: Path, asked: Sequence[Asked], model: str) -> dict[str, PredictionRow]:
    if not path.exists():
        return {}
    drop_cut_line(path)
    rows = {row.id: row for row in read_predictions(path)}
    expected = {item.question.id: (item.prompt, item.settings, model) for item in asked}
    other = [
        row.id
        for row in rows.values()
        if expected.get(row.id) != (row.prompt, row.settings, row.model)
    ]
    if other:
        raise ValueError(
            f"{path} holds {len(other)} answers of another model, or to other questions, than this "
            f"run ({model}) asks for, such as {other[0]!r}; use another --output_dir or delete it"
        )
    return rows


def _batches(items: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Groups of at most `size` whose answers have one length limit."""
    limits = dict.fromkeys(item.settings["max_new_tokens"] for item in items)
    for limit in limits:
        same = [item for item in items if item.settings["max_new_tokens"] == limit]
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _regions(question: Question) -> Boxes | None:
    return Boxes.normalized([list(box) for box in question.boxes]) if question.boxes else None


def _row(asked: Asked, answer: GroundedAnswer, model: str) -> PredictionRow:
    """Words are no failure for not being a box, so only box answers carry the parse."""
    question = asked.question
    wants_box = question.expects == "box"
    return PredictionRow(
        question.id,
        question.image_id,
        question.task,
        asked.prompt,
        answer.raw_text,
        boxes=answer.boxes.xyxy.tolist() if wants_box else [],
        confidence=answer.confidence,
        failure=answer.failure if wants_box else None,
        model=model,
        settings=asked.settings,
    )
