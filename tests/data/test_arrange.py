"""Records are chosen by what they hold, and what is left out is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.cli import main
from cloc_mllm.data.parquet import load_records, read_manifest, write_records
from tests.data.formats import painted_records


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four pictures with 1 to 4 regions, and one without."""
    first, *others = painted_records()
    empty = replace(first, id="empty", regions=[], captions=[])
    write_records([first, *others, empty], tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--min_regions", "1"], ["1", "2", "3", "4"]),
        (["--min_regions", "3"], ["3", "4"]),
        (["--min_captions", "1"], ["1", "2", "3", "4"]),
        (["--ids", "ids.txt"], ["2", "empty"]),
        (["--without_ids", "ids.txt"], ["1", "3", "4"]),
        (["--without_ids", "ids.txt", "--min_regions", "3"], ["3", "4"]),
    ],
    ids=str,
)
def test_filter(
    arguments: list[str], expected: list[str], data: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(data.parent)
    Path("ids.txt").write_text("2\nempty\n")
    assert main(["data", "filter", str(data), "--output_dir", "out", *arguments]) == 0
    kept = load_records("out")
    assert [record.id for record in kept] == expected
    assert f"{5 - len(expected)} of 5 records were left out" in capsys.readouterr().out
    manifest = read_manifest("out")
    left_out = sum(len(record.regions) for record in load_records(data))
    left_out -= sum(len(record.regions) for record in kept)
    assert manifest["set_aside"].get("region", {}).get("filtered", 0) == left_out
    assert manifest["delivered"]["region"] + left_out == 10


def test_filter_by_nothing_is_refused(data: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["data", "filter", str(data), "--output_dir", str(tmp_path / "out")]) == 2
    assert "nothing to filter by" in capsys.readouterr().err
    arguments = ["--min_regions", "9", "--output_dir", str(tmp_path / "out")]
    assert main(["data", "filter", str(data), *arguments]) == 2
    assert not (tmp_path / "out").exists()


def test_a_part_without_records_is_named(data: Path, tmp_path: Path, capsys: Any) -> None:
    parts = ["--parts", "train=0.9999", "test=0.0001", "--output_dir", str(tmp_path / "out")]
    assert main(["data", "split", str(data), *parts]) == 2
    assert "part test (share 0.0001) gets none of the 5 records" in capsys.readouterr().err
