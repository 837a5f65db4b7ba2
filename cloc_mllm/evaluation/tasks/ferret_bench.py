"""Free answers, scored by a judge beside a reference answer (Ferret-Bench, You et al. 2023). A
judge model gives the reference answer and the model's answer 1 to 10 each, seeing the annotations
as text, not the image. relative_score: mean of the answers' scores over mean of the references', by
category, then the mean of the categories (its interval takes the references' mean as fixed);
answer_score and reference_score: out of 10, in percent. An answer the judge did not score is in
none of these: they are then called ..._of_judged."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.evaluation.benchmark_files import photo_questions, read_json_rows
from cloc_mllm.evaluation.predictors.judge import (
    MAX_SCORE,
    SCORED,
    Context,
    Judge,
    judge_answers,
    read_rules,
    with_judgements,
)
from cloc_mllm.evaluation.queries import REGION, Query, QuerySet, pair
from cloc_mllm.evaluation.rows.rows import PredictionRow, ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task

TASK = "ferret_bench"
_NUMBER = r"\s*([01](?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")

Key = tuple[str, str]  # category, question id
Rows = dict[Key, dict[str, Any]]


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """Scores of rows that a judge rated (`with_judgements`); {} if it rated none."""
    judged = [pair for pair in pairs if pair.prediction.labels == SCORED]
    if not judged:
        return {}
    image_ids = np.array([pair.reference.image_id for pair in judged])
    kinds = np.array([pair.reference.kind for pair in judged])
    answer, reference = np.array([pair.prediction.scores for pair in judged]).T
    reference_means = {kind: reference[kinds == kind].mean() for kind in np.unique(kinds)}
    relative = answer / np.array([reference_means[kind] for kind in kinds])
    suffix = "" if len(judged) == len(pairs) else "_of_judged"
    images = list(image_ids)
    scores = {
        f"relative_score{suffix}": QueryScores(relative, images, list(kinds)),
        f"answer_score{suffix}": QueryScores(answer / MAX_SCORE, images),
        f"reference_score{suffix}": QueryScores(reference / MAX_SCORE, images),
    }
    for kind in reference_means if len(reference_means) > 1 else []:
        chosen = kinds == kind
        scores[f"relative_score{suffix}/{kind}"] = QueryScores(
            relative[chosen], list(image_ids[chosen])
        )
    return scores


SCORERS = {TASK: Scorer("Ferret-Bench (MLLM)", __doc__, "relative_score", score)}


@dataclass
class FerretBench(Task):
    """Ferret-Bench: free answers, scored by a judge.

    Rows are `{"question_id": 0, "image": "000000125472.jpg", "category": "ground_conv", "text":
    ...}`; boxes in the texts are `[x1, y1, x2, y2]`, 0..1 of the original image.

    Args:
        questions, contexts, answers: files of one to three categories, each kind in any order; rows
            belong together by category and question_id.
        images: folder, tar or zip of the COCO photos.
        judge_url: OpenAI-compatible endpoint, up to /v1; "" only makes the answers.
        judge_model: the judge's name.
        judge_key_env: environment variable with the key.
        judge_rules: Ferret's rule.json, for its own prompts; "" takes ours.
    """

    questions: list[Path]
    contexts: list[Path]
    answers: list[Path]
    images: Path
    judge_url: str = ""
    judge_model: str = ""
    judge_key_env: str = "OPENAI_API_KEY"
    judge_rules: str = ""

    reads_records = False

    def __post_init__(self) -> None:
        if bool(self.judge_url) != bool(self.judge_model):
            raise ValueError("give --judge_url and --judge_model together, or neither")

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        """
        Raises:
            ValueError: a question without its context or answer, or one of another image.
        """
        asked = _by_key(self.questions)
        answers = _matching("answer", asked, self.answers)
        _matching("context", asked, self.contexts)
        pairs = []
        for key, row in asked.items():
            text, boxes = boxes_to_regions(str(row["text"]))
            query = Query(_row_id(key), str(row["image"]), TASK, text, boxes)
            right = str(answers[key]["text"])
            pairs.append(pair(query, boxes=list(boxes), labels=[right], kind=key[0]))
        name = "Ferret-Bench " + ", ".join(dict.fromkeys(category for category, _ in asked))
        return [photo_questions(TASK, name, pairs, self.images, max_new_tokens=256)]

    def review(
        self, asked: QuerySet, rows: list[PredictionRow], directory: Path
    ) -> list[PredictionRow] | None:
        """Lets the judge rate the answers; what it rated before is kept in `judgements.jsonl`."""
        if not self.judge_url:
            print(f"{len(rows)} answers in {directory}; add --judge_url and --judge_model")
            return None
        judge = Judge(self.judge_url, self.judge_model, os.environ.get(self.judge_key_env, ""))
        rules = read_rules(self.judge_rules) if self.judge_rules else {}
        questions, contexts = _by_key(self.questions), _by_key(self.contexts)
        told = {
            _row_id(key): Context(str(contexts[key]["text"]), str(row["text"]))
            for key, row in questions.items()
        }
        pairs = [ScoredPair(row, r) for row, r in zip(rows, asked.references, strict=True)]
        judgements = judge_answers(judge, pairs, told, directory / "judgements.jsonl", rules)
        return with_judgements(rows, judgements)

    def more_scores(
        self, pairs: Sequence[ScoredPair]
    ) -> tuple[dict[str, QueryScores], dict[str, Any]]:
        failures = sorted({p.prediction.failure for p in pairs if p.prediction.failure})
        num_judged = sum(pair.prediction.failure is None for pair in pairs)
        notes = {"judged": f"{num_judged} of {len(pairs)} by {self.judge_model}"}
        if failures:
            notes["not_judged"] = f"{', '.join(failures)}; run again to try these again"
        return {}, notes


def _row_id(key: Key) -> str:
    return f"{TASK}/{key[0]}/{key[1]}"


def boxes_to_regions(text: str) -> tuple[str, tuple[Box, ...]]:
    """Turns `the object [0.1, 0.2, 0.5, 0.6]?` into `the object <region>?` and its boxes."""
    boxes: list[Box] = []

    def region(match: re.Match[str]) -> str:
        x1, y1, x2, y2 = (float(number) for number in match.groups())
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            return match.group()  # no box: it stays words
        boxes.append((x1, y1, x2, y2))
        return REGION

    return _BOX.sub(region, text), tuple(boxes)


def _by_key(paths: Sequence[Path]) -> Rows:
    rows: Rows = {}
    for path in paths:
        for where, row in read_json_rows(path, "question_id", "image", "category", "text"):
            key = (str(row["category"]), str(row["question_id"]))
            if key in rows:
                raise ValueError(f"{where}: {key[0]} {key[1]} stands here twice")
            rows[key] = row
    return rows


def _matching(name: str, questions: Rows, paths: Sequence[Path]) -> Rows:
    """The rows of other files; there is one about the same image for each question."""
    rows = _by_key(paths)
    for key, question in questions.items():
        found = rows.get(key, {}).get("image")
        if found != question["image"]:
            raise ValueError(
                f"{name} of {key[0]} question {key[1]}: expected one for image "
                f"{question['image']}, got {found or 'none'}; pass the {name} files of the same "
                "categories as the questions"
            )
    return rows
