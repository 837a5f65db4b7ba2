from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.data.readers.coco import read_coco
from cloc_mllm.data.records import DropLog, Record


def make_instances() -> dict[str, Any]:
    return {
        "images": [{"id": 5, "file_name": "train/5.jpg", "width": 100, "height": 50}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "traffic light"}],
        "annotations": [
            {"id": 10, "image_id": 5, "category_id": 2, "bbox": [10, 10, 20, 20], "iscrowd": 0},
            {"id": 11, "image_id": 5, "category_id": 1, "bbox": [0, 0, 90, 50], "iscrowd": 1},
        ],
    }


def read(
    folder: Path, instances: Any, captions: Any = None, **options: Any
) -> tuple[list[Record], DropLog]:
    Image.new("RGB", (100, 50), "green").save(folder / "5.jpg")
    (folder / "instances.json").write_text(json.dumps(instances))
    if captions is not None:
        (folder / "captions.json").write_text(json.dumps({"annotations": captions}))
        options["captions"] = folder / "captions.json"
    log = DropLog()
    return list(read_coco(folder / "instances.json", folder, drop_log=log, **options)), log


def test_one_image(tmp_path: Path) -> None:
    captions = [{"id": 1, "image_id": 5, "caption": "A cat.\n"}]
    (record,), log = read(tmp_path, make_instances(), captions)
    assert (record.id, record.width, record.height) == ("5", 100, 50)
    assert record.captions == ["A cat."]
    (region,) = record.regions
    assert region.box == pytest.approx((0.1, 0.2, 0.3, 0.6))
    assert (region.phrase, region.category) == ("traffic light", "traffic light")
    assert log.counts == {}
    assert log.set_aside == {"region": {"crowd": 1}}


def test_crowds_are_kept_when_asked_for(tmp_path: Path) -> None:
    (record,), log = read(tmp_path, make_instances(), keep_crowd=True)
    assert [region.phrase for region in record.regions] == ["traffic light", "cat"]
    assert (log.counts, log.set_aside) == ({}, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"bbox": [10, 10, 0, 20]}, "zero_area", id="zero_area"),
        pytest.param({"bbox": [50, 10, -20, 20]}, "inverted", id="inverted"),
        pytest.param({"bbox": [200, 10, 20, 20]}, "outside", id="outside"),
        pytest.param({"bbox": [float("nan"), 10, 20, 20]}, "not_finite", id="nan"),
        pytest.param({"bbox": [10, 10, float("inf"), 20]}, "not_finite", id="infinite"),
        pytest.param({"bbox": None}, "not_finite", id="null"),
        pytest.param({"category_id": 77}, "unknown_category", id="unknown_category"),
        pytest.param({"category_id": [1]}, "unknown_category", id="category_no_number"),
        pytest.param({"image_id": 6}, "unknown_image", id="unknown_image"),
        pytest.param({"image_id": "05"}, "unknown_image", id="image_id_of_another_spelling"),
    ],
)
def test_bad_annotation_is_dropped(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    instances = make_instances()
    instances["annotations"][1] = {**instances["annotations"][0], "id": 12, **change}
    (record,), log = read(tmp_path, instances)
    assert len(record.regions) == 1
    assert log.counts == {"region": {reason: 1}}


def test_missing_file_drops_the_image_with_its_parts(tmp_path: Path) -> None:
    instances = make_instances()
    instances["images"][0]["file_name"] = "6.jpg"
    captions = [{"image_id": 5, "caption": "A cat."}, {"image_id": 9, "caption": "A dog."}]
    records, log = read(tmp_path, instances, captions)
    assert records == []
    assert log.counts == {
        "record": {"missing_image": 1},
        "region": {"missing_image": 1},
        "caption": {"missing_image": 1, "unknown_image": 1},
    }


def test_image_listed_twice_is_delivered_once(tmp_path: Path) -> None:
    instances = make_instances()
    instances["images"] *= 2
    (record,), log = read(tmp_path, instances)
    assert len(record.regions) == 1
    assert log.counts == {"record": {"duplicate_id": 1}}
    assert log.set_aside == {"region": {"crowd": 1}}


@pytest.mark.parametrize("image_id", [None, ""])
def test_image_without_id_is_dropped(tmp_path: Path, image_id: Any) -> None:
    instances = {**make_instances(), "annotations": []}
    instances["images"][0]["id"] = image_id
    records, log = read(tmp_path, instances)
    assert records == []
    assert log.counts == {"record": {"missing_id": 1}}


@pytest.mark.parametrize("table", [[], {"images": []}, {**make_instances(), "annotations": [3]}])
def test_other_json_is_refused(tmp_path: Path, table: Any) -> None:
    with pytest.raises(ValueError, match=r"instances.json: expected a COCO object"):
        read(tmp_path, table)


def test_real_photos(shared_data: Path) -> None:
    folder = shared_data / "formats"
    log = DropLog()
    records = list(
        read_coco(
            folder / "coco_mini_instances_val2017.json",
            folder / "coco_mini_images_val2017_24.tar",
            captions=folder / "coco_mini_captions_val2017.json",
            drop_log=log,
        )
    )
    assert len(records) == 24
    assert log.counts["record"] == {"missing_image": 55}
    assert log.set_aside == {"region": {"crowd": 5}}
    assert log.delivered["region"] + log.num_dropped("region") + 5 == 624
    assert log.delivered["caption"] + log.num_dropped("caption") == 395


def test_lvis_names_photos_by_url_and_classes_with_underscores(tmp_path: Path) -> None:
    instances = make_instances()
    instances["images"][0] = {
        **instances["images"][0],
        "file_name": "COCO_val2014_5.jpg",
        "coco_url": "http://images.cocodataset.org/val2017/5.jpg",
    }
    instances["categories"] = [
        {"id": 1, "name": "bow_(weapon)", "frequency": "r"},
        {"id": 2, "name": "aerosol_can", "frequency": "c"},
    ]
    (record,), _ = read(tmp_path, instances)
    assert record.source == "lvis"
    assert [region.phrase for region in record.regions] == ["aerosol can"]
    instances["images"][0]["coco_url"] = ""
    assert read(tmp_path, instances)[1].counts["record"] == {"missing_image": 1}


def test_only_asked_ids_are_read(tmp_path: Path) -> None:
    records, log = read(tmp_path, make_instances(), ids={"6"})
    assert records == [] and log.counts == {}
    assert log.set_aside == {"record": {"not_asked": 1}, "region": {"not_asked": 2}}
    assert len(read(tmp_path, make_instances(), ids={"5"})[0]) == 1


def test_real_lvis_annotations(shared_data: Path) -> None:
    folder = shared_data / "formats"
    images = folder / "coco_mini_images_val2017_24.tar"
    log = DropLog()
    (record,) = read_coco(folder / "lvis_val_100.json", images, drop_log=log)
    assert record.id == "11813"
    assert log.counts["record"] == {"missing_image": 99}
    assert log.delivered["region"] + log.num_dropped("region") == 977


def test_scores_of_predictions_are_kept(tmp_path: Path) -> None:
    """FiftyOne and Datumaro write `score` beside the box."""
    instances = make_instances()
    first = instances["annotations"][0]
    instances["annotations"] = [{**first, "score": score} for score in (0.25, "0.5", None, "?")]
    (record,), log = read(tmp_path, instances)
    assert [region.score for region in record.regions] == [0.25, 0.5, 1.0]
    assert log.counts == {"region": {"bad_score": 1}}


def test_a_turned_box_of_cvat_is_enclosed(tmp_path: Path) -> None:
    instances = make_instances()
    first = {**instances["annotations"][0], "bbox": [40, 20, 20, 10], "segmentation": []}
    instances["annotations"] = [{**first, "attributes": {"occluded": False, "rotation": 90.0}}]
    (record,), _ = read(tmp_path, instances)
    assert record.regions[0].box == pytest.approx((0.45, 0.3, 0.55, 0.7))


def test_a_mask_of_cvat_is_a_crowd_unless_kept(tmp_path: Path) -> None:
    """CVAT exports each mask with `iscrowd` 1."""
    instances = make_instances()
    mask = {"size": [50, 100], "counts": [510, 10, 40, 10, 4430]}
    row = {**instances["annotations"][1], "segmentation": mask, "bbox": [10, 10, 2, 10]}
    instances["annotations"] = [row]
    assert read(tmp_path, instances)[1].set_aside == {"region": {"crowd": 1}}
    (record,), _ = read(tmp_path, instances, keep_crowd=True)
    assert record.regions[0].box == pytest.approx((0.1, 0.2, 0.12, 0.4))
