from __future__ import annotations

import pytest
from cloc_mllm.evaluation.benchmarks.captioning import captioning_questions

from cloc_mllm.data.conversations import PROMPTS
from cloc_mllm.data.records import Record, Region


def make_record(*regions: Region) -> Record:
    return Record("photo", b"", 100, 50, [], list(regions), "refcoco")


def test_each_box_is_asked_once_with_all_its_texts() -> None:
    box = (0.0, 0.0, 0.5, 1.0)
    record = make_record(
        Region(box, "left dog", expressions=["left dog", "the dog"]), Region(box, "brown dog")
    )
    actual = captioning_questions([record], "dogs")
    (question,), (reference,) = actual.questions, actual.references
    assert question.text == "What is in <region>?" and question.boxes == (box,)
    assert question.text.replace("<region>", "BOX <region>") == PROMPTS["refer"].format(box="BOX")
    assert reference.labels == ["left dog", "the dog", "brown dog"]


def test_records_without_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="dogs holds no region with a text"):
        captioning_questions([make_record()], "dogs")
