from __future__ import annotations

from typing import Any

import pytest

from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.tasks.rejection import (
    Rejection,
    is_failure,
    phrases_of_scenes,
    refuses,
    score,
)
from tests.evaluation.helpers import means, pair, query_sets

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
    return pair(
        answer, query_id=row_id, image_id=f"i{index}", boxes=boxes, labels=[label], kind=kind
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
    actual = means(score(pairs))
    assert (actual["precision"], actual["recall"]) == (1 / 2, 1)
    assert actual["right"] == pytest.approx(2 / 3) and actual["auroc"] == 0.5


def test_of_absent_phrases_alone_there_is_no_auroc() -> None:
    assert set(score([make_pair(1, False, boxes=[BOX])])) == {
        "recall",
        "f1",
        "right",
        "refusal_rate",
    }


def test_half_of_the_phrases_are_absent_indeed() -> None:
    asked = phrases_of_scenes("mllm", 30)
    scenes = {record.id: record for record in asked.records}
    pairs = list(zip(asked.queries, asked.references, strict=True))
    for kind in ("concept", "expression"):
        same_kind = [reference for _, reference in pairs if reference.kind == kind]
        assert sum(bool(reference.boxes) for reference in same_kind) == len(same_kind) / 2 > 10
    for query, reference in pairs:
        regions = scenes[query.image_id].regions
        names = {region.category for region in regions}
        expressions = {text: region.box for region in regions for text in region.expressions}
        if reference.kind == "concept":
            there = [region.box for region in regions if region.category == query.text]
        else:
            there = [expressions[query.text]] if query.text in expressions else []
            if not there:  # it starts with the name of a kind that is not here
                assert not any(query.text.split(" the ")[0].endswith(f" {name}") for name in names)
        assert reference.boxes == there
    again, other = phrases_of_scenes("mllm", 30), phrases_of_scenes("mllm", 30, seed=1)
    assert (asked.queries, asked.references) == (again.queries, again.references)
    assert asked.queries != other.queries
    asked.check_coverage(allow_partial=False)
    labels = {row.id.rpartition("/")[2]: row.labels for row in asked.references}
    assert labels == {"present": ["present"], "absent": ["absent"]}


def test_only_cloc_needs_a_threshold_and_finds_it_on_other_scenes() -> None:
    (by_mllm,) = query_sets(Rejection(num_scenes=2))
    assert (by_mllm.answered_by, by_mllm.calibration) == ("mllm", None)
    (by_cloc,) = query_sets(Rejection(by="cloc", num_scenes=2))
    known = by_cloc.calibration
    assert by_cloc.answered_by == known.answered_by == "cloc"
    assert not {record.id for record in known.records} & {r.id for r in by_cloc.records}
    (given,) = query_sets(Rejection(by="cloc", num_scenes=2, threshold=0.3))
    assert (given.threshold, given.calibration) == (0.3, None)
