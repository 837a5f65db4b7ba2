from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.tasks.pope import Pope, is_failure, read_yes_no, score
from tests.evaluation.helpers import means, pair, query_sets, write_lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("Yes, there is a dog.", "yes"),
        ("No.", "no"),
        ("no, not that I can see. Yes?", "no"),
        ("There is no dog in the image.", "no"),
        ("There isn't a dog", "no"),
        ("It is not there", "no"),
        ("I'd say yes", "yes"),
        ("yes and no", "yes"),
        ("maybe yes, maybe not", None),
        ("a dog", None),
        ("Norway", None),
        ("eyes", None),
        ("", None),
    ],
)
def test_answers_are_read_by_whole_words(text: str, expected: str | None) -> None:
    assert read_yes_no(text) == expected


def make_pairs(*answers: tuple[str, str], kind: str = "random") -> list[ScoredPair]:
    """(true label, raw text) each on its own image."""
    return [
        pair(
            {"raw_text": text},
            query_id=str(index),
            image_id=f"i{index}",
            labels=[label],
            kind=kind,
        )
        for index, (label, text) in enumerate(answers)
    ]


def test_scores_equal_the_counts_by_hand() -> None:
    pairs = make_pairs(
        ("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("yes", "a cat"), ("no", "yes"), ("no", "no")
    )
    actual = means(score(pairs))
    # TP 2, FP 1, FN 2 (one of them unparseable), TN 1
    expected = {"accuracy": 3 / 6, "precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7}
    assert actual == pytest.approx({**expected, "yes_rate": 3 / 6})
    assert [is_failure(pair) for pair in pairs] == [False, False, False, True, False, False]


def test_an_unparseable_answer_to_a_no_is_wrong_but_no_yes() -> None:
    actual = means(score(make_pairs(("no", "?"))))
    assert actual == {"accuracy": 0, "yes_rate": 0}


def test_scores_by_split() -> None:
    pairs = make_pairs(("yes", "yes"), ("no", "no")) + make_pairs(("no", "yes"), kind="popular")
    actual = score(pairs)
    assert actual["accuracy"].mean() == pytest.approx(2 / 3)
    assert (actual["accuracy/random"].mean(), actual["accuracy/popular"].mean()) == (1, 0)
    assert len(actual["f1/popular"].values) == 1


def make_row(question_id: int = 1, **changes: Any) -> dict[str, Any]:
    row = {"image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    return {"question_id": question_id, **row, **changes}


def test_three_splits_are_asked_as_written(tmp_path: Path, photos) -> None:
    files = [
        write_lines(tmp_path / f"coco_pope_{split}.json", [make_row(1), make_row(2, label="no")])
        for split in ("random", "popular", "adversarial")
    ]
    (actual,) = query_sets(Pope(files, photos("a.jpg"), suffix=" Yes or no?"))
    assert actual.coverage.name == "POPE random, popular, adversarial"
    assert [row.kind for row in actual.references[::2]] == ["random", "popular", "adversarial"]
    assert [row.labels for row in actual.references[:2]] == [["yes"], ["no"]]
    assert {row.text for row in actual.queries} == {"Is there a dog in the image? Yes or no?"}
    assert len({row.id for row in actual.queries}) == 6 and len(actual.records) == 1
    actual.check_coverage(allow_partial=False)


def test_missing_photos_are_counted_and_refused(tmp_path: Path, photos) -> None:
    rows = [make_row(1), make_row(2, image="gone.jpg"), make_row(3, image="gone.jpg")]
    questions = write_lines(tmp_path / "popular.json", rows)
    (actual,) = query_sets(Pope([questions], photos("a.jpg")))
    assert str(actual.coverage) == "1 of 3 questions (missing_image 2)"
    with pytest.raises(ValueError, match=r"expected all 3 questions, found 1 of 3 .*allow_partial"):
        actual.check_coverage(allow_partial=False)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("questions.json", [make_row()], r"expected the split \(random, popular, adversarial\)"),
        ("random.json", [make_row(label="maybe")], "line 1: expected the label yes or no, got 'ma"),
        ("random.json", [{"question_id": 1}], "line 1: .* image, text, label missing"),
        ("random.json", [make_row(), make_row()], "a question_id stands twice"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, photos, name, rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        query_sets(Pope([write_lines(tmp_path / name, rows)], photos("a.jpg")))


def test_the_real_file(shared_data: Path) -> None:
    formats = shared_data / "formats"
    questions = [formats / "coco_pope_adversarial_60.jsonl"]
    (actual,) = query_sets(Pope(questions, formats / "coco_mini_images_val2017_24.tar"))
    assert str(actual.coverage) == "0 of 60 questions (missing_image 60)"
