from __future__ import annotations

import pytest
from cloc_mllm.evaluation.judged import SCORED, score

from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair


def make_pair(index: int, kind: str, scores: list[float] | None) -> ScoredPair:
    judged = {"labels": SCORED, "scores": scores} if scores else {"failure": "judge_timeout"}
    row_id, image = f"q{index}", f"i{index}"
    return ScoredPair(
        PredictionRow(row_id, image, "ferret_bench", **judged),
        ReferenceRow(row_id, image, "ferret_bench", labels=["the answer"], kind=kind),
    )


PAIRS = [
    make_pair(0, "refer_desc", [4, 8]),
    make_pair(1, "refer_desc", [8, 8]),
    make_pair(2, "ground_conv", [5, 10]),
]


def test_relative_to_the_reference_by_category() -> None:
    actual = {name: values.mean() for name, values in score(PAIRS).items()}
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
