"""Benchmarks that are declared by name."""

from dataclasses import replace

import pytest

from cloc_mllm.data.records import Record, Region
from cloc_mllm.evaluation.declared import (
    DECLARED,
    Declared,
    check_declared,
    declared_benchmark,
)
from cloc_mllm.evaluation.run import evaluate
from cloc_mllm.evaluation.tasks.image_text_retrieval import ImageTextRetrieval
from cloc_mllm.evaluation.tasks.text_to_box import TextToBox
from tests.evaluation.helpers import cloc_config, query_sets


def photos(num, num_captions):
    captions = [f"caption {k}" for k in range(num_captions)]
    return [
        Record(f"p{i}", b"", 9, 9, captions, [Region((0, 0, 1, 1), "x")], "s") for i in range(num)
    ]


@pytest.mark.parametrize(
    ("declared", "num", "message"),
    [
        (Declared(3), 2, "benchmark 'b' has 3 images, this data has 2; build the records"),
        (Declared(2, captions_per_image=5), 2, "has 5 captions per image, record 'p0' has 4"),
        (Declared(2, num_classes=80), 2, "has 80 class names, this data has 0"),
    ],
)
def test_a_part_of_a_declared_benchmark_is_refused(declared, num, message):
    records = photos(num, 4)
    with pytest.raises(ValueError, match=message):
        check_declared("b", declared, records, query_sets(ImageTextRetrieval(), records))


def test_the_whole_of_a_declared_benchmark_passes():
    records = photos(2, 5)
    check_declared("b", Declared(2, 5), records, query_sets(TextToBox(), records))


def test_benchmarks_are_declared_by_name(cloc_dir, tmp_path):
    assert declared_benchmark("") is None
    assert declared_benchmark("coco_5k") == Declared(5000, captions_per_image=5)
    assert DECLARED["lvis_v1_val_boxes"].num_classes == 1203
    settings = cloc_config(cloc_dir, tmp_path, tasks=["text_to_box"])
    with pytest.raises(ValueError, match="unknown benchmark 'coco'; expected one of: coco_5k, "):
        evaluate(replace(settings, benchmark="coco"))
    with pytest.raises(ValueError, match="'grit_2k' has 2,000 images, this data has 2;"):
        evaluate(replace(settings, benchmark="grit_2k", limit=2))
