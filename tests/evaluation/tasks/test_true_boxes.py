"""The queries about a COCO or LVIS file, and that none of its boxes is lost."""

import json
from dataclasses import replace

import pytest

from cloc_mllm.data.commands import main as data_main
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import Region
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.report.table import note_texts
from cloc_mllm.evaluation.rows.files import read_predictions
from cloc_mllm.evaluation.run import evaluate
from cloc_mllm.evaluation.tasks.true_boxes import TrueBoxes
from tests.evaluation.helpers import cloc_config, query_sets, record

pytest.importorskip("pycocotools")


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


def read(tmp_path, table, image_ids=("5",), **options):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(table))
    return TrueBoxes(**options).read_annotations(path, image_ids)


def test_names_and_bands_are_of_the_whole_file(tmp_path):
    boxes = read(tmp_path, make_table(annotation(7, 2, segmentation=[[1, 2]])))
    assert boxes.class_names == ["aerosol can", "bow (weapon)", "clock"]
    assert boxes.band_of_class == {
        "aerosol can": "frequent",
        "bow (weapon)": "rare",
        "clock": "common",
    }
    ((item, class_name),) = boxes.boxes
    assert (item.id, item.image_id, class_name) == ("5#7", "5", "bow (weapon)")
    assert item.boxes[0] == pytest.approx((0.1, 0.2, 0.3, 0.6))
    assert (item.segmentation, item.image_hw) == ([[1, 2]], (50, 100))
    task = TrueBoxes(["crop"], annotations=str(tmp_path / "instances.json"))
    (asked,) = query_sets(task, [record("5")])
    (query,), (reference,) = asked.queries, asked.references
    assert query.id == reference.id == "true_box_crop/5#7"
    assert query.boxes[0] == reference.boxes[0] == item.boxes[0]
    assert (query.segmentation, query.image_hw) == (item.segmentation, item.image_hw)
    assert asked.region_features == "crop" and asked.candidates.kind == "class_names"
    assert asked.candidates.names == boxes.class_names
    assert (reference.labels, reference.kind, reference.num_candidates) == (
        ["bow (weapon)"],
        "rare",
        3,
    )


def test_two_annotations_of_one_box_are_two_questions(tmp_path):
    boxes = read(tmp_path, make_table(annotation(1, 1), annotation(2, 3)))
    assert [name for _, name in boxes.boxes] == ["aerosol can", "clock"]


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
    assert [query.id for query, _ in boxes.boxes] == ["5#1"]
    assert boxes.notes() == {
        "boxes": 1,
        "dropped": {reason: 1},
        "classes": 3,
        "classes_that_occur": 1,
    }


def test_rules_are_settings(tmp_path):
    table = make_table(annotation(1, iscrowd=1), annotation(2, bbox=[0, 0, 8, 7.9]), annotation(3))
    kept = [
        [query.id for query, _ in read(tmp_path, table, **options).boxes]
        for options in ({}, {"keep_crowd": True}, {"min_box_side_px": 8})
    ]
    assert kept == [["5#2", "5#3"], ["5#1", "5#2", "5#3"], ["5#3"]]


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
    asked = query_sets(TrueBoxes(), [record("p", regions)])
    assert [query_set.task for query_set in asked] == [
        "true_box_cloc",
        "true_box_roi_align",
        "true_box_crop",
        "true_box_mask",
    ]
    for query_set in asked:
        assert [(q.image_id, q.boxes) for q in query_set.queries] == [("p", ((0, 0, 0.5, 1),))]
        assert [(row.labels, row.kind) for row in query_set.references] == [(["dog"], "")]
        assert query_set.candidates.names == ["dog"]


def test_real_files(shared_data):
    folder = shared_data / "formats"
    coco = folder / "coco_mini_instances_val2017.json"
    table = json.loads(coco.read_text())
    boxes = TrueBoxes().read_annotations(coco, [str(image["id"]) for image in table["images"]])
    assert (len(boxes.class_names), boxes.dropped["crowd"]) == (80, 5)
    assert len(boxes.boxes) + boxes.dropped.total() == len(table["annotations"]) == 624
    lvis = folder / "lvis_val_100.json"
    table = json.loads(lvis.read_text())
    boxes = TrueBoxes().read_annotations(lvis, [str(image["id"]) for image in table["images"]])
    assert set(boxes.band_of_class.values()) == {"frequent", "common", "rare"}
    assert len(boxes.class_names) == len(boxes.band_of_class) == len(table["categories"])
    assert len(boxes.boxes) + boxes.dropped.total() == 977


@pytest.fixture(scope="module")
def lvis(tmp_path_factory):
    """Records and annotations of two scenes, with classes in three bands and one crowd."""
    directory = tmp_path_factory.mktemp("lvis")
    scenes = list(generate_scenes(2, split="test", long_side=64))
    images, annotations = [], []
    for number, scene in enumerate(scenes):
        scene.id = str(number)
        images.append({"id": number, "width": scene.width, "height": scene.height})
        for region in scene.regions:
            x1, y1, x2, y2 = region.box
            bbox = [x1 * scene.width, y1 * scene.height]
            bbox += [(x2 - x1) * scene.width, (y2 - y1) * scene.height]
            k = len(annotations)
            annotations.append(
                {"id": k, "image_id": number, "category_id": k % 3, "bbox": bbox, "iscrowd": 0}
            )
    annotations[0]["iscrowd"] = 1
    categories = [
        {"id": i, "name": name, "frequency": band}
        for i, (name, band) in enumerate([("a_b", "f"), ("c", "c"), ("d", "r"), ("e", "r")])
    ]
    write_records(scenes, directory / "records")
    table = {"images": images, "annotations": annotations, "categories": categories}
    (directory / "lvis.json").write_text(json.dumps(table))
    return directory, len(annotations)


def test_true_boxes_give_a_row_for_each_region_feature(lvis, cloc_dir, tmp_path):
    directory, count = lvis
    settings = cloc_config(
        cloc_dir,
        tmp_path,
        data=str(directory / "records"),
        tasks=[{"true_boxes": {"annotations": str(directory / "lvis.json")}}],
        templates="small",
    )
    evaluation = evaluate(settings)
    features = ["cloc", "roi_align", "crop", "mask"]
    assert list(evaluation.tasks) == [f"true_box_{name}" for name in features]
    for entry in evaluation.tasks.values():
        metrics = entry.metrics
        assert metrics["micro_acc"].n == count - 1
        assert metrics["micro_acc"].chance == 1 / 4
        bands = [metrics[f"micro_acc/{band}"].n for band in ("common", "frequent", "rare")]
        assert sum(bands) == count - 1
    notes = {
        "boxes": count - 1,
        "dropped": {"crowd": 1},
        "classes": 4,
        "classes_that_occur": 3,
    }
    assert evaluation.about["tasks"] == {
        "true_box_cloc": notes,
        "true_box_roi_align": notes,
        "true_box_crop": notes,
        "true_box_mask": {**notes, "mask_pooling": {"box": count - 1}},
    }
    line = f"{count - 1} boxes; dropped: crowd 1; 4 classes; 3 classes that occur"
    assert note_texts(evaluation.about) == {
        **{f"true_box_{name}": line for name in features[:3]},
        "true_box_mask": f"{line}; mask pooling: box {count - 1}",
    }
    assert evaluation.about["skipped_tasks"] == []
    rows = read_predictions(tmp_path / "predictions.jsonl")
    assert {row.settings["templates"] for row in rows} == {"small"}


def test_true_boxes_of_records_with_categories_stand_beside_other_tasks(cloc_dir, tmp_path):
    tasks = [{"true_boxes": {"features": ["crop"]}}, "region_classification"]
    settings = cloc_config(cloc_dir, tmp_path, tasks=tasks)
    tasks = evaluate(replace(settings, limit=2)).tasks
    assert list(tasks) == ["true_box_crop", "region_classification"]
    crop, own = (entry.metrics["micro_acc"] for entry in tasks.values())
    assert crop.n == own.n > 2
    assert crop.chance == own.chance


def test_real_coco_photos(shared_data, cloc_dir, tmp_path):
    folder = shared_data / "formats"
    instances = folder / "coco_mini_instances_val2017.json"
    arguments = ["--instances", str(instances), "--max_drop_share", "1"]
    arguments += ["--images", str(folder / "coco_mini_images_val2017_24.tar")]
    data_main(["build", "coco", *arguments, "--out", str(tmp_path / "records")])
    settings = cloc_config(
        cloc_dir,
        tmp_path / "out",
        data=str(tmp_path / "records"),
        tasks=[{"true_boxes": {"annotations": str(instances)}}],
    )
    assert evaluate(settings).about["tasks"]["true_box_mask"] == {
        "boxes": 183,
        "dropped": {"no_record": 440, "crowd": 1},
        "classes": 80,
        "classes_that_occur": 46,
        "mask_pooling": {"segmentation": 183},
    }
