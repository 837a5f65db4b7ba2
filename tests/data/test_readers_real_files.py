"""Real files of the formats; where their photos are not here, blank ones of the stated size are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.data.drawing import draw_record
from cloc_mllm.data.readers.coco import read_coco
from cloc_mllm.data.readers.grit import read_grit_parquet
from cloc_mllm.data.readers.llava import read_llava
from cloc_mllm.data.readers.visual_genome import read_visual_genome
from cloc_mllm.data.records import DropLog
from cloc_mllm.data.writers.coco import write_coco
from tests.data.formats import write_grit_table, write_vg_regions
from tests.data.test_round_trips import assert_equal_records


@pytest.fixture
def formats(shared_data: Path) -> Path:
    return shared_data / "formats"


def blank(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def test_visual_genome(formats: Path, tmp_path: Path) -> None:
    source = formats / "visual_genome_region_graphs_4.json"
    table = json.loads(source.read_text())
    for row in table:
        blank(tmp_path / "images" / f"{row['image_id']}.png", (1000, 1000))
    log = DropLog()
    first = list(read_visual_genome(source, tmp_path / "images", drop_log=log))
    assert len(first) == 4
    assert log.delivered["region"] + log.num_dropped("region") == sum(
        len(row["regions"]) for row in table
    )
    assert first[0].regions[0].phrase == "the clock is green in colour"
    assert first[0].regions[0].box == pytest.approx((0.421, 0.057, 0.503, 0.196))
    assert draw_record(replace(first[0], regions=first[0].regions[:20])).size == (640, 640)
    write_vg_regions(first, tmp_path)
    again = list(read_visual_genome(tmp_path / "vg.json", tmp_path / "images", drop_log=DropLog()))
    assert_equal_records(again, first)


def test_grit(formats: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = json.loads((formats / "grit_coyo_1.jsonl").read_text())
    blank(tmp_path / "images" / "000373938.jpg", (row["width"], row["height"]))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "real.parquet")
    log = DropLog()
    (record,) = read_grit_parquet([tmp_path / "real.parquet"], tmp_path / "images", drop_log=log)
    assert record.id == "000373938"
    assert [region.phrase for region in record.regions] == ["a paper cover", "a wire hanger"]
    assert record.regions[1].expressions == [row["caption"]]
    assert record.regions[0].score == pytest.approx(0.79298526)
    assert record.regions[0].box == pytest.approx(tuple(row["noun_chunks"][0][2:6]))
    assert log.counts == {}
    write_grit_table([record], tmp_path)
    again = list(read_grit_parquet([tmp_path / "grit.parquet"], drop_log=DropLog()))
    assert_equal_records(again, [record])


def test_ferret_bench(formats: Path, tmp_path: Path) -> None:
    source = formats / "ferret_bench_ground_conv_answer_8.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        blank(tmp_path / row["image"], (640, 480))
    log = DropLog()
    records = list(read_llava(source, tmp_path, frame="original", drop_log=log))
    assert [record.id for record in records] == [row["image"].removesuffix(".jpg") for row in rows]
    assert [(r.phrase, r.box) for r in records[0].regions] == [
        ("The man", (0.201, 0.002, 0.94, 0.758)),
        ("a skateboard", (0.012, 0.746, 0.664, 0.886)),
    ]
    assert log.counts == {}


def test_coco_photos_round_trip(formats: Path, tmp_path: Path) -> None:
    log = DropLog()
    first = list(
        read_coco(
            formats / "coco_mini_instances_val2017.json",
            formats / "coco_mini_images_val2017_24.tar",
            captions=formats / "coco_mini_captions_val2017.json",
            drop_log=log,
        )
    )
    assert len(first) == 24
    assert all(max(draw_record(record).size) == 640 for record in first[:3])
    write_coco(first, tmp_path / "out")
    again = list(
        read_coco(
            tmp_path / "out" / "instances.json",
            tmp_path / "out" / "images",
            captions=tmp_path / "out" / "captions.json",
            drop_log=DropLog(),
        )
    )
    assert_equal_records(again, first)


def test_lvis(formats: Path, tmp_path: Path) -> None:
    source = formats / "lvis_val_100.json"
    table = json.loads(source.read_text())
    for image in table["images"]:
        name = Path(image["coco_url"]).with_suffix(".png").name
        blank(tmp_path / "images" / name, (image["width"], image["height"]))
        (tmp_path / "images" / name).rename(tmp_path / "images" / Path(name).with_suffix(".jpg"))
    log = DropLog()
    first = list(read_coco(source, tmp_path / "images", drop_log=log))
    assert len(first) == 100
    assert log.delivered["region"] + log.num_dropped("region") == len(table["annotations"]) == 977
    assert draw_record(first[0]).width == 640
    write_coco(first, tmp_path / "out")
    again = list(
        read_coco(
            tmp_path / "out" / "instances.json", tmp_path / "out" / "images", drop_log=DropLog()
        )
    )
    assert_equal_records([replace(record, source="lvis") for record in again], first)
