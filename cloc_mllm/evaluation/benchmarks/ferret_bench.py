"""Ferret-Bench (You et al. 2023): question, context and answer files -> questions and judge items.

Rows are `{"question_id": 0, "image": "000000125472.jpg", "category": "ground_conv", "text": ...}`;
boxes in the texts are `[x1, y1, x2, y2]`, 0..1 of the original image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.evaluation.benchmarks.questions import (
    REGION,
    Question,
    QuestionSet,
    count_left_out,
    photo_faults,
    photo_records,
    read_json_rows,
)
from cloc_mllm.evaluation.predictions import Box, ReferenceRow

TASK = "ferret_bench"
_NUMBER = r"\s*([01](?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")

Key = tuple[str, str]  # category, question id
Paths = Sequence[str | Path]


@dataclass(frozen=True)
class JudgeItem:
    """What a judge sees beside the model's answer."""

    id: str
    category: str
    context: str
    question: str
    reference: str


def ferret_bench_questions(
    questions: Paths, contexts: Paths, answers: Paths, images: str | Path
) -> tuple[QuestionSet, list[JudgeItem]]:
    """Questions and, in the same order, what the judge needs for each.

    Args:
        questions, contexts, answers: files of one to three categories, each kind in any order;
            rows belong together by category and question_id.
        images: folder, tar or zip of the COCO photos.

    Raises:
        ValueError: a question without its context or answer, or one of another image.
    """
    asked = _by_key(questions)
    context_of, answer_of = _by_key(contexts), _by_key(answers)
    for name, rows in (("context", context_of), ("answer", answer_of)):
        _check_match(name, asked, rows)
    drop_log = DropLog()
    names = [str(row["image"]) for row in asked.values()]
    records = photo_records(names, images, drop_log, source=TASK)
    kept: list[Question] = []
    references: list[ReferenceRow] = []
    items: list[JudgeItem] = []
    for (category, question_id), row in asked.items():
        if str(row["image"]) not in records:
            continue
        key = (category, question_id)
        row_id, image_id = f"{TASK}/{category}/{question_id}", str(row["image"])
        text, boxes = boxes_to_regions(str(row["text"]))
        reference = str(answer_of[key]["text"])
        kept.append(Question(row_id, image_id, TASK, text, boxes))
        references.append(
            ReferenceRow(row_id, image_id, TASK, list(boxes), [reference], kind=category)
        )
        items.append(
            JudgeItem(row_id, category, str(context_of[key]["text"]), str(row["text"]), reference)
        )
    question_set = QuestionSet(
        "Ferret-Bench " + ", ".join(dict.fromkeys(category for category, _ in asked)),
        list(records.values()),
        kept,
        references,
        len(asked),
        count_left_out(names, photo_faults(drop_log)),
        max_new_tokens=256,
    )
    return question_set, items


def boxes_to_regions(text: str) -> tuple[str, tuple[Box, ...]]:
    """`the object [0.1, 0.2, 0.5, 0.6]?` -> `the object <region>?` and its boxes."""
    boxes: list[Box] = []

    def region(match: re.Match[str]) -> str:
        x1, y1, x2, y2 = (float(number) for number in match.groups())
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            return match.group()  # no box: it stays words
        boxes.append((x1, y1, x2, y2))
        return REGION

    return _BOX.sub(region, text), tuple(boxes)


def _by_key(paths: Paths) -> dict[Key, dict[str, Any]]:
    rows: dict[Key, dict[str, Any]] = {}
    for path in paths:
        for number, row in read_json_rows(path, "question_id", "image", "category", "text"):
            key = (str(row["category"]), str(row["question_id"]))
            if key in rows:
                raise ValueError(f"{path} line {number}: {key[0]} {key[1]} stands here twice")
            rows[key] = row
    return rows


def _check_match(
    name: str, questions: dict[Key, dict[str, Any]], rows: dict[Key, dict[str, Any]]
) -> None:
    for key, question in questions.items():
        found = rows.get(key, {}).get("image")
        if found != question["image"]:
            raise ValueError(
                f"{name} of {key[0]} question {key[1]}: expected one for image "
                f"{question['image']}, got {found or 'none'}; pass the {name} files of the same "
                "categories as the questions"
            )
