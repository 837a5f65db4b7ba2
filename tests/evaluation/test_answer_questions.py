"""Answering with a tiny random model: what is asked, and what a second run keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.answer_questions import answer_questions
from cloc_mllm.evaluation.benchmarks.questions import Question, QuestionSet
from cloc_mllm.evaluation.predictions import ReferenceRow, read_predictions
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


def test_one_row_a_question(predictor, questions, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = answer_questions(predictor, questions, path, model="tiny", batch_size=4)
    assert [row.id for row in rows] == [question.id for question in questions.questions]
    assert {row.id: row for row in read_predictions(path)} == {row.id: row for row in rows}
    box, region, words = rows[:3]
    assert region.prompt == "Is <loc_0><loc_0><loc_10><loc_19> <region> a crab?"
    assert (box.failure is None) == bool(box.boxes)
    assert region.failure is None and words.failure is None
    assert box.settings["max_new_tokens"] == 5 and words.settings["max_new_tokens"] == 3
    assert words.settings["region_prompt"] == "point"
    alone = answer_questions(predictor, questions, tmp_path / "b", model="tiny", batch_size=1)
    assert [row.raw_text for row in alone] == [row.raw_text for row in rows]


def test_a_killed_run_goes_on(predictor, questions, tmp_path: Path, monkeypatch) -> None:
    whole = answer_questions(predictor, questions, tmp_path / "whole", model="tiny")
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    path = tmp_path / "cut"
    path.write_text("".join(lines[:4]) + lines[4][:30])
    asked: list[int] = []
    answer = predictor.answer

    def counting(requests, **limits):
        asked.append(len(requests))
        return answer(requests, **limits)

    monkeypatch.setattr(predictor, "answer", counting)
    # another batch: the same words, the confidence to rounding
    for row, expected in zip(
        answer_questions(predictor, questions, path, model="tiny"), whole, strict=True
    ):
        assert row.confidence == pytest.approx(expected.confidence, abs=1e-5)
        assert replace(row, confidence=None) == replace(expected, confidence=None)
    assert sum(asked) == 2
    assert len(read_predictions(path)) == 6


@pytest.mark.parametrize(
    ("model", "changes"), [("other", {}), ("tiny", {"max_new_tokens": 4})], ids=["model", "limit"]
)
def test_answers_of_another_run_are_not_mixed_in(
    predictor, questions, tmp_path: Path, model, changes
) -> None:
    path = tmp_path / "predictions.jsonl"
    answer_questions(predictor, questions, path, model="tiny")
    with pytest.raises(ValueError, match=rf"holds . answers of another model, .*run \({model}\)"):
        answer_questions(predictor, replace(questions, **changes), path, model=model)


def test_a_question_says_where_its_boxes_go() -> None:
    with pytest.raises(ValueError, match="'q' has 0 <region> but 1 boxes; write one <region> a"):
        Question("q", "i", "pope", "What is this?", (BOX,))
