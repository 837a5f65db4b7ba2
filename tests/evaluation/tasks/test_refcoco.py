from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.tasks import refcoco
from cloc_mllm.evaluation.tasks.refcoco import NUM_EXPRESSIONS, RefCoco
from tests.evaluation.helpers import query_sets

PHOTO = "COCO_train2014_000000000005"


def write_rows(path: Path, *texts: str, photo: str = PHOTO) -> Path:
    rows = [
        {"img_id": f"{photo}_1", "sents": text, "bbox": [160, 0, 160, 240]}
        | {"width": 640, "height": 480}
        for text in texts
    ]
    path.write_text(json.dumps(rows))
    return path


def asked(split: str, questions: Path, images: Path) -> QuerySet:
    (query_set,) = query_sets(RefCoco(split, questions, images))
    return query_set


@pytest.mark.parametrize("split", NUM_EXPRESSIONS)
def test_another_number_of_expressions_is_refused(tmp_path: Path, photos, split: str) -> None:
    rows = write_rows(tmp_path / "rows.json", "left dog", "right dog")
    expected = f"{NUM_EXPRESSIONS[split]:,} expressions, but .*rows.json holds 2; pass"
    with pytest.raises(ValueError, match=expected):
        asked(split, rows, photos(f"{PHOTO}.jpg"))


def test_the_wrong_split_is_named(tmp_path: Path, photos, monkeypatch) -> None:
    monkeypatch.setattr(refcoco, "NUM_EXPRESSIONS", {"refcoco_val": 1, "refcoco_testA": 2})
    rows = write_rows(tmp_path / "rows.json", "left dog", "right dog")
    with pytest.raises(ValueError, match=r"holds 2 \(that is refcoco_testA\)"):
        asked("refcoco_val", rows, photos())
    with pytest.raises(ValueError, match="unknown split 'val'; expected one of refcoco_val"):
        asked("val", rows, photos())


def test_each_expression_is_a_question(tmp_path: Path, photos, monkeypatch) -> None:
    monkeypatch.setattr(refcoco, "NUM_EXPRESSIONS", {"refcoco_val": 3})
    rows = write_rows(tmp_path / "rows.json", "left dog", "the dog", "left dog")
    actual = asked("refcoco_val", rows, photos(f"{PHOTO}.jpg"))
    actual.check_coverage(allow_partial=False)
    assert [query.text for query in actual.queries] == ["left dog", "the dog", "left dog"]
    reference = actual.references[0]
    assert reference.boxes == [pytest.approx((0.25, 0.0, 0.5, 0.5))]
    # of the annotated photo, though the file here is a 100 x 50 copy
    assert (reference.width, reference.height) == (640, 480)


@pytest.mark.parametrize(
    ("split", "coverage"),
    [
        ("refcoco_val", "546 of 10,834 expressions (missing_image 10,288)"),
        ("refcoco+_val", "537 of 10,758 expressions (missing_image 10,221)"),
        ("refcocog_val", "305 of 4,896 expressions (missing_image 4,591)"),
    ],
)
def test_real_rows(shared_data: Path, split: str, coverage: str) -> None:
    folder = shared_data / "refcoco-mini"
    actual = asked(split, folder / f"{split}.json", folder / "images-val.tar")
    assert str(actual.coverage) == coverage
    with pytest.raises(ValueError, match=f"{split[:7]}.*found .* of .*missing_image"):
        actual.check_coverage(allow_partial=False)
    assert str(actual.limited(20).coverage).startswith("20 of ")
    assert len(actual.limited(20).records) < len(actual.records)
