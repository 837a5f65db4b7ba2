"""Answering with a tiny random model: what is asked, and what a second run keeps."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cloc_mllm.evaluation.answer_questions import answer_questions
from cloc_mllm.evaluation.benchmarks.job import Job, predict
from cloc_mllm.evaluation.benchmarks.questions import Question, QuestionSet

from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.rows.rows import ReferenceRow, read_predictions
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_dir

__all__ = ["cloc_dir", "llm_dir", "mllm_dir"]

BOX = (0.0, 0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def predictor(mllm_dir) -> GroundingPredictor:
    return GroundingPredictor.from_pretrained(mllm_dir, device="cpu")


@pytest.fixture(scope="module")
def questions() -> QuestionSet:
    records = list(generate_scenes(2, split="test", long_side=64))
    asked = []
    for record in records:
        asked += [
            Question(f"{record.id}/0", record.id, "rec", "Where is a crab?", expects="box"),
            Question(f"{record.id}/1", record.id, "pope", "Is <region> a crab?", (BOX,)),
            Question(f"{record.id}/2", record.id, "pope", "A crab?", region_prompt="point"),
        ]
    references = [ReferenceRow(q.id, q.image_id, q.task, labels=["yes"]) for q in asked]
    return QuestionSet("test", records, asked, references, len(asked), max_new_tokens=3)


@pytest.fixture
def job(mllm_dir, tmp_path: Path) -> Job:
    return Job(str(tmp_path / "out"), mllm=str(mllm_dir), device="cpu", batch_size=4)


def test_one_row_a_question(predictor, questions, job) -> None:
    rows = predict(questions, job)
    assert [row.id for row in rows] == [question.id for question in questions.questions]
    path = Path(job.output_dir) / "predictions.jsonl"
    assert {row.id: row for row in read_predictions(path)} == {row.id: row for row in rows}
    assert rows[0].model == job.mllm
    box, region, words = rows[:3]
    assert region.prompt == "Is <loc_0><loc_0><loc_10><loc_19> <region> a crab?"
    assert (box.failure is None) == bool(box.boxes)
    assert region.failure is None and words.failure is None
    assert box.settings["max_new_tokens"] == 5 and words.settings["max_new_tokens"] == 3
    assert words.settings["region_prompt"] == "point"
    alone = {r.id: r for r in answer_questions(predictor, questions, model="t", batch_size=1)}
    assert [alone[row.id].raw_text for row in rows] == [row.raw_text for row in rows]


def test_a_killed_run_goes_on(questions, job, monkeypatch) -> None:
    whole = predict(questions, job)
    path = Path(job.output_dir) / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:30])
    asked: list[int] = []
    answer = GroundingPredictor.answer

    def counting(self, requests, **limits):
        asked.append(len(requests))
        return answer(self, requests, **limits)

    monkeypatch.setattr(GroundingPredictor, "answer", counting)
    # another batch: the same words, the confidence to rounding
    for row, expected in zip(predict(questions, job), whole, strict=True):
        assert row.confidence == pytest.approx(expected.confidence, abs=1e-5)
        assert replace(row, confidence=None) == replace(expected, confidence=None)
    assert sum(asked) == 2
    assert len(read_predictions(path)) == 6

    monkeypatch.setattr(GroundingPredictor, "from_pretrained", None)  # a finished run needs none
    assert len(predict(questions, job)) == 6


@pytest.mark.parametrize("different", ["mllm", "max_new_tokens"])
def test_answers_of_another_run_are_not_mixed_in(
    questions, job, mllm_dir, tmp_path: Path, different
) -> None:
    predict(questions, job)
    if different == "mllm":
        job = replace(job, mllm=str(shutil.copytree(mllm_dir, tmp_path / "other")))
    else:
        questions = replace(questions, max_new_tokens=4)
    with pytest.raises(ValueError, match=rf"made with other settings \({different}: there"):
        predict(questions, job)
    assert len(predict(questions, replace(job, overwrite=True))) == 6


def test_a_doubled_answer_stops_the_scoring(questions, job) -> None:
    predict(questions, job)
    path = Path(job.output_dir) / "predictions.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="1 ids are there more than once in the predictions"):
        predict(questions, job)


def test_a_question_says_where_its_boxes_go() -> None:
    with pytest.raises(ValueError, match="'q' has 0 <region> but 1 boxes; write one <region> a"):
        Question("q", "i", "pope", "What is this?", (BOX,))
