from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.evaluation.predictors.judge import SCORED
from cloc_mllm.evaluation.rows.rows import PredictionRow, ScoredPair
from cloc_mllm.evaluation.tasks.ferret_bench import FerretBench, boxes_to_regions, score
from tests.evaluation.helpers import means, pair, query_sets, write_lines
from tests.evaluation.predictors.test_judge import FakeJudge, fake

__all__ = ["fake"]


def make_pair(index: int, kind: str, scores: list[float] | None) -> ScoredPair:
    judged = {"labels": SCORED, "scores": scores} if scores else {"failure": "judge_timeout"}
    return pair(
        judged,
        query_id=f"q{index}",
        image_id=f"i{index}",
        labels=["the answer"],
        kind=kind,
    )


PAIRS = [
    make_pair(0, "refer_desc", [4, 8]),
    make_pair(1, "refer_desc", [8, 8]),
    make_pair(2, "ground_conv", [5, 10]),
]


def test_relative_to_the_reference_by_category() -> None:
    actual = means(score(PAIRS))
    assert actual == pytest.approx(
        {
            "relative_score": (12 / 16 + 5 / 10) / 2,
            "answer_score": 17 / 30,
            "reference_score": 26 / 30,
            "relative_score/refer_desc": 12 / 16,
            "relative_score/ground_conv": 5 / 10,
        }
    )


def test_with_a_failed_judge_no_number_is_called_the_score() -> None:
    actual = score([*PAIRS, make_pair(3, "refer_desc", None)])
    assert "relative_score" not in actual
    assert actual["relative_score_of_judged"].mean() == score(PAIRS)["relative_score"].mean()
    assert score([make_pair(0, "refer_desc", None)]) == {}


@pytest.mark.parametrize(
    ("text", "expected", "boxes"),
    [
        (
            "What is [0.1, 0.2, 0.5, 0.6]?",
            "What is <region>?",
            ((0.1, 0.2, 0.5, 0.6),),
        ),
        (
            "Is [0.000, 0.2, 1.000, 0.6] by [0,0,1,1]?",
            "Is <region> by <region>?",
            ((0.0, 0.2, 1.0, 0.6), (0.0, 0.0, 1.0, 1.0)),
        ),
        ("no box", "no box", ()),
        ("inverted [0.5, 0.2, 0.1, 0.6]", "inverted [0.5, 0.2, 0.1, 0.6]", ()),
        ("three [0.5, 0.2, 0.1]", "three [0.5, 0.2, 0.1]", ()),
        ("outside [0.5, 0.2, 1.5, 0.6]", "outside [0.5, 0.2, 1.5, 0.6]", ()),
    ],
)
def test_boxes_of_a_question_become_regions(text, expected, boxes) -> None:
    assert boxes_to_regions(text) == (expected, boxes)


def make_row(text: str, question_id: int = 0, **changes: Any) -> dict[str, Any]:
    row = {"question_id": question_id, "image": "a.jpg", "category": "refer_desc", "text": text}
    return {**row, **changes}


def test_rows_of_three_files_belong_together(tmp_path: Path, photos) -> None:
    ids = (3, 1)
    files = {
        name: [write_lines(tmp_path / name, [make_row(f"{name} {i}", i) for i in order])]
        for name, order in (("q", ids), ("c", ids[::-1]), ("a", ids))
    }
    (actual,) = query_sets(FerretBench(*files.values(), photos("a.jpg")))
    actual.check_coverage(allow_partial=False)
    assert [query.id for query in actual.queries] == [
        "ferret_bench/refer_desc/3",
        "ferret_bench/refer_desc/1",
    ]
    assert [query.text for query in actual.queries] == ["q 3", "q 1"]
    assert actual.references[1].labels == ["a 1"] and actual.references[1].kind == "refer_desc"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "answer of refer_desc question 0: expected one for image a.jpg, got none; pass the"),
        ([make_row("a", image="b.jpg")], "expected one for image a.jpg, got b.jpg"),
        ([make_row("a"), make_row("a")], "line 2: refer_desc 0 stands here twice"),
    ],
)
def test_files_that_do_not_match_are_refused(tmp_path: Path, photos, answers, message) -> None:
    questions = write_lines(tmp_path / "q", [make_row("q")])
    contexts = write_lines(tmp_path / "c", [make_row("c")])
    with pytest.raises(ValueError, match=message):
        query_sets(
            FerretBench(
                [questions], [contexts], [write_lines(tmp_path / "a", answers)], photos("a.jpg")
            )
        )


def test_the_real_files(shared_data: Path) -> None:
    formats = shared_data / "formats"
    kinds = ("refer_caption", "refer_reason", "ground_conv")
    files = [
        [formats / f"ferret_bench_{kind}_{part}_8.jsonl" for kind in kinds]
        for part in ("question", "context", "answer")
    ]
    (actual,) = query_sets(FerretBench(*files, formats / "coco_mini_images_val2017_24.tar"))
    assert str(actual.coverage) == "0 of 24 questions (missing_image 24)"


def test_the_judge_sees_context_and_question_of_each_answer(
    fake: FakeJudge, tmp_path: Path, photos
) -> None:
    ids = (3, 1)
    files = [
        [write_lines(tmp_path / name, [make_row(f"{name} {i} [0, 0, 1, 1]", i) for i in order])]
        for name, order in (("q", ids), ("c", ids[::-1]), ("a", ids))
    ]
    task = FerretBench(*files, photos("a.jpg"), judge_url=fake.url, judge_model="judge")
    (asked,) = query_sets(task)
    answers = [PredictionRow(q.id, q.image_id, q.task, raw_text="mine") for q in asked.queries]
    fake.replies = ["8 6", "9 3"]
    rows = task.review(asked, answers, tmp_path)
    assert [row.scores for row in rows] == [[6, 8], [3, 9]]
    assert [row.labels for row in rows] == [SCORED, SCORED]
    for row_id, (_, body, _) in zip(ids, fake.requests, strict=True):
        prompt = body["messages"][0]["content"]
        assert f"[Context]\nc {row_id} [0, 0, 1, 1]\n" in prompt
        assert f"[Question]\nq {row_id} [0, 0, 1, 1]\n" in prompt  # in the benchmark's own words
        assert f"[Assistant 1]\na {row_id} [0, 0, 1, 1]\n" in prompt


def test_without_a_judge_nothing_is_scored(tmp_path: Path, photos, capsys) -> None:
    files = [[write_lines(tmp_path / name, [make_row(name)])] for name in "qca"]
    task = FerretBench(*files, photos("a.jpg"))
    (asked,) = query_sets(task)
    answers = [PredictionRow(q.id, q.image_id, q.task, raw_text="mine") for q in asked.queries]
    assert task.review(asked, answers, tmp_path) is None
    assert "1 answers in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--judge_url and --judge_model together"):
        FerretBench(*files, photos("a.jpg"), judge_model="judge")
