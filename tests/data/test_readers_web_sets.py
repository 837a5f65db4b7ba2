"""FineHARD, GBC, Localized Narratives, GroundingCap-1M, Objects365 and V3Det, in rows as published.

Where a layout was taken from stands in the reader; the GBC row is cut from apple/ml-gbc's own.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm import cli
from cloc_mllm.data.checks.judge import judge, the_one
from cloc_mllm.data.parquet import load_records
from cloc_mllm.data.readers import DEFAULTS
from cloc_mllm.data.readers.coco import read_coco
from cloc_mllm.data.readers.finehard import read_finehard
from cloc_mllm.data.readers.gbc import read_gbc, read_gbc_tars
from cloc_mllm.data.readers.localized_narratives import read_localized_narratives
from cloc_mllm.data.readers.odgt import read_odgt
from cloc_mllm.data.records import DropLog


def photo(path: Path, size: tuple[int, int] = (200, 100)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path)
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FINEHARD = {
    "f_path": "grit-20m/data-12m/coyo_image_4/00033/2075684.jpg",
    "caption": "The image shows a brown dog that lies on a red sofa beside a white pillow.",
    "short_caption": "a dog on a sofa",
    "bbox_info": [
        {
            "bbox": [0.1, 0.2, 0.6, 0.9, 0.82],
            "short_expr": "a brown dog",
            "long_expr": "a brown dog with a blue collar that lies on its side",
            "flag_short_neg": 1,
            "short_expr_negs": {"0": "a black dog", "1": "a white dog"},
        },
        {"bbox": [0.0, 0.5, 1.0, 1.0, 0.4], "short_expr": "", "long_expr": "a red sofa of leather"},
    ],
}


def test_finehard(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "coyo_image_4" / "00033" / "2075684.jpg")
    (tmp_path / "jsonfiles").mkdir()
    broken = {"caption": "no photo"}
    (tmp_path / "jsonfiles" / "a.json").write_text(json.dumps([FINEHARD, broken]))
    gone = {**FINEHARD, "f_path": "grit-20m/data-12m/coyo_image_0/00000/1.jpg"}
    (tmp_path / "jsonfiles" / "b.json").write_text(json.dumps([gone]))
    log = DropLog()

    (record,) = read_finehard(tmp_path / "jsonfiles", tmp_path / "images", drop_log=log)

    assert record.id == "coyo_image_4/00033/2075684.jpg"
    assert record.captions == [FINEHARD["caption"], FINEHARD["short_caption"]]
    dog, sofa = record.regions
    assert dog.box == pytest.approx((0.1, 0.2, 0.6, 0.9))
    assert (dog.phrase, dog.score) == ("a brown dog", 0.82)
    assert dog.expressions == ["a brown dog with a blue collar that lies on its side"]
    assert (sofa.phrase, sofa.expressions) == ("a red sofa of leather", [])
    assert log.counts["record"] == {"bad_row": 1, "missing_image": 1}
    assert any("hard negatives" in what for what in log.notes)


def vertex(name: str, label: str, box: list[float], texts: dict[str, str], edge: str = "") -> Any:
    return {
        "vertex_id": name,
        "bbox": dict(zip(("left", "top", "right", "bottom"), box, strict=True))
        | {"confidence": 0.83 if label == "entity" else None},
        "label": label,
        "descs": [{"text": text, "label": kind} for kind, text in texts.items()],
        "in_edges": [{"source": "", "text": edge, "target": name}] if edge else [],
        "out_edges": [],
    }


GBC = {
    "img_url": "https://upload.wikimedia.org/horses.jpg",
    "img_path": "data/images/wiki/Wild_horses.jpg",
    "original_caption": None,
    "short_caption": "A light brown horse and a white horse walk through a snowy field.",
    "detail_caption": "The image captures a serene winter scene featuring two horses.",
    "vertices": [
        vertex("", "image", [0, 0, 1, 1], {"detail": "The image captures", "short": "A light"}),
        vertex("horse", "entity", [0.2, 0.3, 0.7, 0.9], {"detail": "Two horses."}, "horse"),
        vertex("trees_0", "entity", [0.8, 0.3, 0.9, 0.6], {"detail": "A bare tree."}, "tree 1"),
        vertex("trees", "composition", [0.2, 0.3, 0.9, 0.6], {"short": "Both are bare."}, "trees"),
        vertex(
            "[horse|snow]",
            "relation",
            [0, 0.3, 1, 1],
            {"relation": "The horse is standing in a field covered with snow."},
            "horse",
        ),
    ],
}
GBC_REGIONS = [
    ("horse", ["Two horses."], 0.83),
    ("tree", ["A bare tree."], 0.83),
    ("trees", [], 1.0),
    ("The horse is standing in a field covered with snow.", [], 1.0),
]


def test_gbc_rows(tmp_path: Path) -> None:
    photo(tmp_path / "data" / "images" / "wiki" / "Wild_horses.jpg")
    rows = write_lines(tmp_path / "gbc.jsonl", [GBC, {"vertices": []}])
    log = DropLog()
    (record,) = read_gbc(rows, tmp_path, drop_log=log)
    assert record.captions == [GBC["detail_caption"], GBC["short_caption"]]
    assert [(r.phrase, r.expressions, r.score) for r in record.regions] == GBC_REGIONS
    assert record.regions[0].box == pytest.approx((0.2, 0.3, 0.7, 0.9))
    assert log.counts == {"record": {"bad_row": 1}}


@pytest.mark.parametrize("as_text", [False, True])
def test_gbc_as_img2dataset_fetches_it(as_text: bool, tmp_path: Path) -> None:
    """Extra columns stand in the JSON, lists perhaps as text."""
    row = {**GBC, "vertices": json.dumps(GBC["vertices"]) if as_text else GBC["vertices"]}
    image = photo(tmp_path / "a.jpg").read_bytes()
    samples = {"0001.jpg": image, "0001.json": json.dumps(row).encode(), "0002.json": b"{}"}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    log = DropLog()
    (record,) = read_gbc_tars([tmp_path / "00000.tar"], drop_log=log)
    assert record.id == "0001"
    assert [(r.phrase, r.expressions, r.score) for r in record.regions] == GBC_REGIONS
    assert log.counts == {"record": {"bad_row": 1}}


NARRATIVE = {
    "dataset_id": "mscoco_val2017",
    "image_id": "137576",
    "annotator_id": 93,
    "caption": "In this image there are brown cows eating the grass.",
    "timed_caption": [
        {"utterance": "In this image there are", "start_time": 0.0, "end_time": 0.9},
        {"utterance": "brown cows", "start_time": 1.0, "end_time": 2.0},
        {"utterance": "eating the grass.", "start_time": 2.1, "end_time": 3.0},
        {"utterance": "a tree", "start_time": 3.1, "end_time": 3.2},
    ],
    "traces": [
        [{"x": 0.5, "y": 0.5, "t": 0.5}, {"x": 0.2, "y": -0.05, "t": 1.1}],
        [{"x": 0.6, "y": 0.4, "t": 1.5}, {"x": 0.4, "y": 0.7, "t": 1.9}],
        [{"x": 0.1, "y": 0.8, "t": 2.2}, {"x": 0.5, "y": 1.02, "t": 2.5}],
        [{"x": 0.9, "y": 0.9, "t": 2.9}, {"x": 0.9, "y": 0.1, "t": 3.15}],
    ],
    "voice_recording": "coco_val/coco_val_137576_93.ogg",
}


def test_localized_narratives(tmp_path: Path) -> None:
    photo(tmp_path / "val2017" / "000000137576.jpg")
    rows = [NARRATIVE, {**NARRATIVE, "annotator_id": 7}, {"image_id": "1"}]
    path = write_lines(tmp_path / "coco_val_localized_narratives.jsonl", rows)
    log = DropLog()
    records = list(read_localized_narratives(path, tmp_path / "val2017", drop_log=log))
    assert [record.id for record in records] == ["137576-93", "137576-7"]
    cows, grass = records[0].regions
    assert records[0].captions == [NARRATIVE["caption"]]
    assert (cows.phrase, grass.phrase) == ("brown cows", "eating the grass")
    assert cows.box == pytest.approx((0.2, 0.0, 0.6, 0.7))  # the mouse left the image
    assert grass.box == pytest.approx((0.1, 0.8, 0.9, 1.0))
    assert log.counts == {"record": {"bad_row": 1}}
    assert log.set_aside == {"region": {"unsaid": 2, "unheard": 2}}


GROUNDING_CAP = {
    "filename": "1000092795.jpg",
    "height": 100,
    "width": 200,
    "grounding": {
        "caption": "Two young guys with shaggy hair look at their hands.",
        "regions": [
            {
                "bbox": [[20, 10, 100, 90], [110, 10, 190, 90]],
                "phrase": "Two young guys",
                "tokens_positive": [[0, 14]],
            },
            {"bbox": [30, 40, 50, 60], "phrase": "hands", "tokens_positive": [[46, 51]]},
        ],
    },
    "conversations": [
        {"from": "human", "value": "<image>\nDescribe the image in detail."},
        {"from": "gpt", "value": "In the image, two young men stand in a yard."},
    ],
    "tags": ["guy", "hand"],
}


def test_grounding_cap(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "1000092795.jpg")
    rows = write_lines(tmp_path / "flickr_train_vg7.jsonl", [GROUNDING_CAP])
    log = DropLog()
    (record,) = read_odgt(rows, tmp_path / "images", drop_log=log)
    assert record.captions == [
        "Two young guys with shaggy hair look at their hands.",
        "In the image, two young men stand in a yard.",
    ]
    first, second, hands = record.regions
    assert first.group == second.group == "Two young guys"
    assert second.box == pytest.approx((0.55, 0.1, 0.95, 0.9))
    assert (hands.phrase, hands.group) == ("hands", "")
    assert log.counts == {}


@pytest.mark.parametrize(
    ("file_name", "on_disk"),
    [
        ("images/v1/patch8/objects365_v1_00420917.jpg", "patch8/objects365_v1_00420917.jpg"),
        ("images/n07745046/21_371_294_c.jpg", "V3Det/images/n07745046/21_371_294_c.jpg"),
    ],
    ids=["objects365", "v3det"],
)
def test_objects365_and_v3det_are_cocos_layout(
    file_name: str, on_disk: str, tmp_path: Path
) -> None:
    photo(tmp_path / "images" / on_disk)
    table = {
        "images": [{"id": 420917, "file_name": file_name, "width": 200, "height": 100}],
        "categories": [{"id": 5, "name": "Wild Bird", "name_zh": "鸟"}],
        "annotations": [
            {"id": 1, "image_id": 420917, "category_id": 5, "bbox": [20, 10, 80, 50], "iscrowd": 0}
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps(table))
    log = DropLog()
    (record,) = read_coco(tmp_path / "train.json", tmp_path / "images", drop_log=log)
    assert record.regions[0].phrase == "Wild Bird"
    assert record.regions[0].box == pytest.approx((0.1, 0.1, 0.5, 0.6))
    assert log.counts == {}


def test_the_commands_and_what_auto_takes_them_for(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "000000137576.jpg")
    rows = write_lines(tmp_path / "narratives.jsonl", [NARRATIVE])
    paths = ["--rows", str(rows), "--images", str(tmp_path / "images")]
    output = str(tmp_path / "out")
    assert cli.main(["data", "build", "localized-narratives", *paths, "--output_dir", output]) == 0
    assert len(load_records(output)[0].regions) == 2
    found = the_one(judge(rows, tmp_path / "images", DEFAULTS))
    assert found is not None and found.source == "localized-narratives"
