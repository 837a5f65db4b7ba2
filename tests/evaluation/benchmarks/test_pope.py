from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cloc_mllm.evaluation.benchmarks.pope import pope_questions

from tests.evaluation.benchmarks.conftest import write_lines


def make_row(question_id: int = 1, **changes: Any) -> dict[str, Any]:
    row = {"image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    return {"question_id": question_id, **row, **changes}


def test_three_splits_are_asked_as_written(tmp_path: Path, photos) -> None:
    files = [
        write_lines(tmp_path / f"coco_pope_{split}.json", [make_row(1), make_row(2, label="no")])
        for split in ("random", "popular", "adversarial")
    ]
    actual = pope_questions(files, photos("a.jpg"), suffix=" Yes or no?")
    assert actual.name == "POPE random, popular, adversarial"
    assert [row.kind for row in actual.references[::2]] == ["random", "popular", "adversarial"]
    assert [row.labels for row in actual.references[:2]] == [["yes"], ["no"]]
    assert {row.text for row in actual.questions} == {"Is there a dog in the image? Yes or no?"}
    assert len({row.id for row in actual.questions}) == 6 and len(actual.records) == 1
    actual.require_complete()


def test_missing_photos_are_counted_and_refused(tmp_path: Path, photos) -> None:
    rows = [make_row(1), make_row(2, image="gone.jpg"), make_row(3, image="gone.jpg")]
    actual = pope_questions([write_lines(tmp_path / "popular.json", rows)], photos("a.jpg"))
    assert actual.coverage == "1 of 3 questions (missing_image 2)"
    with pytest.raises(ValueError, match=r"expected all 3 questions, found 1 of 3 .*allow_partial"):
        actual.require_complete()


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
        pope_questions([write_lines(tmp_path / name, rows)], photos("a.jpg"))


def test_the_real_file(shared_data: Path) -> None:
    formats = shared_data / "formats"
    actual = pope_questions(
        [formats / "coco_pope_adversarial_60.jsonl"], formats / "coco_mini_images_val2017_24.tar"
    )
    assert actual.coverage == "0 of 60 questions (missing_image 60)"
