"""Data sets of Hugging Face `datasets`: where they lie, and how their objects are written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from cloc_mllm.data.readers.hf_objects import (
    ObjectColumns,
    looks_like_hf_objects,
    read_hf_objects,
)
from cloc_mllm.data.readers.places import Place
from cloc_mllm.data.records import DropLog, Record

BOX = pytest.approx((0.1, 0.2, 0.3, 0.6))
XYWH = [20.0, 20.0, 40.0, 40.0]


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (200, 100), "green").save(file, "PNG")
    return file.getvalue()


def dataset(objects: Any, feature: Any, **columns: Any) -> Dataset:
    rows = [{"image": {"bytes": png(), "path": None}, "objects": objects, **columns}]
    features = {name: Value("int64") for name in columns}
    return Dataset.from_list(
        rows, Features({"image": ImageFeature(), "objects": feature, **features})
    )


def read(path: Any, *images: Path, **options: Any) -> tuple[list[Record], DropLog]:
    log = DropLog()
    options = {"frame": "pixels", "box_order": "xywh", **options}
    return list(read_hf_objects(path, *images, drop_log=log, **options)), log


BOXES = List(Value("float64"))
NAMES = ClassLabel(names=["cat", "dog"])
FORMS: dict[str, tuple[Any, Any]] = {
    "struct_of_lists": (
        {"bbox": [XYWH, XYWH], "category": [1, 0]},
        {"bbox": List(BOXES), "category": List(NAMES)},
    ),
    "list_of_structs": (
        [{"bbox": XYWH, "category": 1}, {"bbox": XYWH, "category": 0}],
        List({"bbox": BOXES, "category": NAMES}),
    ),
    "texts": (
        {"boxes": [XYWH, XYWH], "label": ["dog", "cat"]},
        {"boxes": List(BOXES), "label": List(Value("string"))},
    ),
    "with_more": (
        {"id": [5, 6], "area": [1.0, 2.0], "bbox": [XYWH, XYWH], "category": [1, 0]},
        {
            "id": List(Value("int64")),
            "area": List(Value("float64")),
            "bbox": List(BOXES),
            "category": List(NAMES),
        },
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_objects(form: str, tmp_path: Path) -> None:
    dataset(*FORMS[form], image_id=7).save_to_disk(tmp_path / "set")
    (record,), log = read(tmp_path / "set")
    assert record.id == "7"
    assert [(r.phrase, r.box) for r in record.regions] == [("dog", BOX), ("cat", BOX)]
    assert log.counts == {}


@pytest.mark.parametrize(
    ("frame", "box_order", "stated"),
    [
        ("pixels", "xyxy", [20, 20, 60, 60]),
        ("normalized", "xywh", [0.1, 0.2, 0.2, 0.4]),
        ("normalized", "cxcywh", [0.2, 0.4, 0.2, 0.4]),
        ("thousandths", "yxyx", [200, 100, 600, 300]),
    ],
)
def test_declared_frames(frame: str, box_order: str, stated: list[float], tmp_path: Path) -> None:
    objects = {"bbox": [[float(v) for v in stated]], "category": [0]}
    dataset(objects, FORMS["struct_of_lists"][1]).to_parquet(tmp_path / "set.parquet")
    (record,), _ = read(tmp_path / "set.parquet", frame=frame, box_order=box_order)
    assert (record.id, record.regions[0].box) == ("0", BOX)


def test_splits(tmp_path: Path) -> None:
    one = dataset(*FORMS["struct_of_lists"], image_id=7)
    DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "set")
    records, _ = read(tmp_path / "set")
    assert [record.id for record in records] == ["train/7", "test/7"]
    (record,), _ = read(tmp_path / "set", split="test")
    assert record.id == "7"
    with pytest.raises(ValueError, match=r"no split 'val'; there are train, test"):
        read(tmp_path / "set", split="val")


def test_names_of_numbers(tmp_path: Path) -> None:
    """AutoTrain's ImageFolder has numbers and no ClassLabel."""
    Image.new("RGB", (200, 100)).save(tmp_path / "0001.png")
    row = {"file_name": "0001.png", "objects": {"bbox": [XYWH, XYWH], "category": [1, 5]}}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (record,), log = read(tmp_path)
    assert log.counts == {"region": {"unknown_category": 2}}
    assert "give them with --names" in log.drops[0].found
    names = tmp_path.parent / "names.txt"
    names.write_text("cat\ndog\n")
    (record,), log = read(tmp_path, names=names)
    assert (record.id, [r.phrase for r in record.regions]) == ("0001", ["dog"])
    assert log.counts == {"region": {"unknown_category": 1}}


def test_the_working_directory_is_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    row = {"file_name": "a.png", "objects": {"bbox": [XYWH], "category": ["cat"]}}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    (record,), _ = read(".")
    assert record.regions[0].box == BOX
    readings = list(looks_like_hf_objects(Place("metadata.jsonl")))
    assert readings[0].why.startswith(f"{tmp_path.name} has metadata")


def test_rows_that_name_their_images(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    row = {"photo": "a.png", "things": [{"where": XYWH, "what": "cat"}, 3]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n[]\n")
    columns = ObjectColumns("photo", "things", "where", "what")
    (record,), log = read(tmp_path / "rows.jsonl", tmp_path, columns=columns)
    assert (record.id, [r.phrase for r in record.regions]) == ("a", ["cat"])
    assert log.counts == {"record": {"bad_row": 1}, "region": {"bad_row": 1}}
    _, log = read(tmp_path / "rows.jsonl", columns=columns)
    assert log.counts["record"] == {"missing_image": 1, "bad_row": 1}
    assert "name the images' folder with --images" in log.drops[1].found


def test_lists_of_different_lengths(tmp_path: Path) -> None:
    objects = {"bbox": [XYWH, XYWH], "category": [0]}
    dataset(objects, FORMS["struct_of_lists"][1]).save_to_disk(tmp_path / "set")
    (record,), log = read(tmp_path / "set")
    assert len(record.regions) == 1
    assert log.counts == {"region": {"empty_text": 1}}


@pytest.mark.parametrize(
    ("objects", "num_lost"),
    [({"where": [XYWH], "what": ["cat"]}, 1), ("[]", 1), (7, 1), (None, 0), ({}, 0), ([], 0)],
)
def test_objects_that_are_none_are_counted(objects: Any, num_lost: int, tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "objects": objects}]))
    (record,), log = read(tmp_path / "rows.json", tmp_path)
    assert record.regions == []
    assert log.counts == ({"region": {"bad_row": num_lost}} if num_lost else {})
    if num_lost:
        assert "--box_key" in log.drops[0].found


def test_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing-here: expected a folder or file of `datasets`"):
        read(str(tmp_path / "nothing-here"))
    dataset(*FORMS["struct_of_lists"]).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"a column 'picture', there are image, objects; name it"):
        read(tmp_path / "set", columns=ObjectColumns(image="picture"))
    with pytest.raises(ValueError, match=r"a column 'faces', .* with --objects_column"):
        read(tmp_path / "set", columns=ObjectColumns(objects="faces"))
