"""A photo stored sideways with its EXIF tag gets the answers of the same photo stored upright."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import DropLog, Record
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.run import evaluate
from tests.photos import encoded

TASKS = ["rec", "referring", "text_to_box", "region_classification"]


@pytest.fixture(scope="module")
def scenes() -> list[Record]:
    return list(generate_scenes(8, split="test", seed=3))


def stored_as(records: Sequence[Record], orientations: Sequence[int]) -> list[Record]:
    """The same pictures, lossless, each stored in the next of the orientations."""
    return [
        replace(record, image=encoded(record.load_image(), orientation))
        for record, orientation in zip(records, cycle(orientations), strict=False)
    ]


def predictions(records: Sequence[Record], directory: Path) -> list[dict[str, Any]]:
    log = DropLog()
    write_records(records, directory / "data", drop_log=log)
    config = EvalConfig(
        data=str(directory / "data"),
        output_dir=str(directory / "eval"),
        tasks=TASKS,
        bootstrap_samples=2,
        num_examples=0,
    )
    evaluate(config)
    lines = (directory / "eval" / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_evaluation_rows_are_equal(scenes: list[Record], tmp_path: Path) -> None:
    expected = predictions(stored_as(scenes, [1]), tmp_path / "upright")
    actual = predictions(stored_as(scenes, [3, 5, 6, 8]), tmp_path / "turned")
    assert {row["task"] for row in expected} == set(TASKS)
    assert actual == expected
