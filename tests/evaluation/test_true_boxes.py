"""What is asked of a COCO or LVIS file, and that nothing of it is lost."""

import json

import pytest
from cloc_mllm.evaluation.true_boxes import (
    BoxRules,
    read_true_boxes,
    true_box_queries,
    true_boxes_of,
)

from cloc_mllm.data.records import Record, Region
from cloc_mllm.evaluation.queries import build_benchmark


def annotation(number, category_id=1, bbox=(10, 10, 20, 20), image_id=5, **more):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(bbox),
        **more,
    }


def make_table(*annotations):
    return {
        "images": [{"id": 5, "width": 100, "height": 50}, {"id": 6, "width": 9, "height": 9}],
        "categories": [
            {"id": 1, "name": "Aerosol_can", "frequency": "f"},
            {"id": 2, "name": "bow_(weapon)", "frequency": "r"},
            {"id": 3, "name": "clock", "frequency": "c"},
        ],
        "annotations": list(annotations),
    }


def read(tmp_path, table, rules=None, image_ids=("5",)):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(table))
    return read_true_boxes(path, image_ids, rules)


def test_names_and_bands_are_of_the_whole_file(tmp_path):
    boxes = read(tmp_path, make_table(annotation(7, 2, segmentation=[[1, 2]])))
    assert boxes.class_names == ["aerosol can", "bow (weapon)", "clock"]
    assert boxes.band_of == {"aerosol can": "frequent", "bow (weapon)": "rare", "clock": "common"}
    (item,) = boxes.items
    assert (item.id, item.image_id, item.class_name) == ("5#7", "5", "bow (weapon)")
    assert item.box == pytest.approx((0.1, 0.2, 0.3, 0.6))
    assert (item.segmentation, item.image_hw) == ([[1, 2]], (50, 100))
    (query, reference), *rest = true_box_queries(boxes, "true_box_crop")
    assert not rest and query.id == reference.id == "true_box_crop/5#7"
    assert query.box == reference.boxes[0] == item.box
    assert (reference.labels, reference.kind, reference.num_candidates) == (
        ["bow (weapon)"],
        "rare",
        3,
    )


def test_two_annotations_of_one_box_are_two_questions(tmp_path):
    boxes = read(tmp_path, make_table(annotation(1, 1), annotation(2, 3)))
    assert [item.class_name for item in boxes.items] == ["aerosol can", "clock"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"category_id": 9}, "unknown_category"),
        ({"image_id": 8}, "unknown_image"),
        ({"image_id": 6}, "no_record"),
        ({"iscrowd": 1}, "crowd"),
        ({"bbox": None}, "not_finite"),
        ({"bbox": [1, 1, 0, 5]}, "zero_area"),
        ({"bbox": [9, 9, -5, 5]}, "inverted"),
        ({"bbox": [200, 1, 5, 5]}, "outside"),
        ({"bbox": [1, 1, 0.5, 9]}, "too_small"),
    ],
)
def test_what_is_not_asked_is_counted(tmp_path, change, reason):
    table = make_table(annotation(1), {**annotation(2), **change})
    boxes = read(tmp_path, table)
    assert [item.id for item in boxes.items] == ["5#1"]
    assert boxes.account() == {
        "boxes": 1,
        "dropped": {reason: 1},
        "classes": 3,
        "classes_that_occur": 1,
    }


def test_rules_are_settings(tmp_path):
    table = make_table(annotation(1, iscrowd=1), annotation(2, bbox=[0, 0, 8, 7.9]), annotation(3))
    kept = {
        rules: [item.id for item in read(tmp_path, table, rules).items]
        for rules in (BoxRules(), BoxRules(keep_crowd=True), BoxRules(min_side_px=8))
    }
    assert list(kept.values()) == [["5#2", "5#3"], ["5#1", "5#2", "5#3"], ["5#3"]]


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no box to ask on these records \(not used: {'no_re"):
        read(tmp_path, make_table(annotation(1)), image_ids=["other"])
    table = make_table(annotation(1))
    table["categories"][2]["name"] = "aerosol can"
    with pytest.raises(ValueError, match=r"different names, got \['aerosol can'\]"):
        read(tmp_path, table)
    with pytest.raises(ValueError, match="expected a COCO object with a list of objects 'images'"):
        read(tmp_path, {})


def test_records_alone_give_their_categories():
    regions = [Region((0, 0, 0.5, 1), "a dog", category="dog"), Region((0, 0, 1, 1), "a man")]
    bench = build_benchmark([Record("p", b"", 9, 9, [], regions, "photos")], ["true_boxes"])
    boxes = true_boxes_of(bench)
    assert bench.queries == []
    assert [(item.image_id, item.class_name) for item in boxes.items] == [("p", "dog")]
    assert boxes.class_names == ["dog"] and boxes.band_of == {}


def test_real_files(shared_data):
    folder = shared_data / "formats"
    coco = folder / "coco_mini_instances_val2017.json"
    table = json.loads(coco.read_text())
    boxes = read_true_boxes(coco, [str(image["id"]) for image in table["images"]])
    assert (len(boxes.class_names), boxes.dropped["crowd"]) == (80, 5)
    assert len(boxes.items) + boxes.dropped.total() == len(table["annotations"]) == 624
    lvis = folder / "lvis_val_100.json"
    table = json.loads(lvis.read_text())
    boxes = read_true_boxes(lvis, [str(image["id"]) for image in table["images"]])
    assert set(boxes.band_of.values()) == {"frequent", "common", "rare"}
    assert len(boxes.class_names) == len(boxes.band_of) == len(table["categories"])
    assert len(boxes.items) + boxes.dropped.total() == 977
