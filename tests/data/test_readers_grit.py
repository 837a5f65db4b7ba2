from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.data.commands import main
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.readers.grit import read_grit
from cloc_mllm.data.records import DropLog, Record

CAPTION = "a wire hanger with a paper cover that reads"
HANGER, COVER = [0.0, 0.0, 1.0, 0.5], [0.25, 0.5, 0.75, 1.0]


def make_row(**change: Any) -> dict[str, Any]:
    return {
        "key": "007",
        "caption": CAPTION,
        "noun_chunks": [[19, 32, *COVER, 0.8]],
        "ref_exps": [[19, 43, *COVER, 0.8], [0, 32, *HANGER, 0.7]],
        **change,
    }


def read(folder: Path, *rows: Any) -> tuple[list[Record], DropLog]:
    Image.new("RGB", (8, 4), "green").save(folder / "007.jpg")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    log = DropLog()
    return list(read_grit(folder / "rows.jsonl", folder, drop_log=log)), log


def test_one_row(tmp_path: Path) -> None:
    (record,), log = read(tmp_path, make_row())
    assert (record.id, record.captions, record.source) == ("007", [CAPTION], "grit")
    cover, hanger = record.regions
    assert (cover.phrase, cover.box, cover.score) == ("a paper cover", tuple(COVER), 0.8)
    assert cover.expressions == ["a paper cover that reads"]
    assert (hanger.phrase, hanger.expressions) == ("a wire hanger with a paper cover", [])
    assert log.counts == {}


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ("{", {"record": {"bad_row": 1}}),
        ([1], {"record": {"bad_row": 1}}),
        (make_row(key=True), {"record": {"bad_row": 1}}),
        (make_row(noun_chunks=[[1, 2, 3]], ref_exps=None), {"region": {"bad_row": 1}}),
        (make_row(noun_chunks=[[5, 5, *COVER, 1]], ref_exps=[]), {"region": {"bad_row": 1}}),
        (
            make_row(noun_chunks=[[99, 120, *COVER, 1]], ref_exps=[]),
            {"region": {"empty_text": 1}},
        ),
        (
            make_row(noun_chunks=[[0, 6, 0.5, 0, 0.1, 1, 1]], ref_exps=[]),
            {"region": {"inverted": 1}},
        ),
    ],
)
def test_bad_rows_are_counted(tmp_path: Path, row: Any, counts: dict[str, Any]) -> None:
    _, log = read(tmp_path, row)
    assert log.counts == counts


def test_a_missing_image_is_dropped_with_its_parts(tmp_path: Path) -> None:
    records, log = read(tmp_path, make_row(key="008"))
    assert records == []
    assert log.counts["record"] == {"missing_image": 1}
    assert log.counts["region"] == {"missing_image": 2}


def test_a_real_row_through_the_command(shared_data: Path, tmp_path: Path) -> None:
    rows = shared_data / "formats" / "grit_coyo_1.jsonl"
    Image.new("RGB", (1024, 693)).save(tmp_path / "000373938.jpg")
    out = tmp_path / "records"
    main(["build", "grit", "--rows", str(rows), "--images", str(tmp_path), "--out", str(out)])
    (record,) = load_records(out)
    assert [(region.phrase, region.expressions) for region in record.regions] == [
        ("a paper cover", ["a paper cover that reads we heart our customers"]),
        ("a wire hanger", [record.captions[0]]),
    ]
