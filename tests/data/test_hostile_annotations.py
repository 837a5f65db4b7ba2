"""Whatever stands in an annotation file: each item ends delivered or dropped with a reason."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloc_mllm.data.records import DropLog, Record, Region
from tests.data.formats import FORMATS, Format, llava_box, painted_records, write_images, xyxy

SETTINGS = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BY_NAME = {form.name: form for form in FORMATS}
# an annotation is one region
REGION_FORMATS = [
    *("coco", "refer", "shikra_captions", "qwen_vl_conversations", "visual_genome_regions"),
    *("visual_genome_objects", "odvg_detection", "odvg_grounding", "odgt", "yolo", "pascal_voc"),
    *("cvat", "label_studio", "label_studio_min", "via_project", "via_json", "via_csv"),
    *("labelme", "open_images", "hf_rows", "csv"),
]
# a row is one expression, rows of one box are one region; in the last, regions have expressions
EXPRESSION_FORMATS = ["refcoco", "mdetr", "shikra_referring", "qwen_vl_lines", "label_studio"]
# boxes of the same numbers are one region
DISTINCT_FORMATS = ["llava_padded", "llava_original", "ferret", "ms_swift_real"]
DISTINCT_FORMATS += ["ms_swift_norm1", "grit_rows"]
# XML and text files hold no NUL, no lone surrogate
PLAIN_TEXT_FORMATS = {"pascal_voc", "yolo", "cvat", "via_csv", "open_images", "csv"}

coordinates = st.one_of(
    st.floats(-0.5, 1.5),
    st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 640.0, 999.0]),
)
boxes = st.tuples(*[coordinates] * 4)
phrases = st.sampled_from(
    [
        "cat",
        "",
        "  ",
        "x" * 100_000,
        "👩‍🚀",
        "قطة سوداء",
        "a\0b",
        "\0",
        "\ud800",
        "猫",
        "\u202e abc",
    ]
)


def hostile_record(items: list[tuple[Any, str]]) -> Record:
    regions = [Region(box, text, expressions=[text, "it"], category=text) for box, text in items]
    painted = painted_records()[0]
    return Record("1", painted.image, painted.width, painted.height, ["the cat"], regions, "")


@contextmanager
def folder_with_image() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        write_images(painted_records()[:1], Path(name))
        yield Path(name)


def read_back(form: Format, record: Record) -> DropLog:
    """The account of reading what `form.write` wrote; delivered records are sound."""
    log = DropLog()
    with folder_with_image() as folder:
        form.write([record], folder)
        for delivered in form.read(folder, log):
            for region in delivered.regions:
                x1, y1, x2, y2 = region.box
                assert 0 <= x1 < x2 <= 1
                assert 0 <= y1 < y2 <= 1
                assert region.phrase.strip()
                assert region.phrase.encode()
    return log


def total(log: DropLog, kind: Any) -> int:
    return log.delivered[kind] + log.num_dropped(kind)


@pytest.mark.parametrize("name", REGION_FORMATS)
@SETTINGS
@given(items=st.lists(st.tuples(boxes, phrases), max_size=6))
def test_every_region_is_accounted_for(name: str, items: list[tuple[Any, str]]) -> None:
    if name in PLAIN_TEXT_FORMATS:
        items = [(box, "cat") for box, _ in items]
    record = hostile_record(items)
    assert total(read_back(BY_NAME[name], record), "region") == len(items)


@pytest.mark.parametrize("name", EXPRESSION_FORMATS)
@SETTINGS
@given(items=st.lists(st.tuples(boxes, phrases), min_size=1, max_size=6))
def test_every_expression_is_accounted_for(name: str, items: list[tuple[Any, str]]) -> None:
    record = hostile_record(items)
    assert total(read_back(BY_NAME[name], record), "expression") == 2 * len(items)


@pytest.mark.parametrize("name", DISTINCT_FORMATS)
@SETTINGS
@given(items=st.lists(boxes, min_size=1, max_size=6))
def test_every_distinct_box_is_accounted_for(name: str, items: list[Any]) -> None:
    record = hostile_record([(box, "the cat") for box in items])
    if name.startswith("llava"):
        keys = {llava_box(record, r, padded="padded" in name) for r in record.regions}
    elif name in ("ms_swift_norm1", "grit_rows"):
        keys = {repr(list(region.box)) for region in record.regions}
    else:
        keys = {repr(xyxy(record, region)) for region in record.regions}
    assert total(read_back(BY_NAME[name], record), "region") == len(keys)


@pytest.mark.parametrize("num_boxes", [0, 10_000])
@pytest.mark.parametrize("name", ["coco", "odvg_detection", "yolo", "visual_genome_regions"])
def test_no_box_and_ten_thousand(name: str, num_boxes: int) -> None:
    record = hostile_record([((0.1, 0.2, 0.5, 0.6), "cat")] * num_boxes)
    log = read_back(BY_NAME[name], record)
    assert log.delivered["record"] == 1
    assert log.delivered["region"] == num_boxes


# whatever the structure of the file


junk = st.sampled_from(
    [None, True, -1, 10**400, 1e308, math.nan, "", "a", "\ud800", [], [[]], {}, {"a": 1}, [1, 2]]
)
JSON_FILES = {
    **dict.fromkeys(["coco", "refer"], "instances.json"),
    "mdetr": "mdetr.json",
    **dict.fromkeys(["visual_genome_regions", "visual_genome_objects"], "vg.json"),
    **dict.fromkeys(["refcoco", "llava_padded", "llava_original", "ferret"], "rows.json"),
    **dict.fromkeys(["shikra_referring", "shikra_captions", "qwen_vl_lines"], "rows.jsonl"),
    **dict.fromkeys(["odvg_detection", "odvg_grounding", "odgt"], "rows.jsonl"),
    **dict.fromkeys(["ms_swift_real", "ms_swift_norm1", "grit_rows", "hf_rows"], "rows.jsonl"),
    **dict.fromkeys(["label_studio", "label_studio_min"], "export.json"),
    "via_project": "via_project.json",
    "via_json": "via.json",
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values below the top."""
    if path:
        yield path
    pairs: Any = value.items() if isinstance(value, dict) else ()
    for key, child in enumerate(value) if isinstance(value, list) else pairs:
        yield from places(child, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize(("name", "file_name"), JSON_FILES.items(), ids=list(JSON_FILES))
@SETTINGS
@given(data=st.data())
def test_no_structure_crashes_a_reader(name: str, file_name: str, data: Any) -> None:
    """At most a ValueError that names the file: a list of rows that is none."""
    with folder_with_image() as folder:
        BY_NAME[name].write(painted_records()[:2], folder)
        path = folder / file_name
        lines = path.read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for _ in range(data.draw(st.integers(1, 3))):
            where = data.draw(st.sampled_from(list(places(rows))))
            rows = replaced(rows, where, data.draw(junk))
        path.write_text("\n".join(json.dumps(row) for row in rows))
        log = DropLog()
        try:
            records = list(BY_NAME[name].read(folder, log))
        except ValueError as error:
            assert str(folder) in str(error)
            return
        assert log.delivered["record"] == len(records)
        assert log.delivered["region"] == sum(len(record.regions) for record in records)


def test_duplicate_ids_and_dangling_references(tmp_path: Path) -> None:
    write_images(painted_records(), tmp_path)
    BY_NAME["coco"].write(painted_records(), tmp_path)
    table = json.loads((tmp_path / "instances.json").read_text())
    table["images"].append(table["images"][3])
    table["annotations"][0]["image_id"] = 77
    table["annotations"][1]["category_id"] = 77
    (tmp_path / "instances.json").write_text(json.dumps(table))
    log = DropLog()
    assert len(list(BY_NAME["coco"].read(tmp_path, log))) == 4
    assert log.counts == {
        "record": {"duplicate_id": 1},
        "region": {"unknown_category": 1, "unknown_image": 1},
    }
    assert total(log, "region") == 10
