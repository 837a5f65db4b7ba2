from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cloc_mllm.evaluation.benchmarks.ferret_bench import (
    boxes_to_regions,
    ferret_bench_questions,
)

from tests.evaluation.benchmarks.conftest import write_lines


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
    actual, items = ferret_bench_questions(*files.values(), photos("a.jpg"))
    actual.require_complete()
    assert [question.id for question in actual.questions] == [item.id for item in items]
    assert items[0].id == "ferret_bench/refer_desc/3"
    assert (items[0].context, items[0].question, items[0].reference) == ("c 3", "q 3", "a 3")
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
        ferret_bench_questions(
            [questions], [contexts], [write_lines(tmp_path / "a", answers)], photos("a.jpg")
        )


def test_the_real_files(shared_data: Path) -> None:
    formats = shared_data / "formats"
    kinds = ("refer_caption", "refer_reason", "ground_conv")
    files = [
        [formats / f"ferret_bench_{kind}_{part}_8.jsonl" for kind in kinds]
        for part in ("question", "context", "answer")
    ]
    actual, items = ferret_bench_questions(*files, formats / "coco_mini_images_val2017_24.tar")
    assert actual.coverage == "0 of 24 questions (missing_image 24)" and items == []
