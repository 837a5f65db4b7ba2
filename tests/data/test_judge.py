"""`data doctor` and `data build auto` name format and frame, and ask where two readings fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloc_mllm.cli import main
from cloc_mllm.data.checks.judge import judge, the_one
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.records import Record
from tests.data.formats import FORMATS, Format, painted_records, write_images
from tests.data.test_round_trips import assert_equal_records

FRAMES = {
    "coco": ("pixels", "xywh"),
    "refcoco": ("pixels", "xywh"),
    "refer": ("pixels", "xywh"),
    "mdetr": ("pixels", "xywh"),
    "shikra_referring": ("pixels", "xyxy"),
    "shikra_captions": ("pixels", "xyxy"),
    "qwen_vl_lines": ("pixels", "xyxy"),
    "qwen_vl_conversations": ("0..1000", "xyxy"),
    "visual_genome_regions": ("pixels", "xywh"),
    "visual_genome_objects": ("pixels", "xywh"),
    "grit_tar": ("0..1", "xyxy"),
    "grit_parquet": ("0..1", "xyxy"),
    "grit_rows": ("0..1", "xyxy"),
    "odvg_detection": ("pixels", "xyxy"),
    "odvg_grounding": ("pixels", "xyxy"),
    "odgt": ("pixels", "xywh"),
    "yolo": ("0..1", "cxcywh"),
    "pascal_voc": ("pixels", "xyxy"),
    "flickr30k_entities": ("pixels", "xyxy"),
    "llava_padded": ("0..1 padded", "xyxy"),
    "llava_original": ("0..1", "xyxy"),
    "ferret": ("pixels", "xyxy"),
    "ms_swift_real": ("pixels", "xyxy"),
    "ms_swift_norm1": ("0..1", "xyxy"),
    "ms_swift_norm1000": ("0..1000", "xyxy"),
}


def many_records(num: int = 12, size: tuple[int, int] | None = None) -> list[Record]:
    """The painted pictures again and again, with a box that reaches the far corner in most."""
    records = []
    for index in range(num):
        record = painted_records()[index % 4]
        corner = replace(record.regions[0], box=(0.55, 0.5, 1.0, 1.0), phrase="the far box")
        corner = replace(corner, expressions=["the far box"], category="far box")
        regions = [*record.regions, corner]
        caption = f"{record.captions[0]} and the far box"
        records.append(replace(record, id=str(index + 1), regions=regions, captions=[caption]))
    return records


def laid_out(form: Format, records: list[Record], folder: Path) -> None:
    form.write(records, folder)
    if form.name not in ("grit_tar", "grit_parquet"):  # which hold their images
        write_images(records, folder)
    if form.name == "refer":
        (folder / "captions.json").unlink()


def fitting(path: Path, **options: Any) -> list[tuple[str, str, str]]:
    found = [item for item in judge(path, **options) if not item.faults]
    return [(item.source, item.reading.frame, item.reading.order) for item in found]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_auto_builds_every_format(form: Format, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "a set"
    folder.mkdir()
    laid_out(form, many_records(), folder)
    found = the_one(judge(folder))
    assert found is not None, fitting(folder)
    assert form.name.replace("_", "-").startswith((found.source, "odvg"))
    assert (found.reading.frame, found.reading.order) == FRAMES[form.name]
    assert main(["data", "build", "auto", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"'{folder}" in printed  # the command is quoted for a shell
    expected = list(form.read(folder, found.log.__class__()))
    actual = list(load_records(tmp_path / "out"))
    assert_equal_records(sorted(actual, key=lambda r: r.id), sorted(expected, key=lambda r: r.id))
