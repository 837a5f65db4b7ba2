"""Photos stored smaller hold the same boxes, and the report names the cores that GPUs need."""

from __future__ import annotations

from pathlib import Path

import pytest

import feed
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import Record


def test_records_are_stored_smaller_with_their_boxes(tiny_scenes: list[Record]) -> None:
    smaller = feed.stored_at(tiny_scenes[:2], 64)
    assert [max(record.load_image().size) for record in smaller] == [64, 64]
    assert [record.regions for record in smaller] == [record.regions for record in tiny_scenes[:2]]
    assert feed.stored_at(tiny_scenes[:2], 0) == tiny_scenes[:2]


def test_the_report_counts_cores(
    tiny_scenes: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tiny_scenes, tmp_path / "set")
    arguments = ["--data", str(tmp_path / "set"), "--max_sides", "0", "64", "--image_size", "64"]
    feed.main([*arguments, "--rounds", "1", "--images_per_second", "100", "--gpus", "2"])
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("as it came") and second.startswith("64 px")
    rate, gain, cores = first.split()[-3:]
    assert float(gain) == 1.0
    assert float(cores.replace(",", "")) == pytest.approx(
        200 / float(rate.replace(",", "")), abs=0.51
    )
