"""Ask a benchmark's questions, score the answers, write numbers and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloc_mllm import __version__
from cloc_mllm.evaluation.answer_questions import answer_questions
from cloc_mllm.evaluation.benchmarks.questions import QuestionSet
from cloc_mllm.evaluation.predictions import (
    PredictionRow,
    ScoredPair,
    merge_by_id,
    read_predictions,
    write_rows,
)
from cloc_mllm.evaluation.report import write_report
from cloc_mllm.evaluation.resume import (
    append_rows,
    model_identity,
    queries_digest,
    resume_predictions,
)
from cloc_mllm.evaluation.scoring import compute_metrics, pairs_by_task
from cloc_mllm.evaluation.table import render_table
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.shipped import shipped_directory

Pairs = Mapping[str, Sequence[ScoredPair]]


@dataclass(frozen=True)
class Job:
    """What all benchmarks have in common.

    Args:
        output_dir: gets `predictions.jsonl`, `references.jsonl`, `metrics.json`, `report.html`;
            answers that are there already are kept.
        overwrite: make all answers anew, whatever is there.
        mllm: stage-2 model directory; "" takes the shipped one.
        limit: ask the first so many questions only; 0 is all.
        allow_partial: score also if photos or questions are missing.
        device: None takes a GPU if there is one.
    """

    output_dir: str
    overwrite: bool = False
    mllm: str = ""
    limit: int = 0
    allow_partial: bool = False
    batch_size: int = 64
    device: str | None = None
    bootstrap_samples: int = 1000

    def chosen(self, question_set: QuestionSet) -> QuestionSet:
        """The questions to ask.

        Raises:
            ValueError: some are missing and neither `limit` nor `allow_partial` says that is fine,
                or all of them are.
        """
        limited = question_set.limited(self.limit)
        if not (self.limit or self.allow_partial) or not limited.questions:
            limited.require_complete()
        return limited


def predict(question_set: QuestionSet, job: Job) -> list[PredictionRow]:
    """The MLLM's answers, see `complete`."""

    def answers(finished: set[str]) -> Iterable[PredictionRow]:
        predictor = GroundingPredictor.from_pretrained(job.mllm or None, device=job.device)
        model = job.mllm or "shipped mllm"
        return answer_questions(
            predictor, question_set, model=model, batch_size=job.batch_size, finished=finished
        )

    settings = {
        "mllm": model_identity(job.mllm or shipped_directory("mllm")),
        "max_new_tokens": question_set.max_new_tokens,
    }
    return complete(question_set, job, settings, answers)


def complete(
    question_set: QuestionSet,
    job: Job,
    settings: Mapping[str, Any],
    answers: Callable[[set[str]], Iterable[PredictionRow]],
) -> list[PredictionRow]:
    """One row a question, in their order: those in `predictions.jsonl`, the others appended to it.

    Also writes `references.jsonl`.

    Args:
        settings: all that rows depend on beside the questions, see `resume_predictions`.
        answers: ids of the questions that have a row -> rows of the others.
    """
    directory = Path(job.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "predictions.jsonl"
    questions = {"questions": queries_digest(question_set.questions)}
    settings = {"version": __version__, **settings, **questions}
    finished = resume_predictions(path, settings, overwrite=job.overwrite)
    write_rows(question_set.references, directory / "references.jsonl")
    if len(finished) < len(question_set.questions):
        append_rows(answers(finished), path)
    pairs = merge_by_id(read_predictions(path), question_set.references)
    return [pair.prediction for pair in pairs]


def score(question_set: QuestionSet, rows: Sequence[PredictionRow], job: Job) -> dict[str, Any]:
    """What `metrics.json` holds: `compute_metrics` and, in `about`, how much was asked."""
    pairs = pairs_by_task(rows, question_set.references)
    metrics = compute_metrics(pairs, samples=job.bootstrap_samples)
    metrics["about"] = {
        "benchmark": question_set.name,
        "asked": question_set.coverage,
        "left_out": question_set.left_out,
        "not_asked_by_protocol": question_set.notes,
        "model": rows[0].model,
        "settings": rows[0].settings,
        "version": __version__,
    }
    return metrics


def write_results(
    question_set: QuestionSet, rows: Sequence[PredictionRow], metrics: dict[str, Any], job: Job
) -> None:
    """Writes `metrics.json` and `report.html`; prints the table."""
    directory = Path(job.output_dir)
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    records = {record.id: record for record in question_set.records}
    write_report(
        directory / "report.html",
        metrics,
        pairs_by_task(rows, question_set.references),
        lambda image_id: records[image_id].load_image(),
    )
    print(render_table(metrics))
    print(f"{question_set.name}: {question_set.coverage}")
    print(f"report: {directory / 'report.html'}")


def run(question_set: QuestionSet, job: Job) -> dict[str, Any]:
    """All of it."""
    chosen = job.chosen(question_set)
    rows = predict(chosen, job)
    metrics = score(chosen, rows, job)
    write_results(chosen, rows, metrics, job)
    return metrics
