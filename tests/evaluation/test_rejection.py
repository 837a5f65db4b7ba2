from __future__ import annotations

from typing import Any

import pytest
from cloc_mllm.evaluation.rejection import is_failure, refuses, score

from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair

BOX = (0.0, 0.0, 0.5, 0.5)
FAR = (0.6, 0.6, 0.9, 0.9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is no crab.", True),
        ("It isn't in the image", True),
        ("None", True),
        ("not found", True),
        ("a crab", False),
        ("a notebook on a table", False),
        ("", False),
    ],
)
def test_refusals_are_whole_words(text: str, expected: bool) -> None:
    assert refuses(text) == expected


def make_pair(index: int, there: bool, **answer: Any) -> ScoredPair:
    row_id, kind = f"q{index}", "concept" if index % 2 else "expression"
    label, boxes = ("present", [BOX]) if there else ("absent", [])
    return ScoredPair(
        PredictionRow(row_id, f"i{index}", "rejection", **answer),
        ReferenceRow(row_id, f"i{index}", "rejection", boxes=boxes, labels=[label], kind=kind),
    )


def test_words_boxes_and_what_is_neither() -> None:
    pairs = [
        make_pair(0, True, boxes=[BOX], confidence=0.9),
        make_pair(1, True, boxes=[FAR], confidence=0.5),
        make_pair(2, True, raw_text="no crab", failure="not_a_box", confidence=0.7),
        make_pair(3, False, raw_text="not there", failure="not_a_box", confidence=0.1),
        make_pair(4, False, boxes=[BOX], confidence=0.6),
        make_pair(5, False, raw_text="a boat", failure="not_a_box", confidence=None),
    ]
    actual = {k: v.mean() for k, v in score(pairs).items() if "/" not in k}
    expected = {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    expected |= {"right": 2 / 6, "refusal_rate": 2 / 6, "auroc": 8 / 9}
    assert actual == pytest.approx(expected)
    assert [is_failure(pair) for pair in pairs] == [False] * 5 + [True]
    assert "auroc/concept" in score(pairs) and "precision/expression" in score(pairs)


def test_a_label_decides_before_the_box() -> None:
    pairs = [
        make_pair(1, True, boxes=[BOX], labels=["present"], confidence=0.3),
        make_pair(3, True, boxes=[BOX], labels=["absent"], confidence=0.1),
        make_pair(5, False, boxes=[BOX], labels=["absent"], confidence=0.2),
    ]
    actual = {k: v.mean() for k, v in score(pairs).items()}
    assert (actual["precision"], actual["recall"]) == (1 / 2, 1)
    assert actual["right"] == pytest.approx(2 / 3) and actual["auroc"] == 0.5


def test_of_absent_phrases_alone_there_is_no_auroc() -> None:
    assert set(score([make_pair(1, False, boxes=[BOX])])) == {
        "recall",
        "f1",
        "right",
        "refusal_rate",
    }
