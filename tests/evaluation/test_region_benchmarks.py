"""The job with annotation files, class names and declared benchmarks, on tiny models."""

import json
from dataclasses import replace

import pytest
from cloc_mllm.evaluation.region_benchmarks import (
    DECLARED,
    Declared,
    account_lines,
    check_declared,
    declared_benchmark,
)

from cloc_mllm.data.commands import main as data_main
from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import Record, Region
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.config import EvalConfig
from cloc_mllm.evaluation.queries import build_benchmark
from cloc_mllm.evaluation.rows.rows import read_predictions, read_references
from cloc_mllm.evaluation.run import evaluate
from tests.tiny_mllm import cloc_dir

__all__ = ["cloc_dir"]
pytest.importorskip("pycocotools")


def config(cloc_dir, out, **settings):
    base = EvalConfig(
        cloc=str(cloc_dir),
        mllm="none",
        output_dir=str(out),
        device="cpu",
        bootstrap_samples=5,
        num_examples=1,
    )
    return replace(
        base,
        **{
            key: value if isinstance(value, list) else str(value) for key, value in settings.items()
        },
    )


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
    settings = config(
        cloc_dir,
        tmp_path,
        data=directory / "records",
        annotations=directory / "lvis.json",
        tasks=["true_boxes"],
        templates="small",
    )
    metrics = evaluate(settings)
    features = ["cloc", "roi_align", "crop", "mask"]
    assert list(metrics["tasks"]) == [f"true_box_{name}" for name in features]
    for entries in metrics["tasks"].values():
        assert entries["micro_acc"]["n"] == count - 1
        assert entries["micro_acc"]["chance"] == 1 / 4
        bands = [entries[f"micro_acc/{band}"]["n"] for band in ("common", "frequent", "rare")]
        assert sum(bands) == count - 1
    assert metrics["about"]["true_boxes"] == {
        "boxes": count - 1,
        "dropped": {"crowd": 1},
        "classes": 4,
        "classes_that_occur": 3,
        "mask_pooling": {"box": count - 1},
    }
    assert account_lines(metrics["about"]) == [
        f"true_boxes: {count - 1} boxes; dropped: crowd 1; 4 classes; 3 classes that occur; "
        f"mask pooling: box {count - 1}"
    ]
    assert metrics["about"]["skipped_tasks"] == []
    rows = read_predictions(tmp_path / "predictions.jsonl")
    assert {row.settings["templates"] for row in rows} == {"small"}


def test_true_boxes_of_records_with_categories_stand_beside_other_tasks(cloc_dir, tmp_path):
    settings = config(cloc_dir, tmp_path, tasks=["true_box_crop", "region_classification"])
    metrics = evaluate(replace(settings, limit=2))
    crop, own = (metrics["tasks"][task] for task in ("true_box_crop", "region_classification"))
    assert crop["micro_acc"]["n"] == own["micro_acc"]["n"] > 2
    assert crop["micro_acc"]["chance"] == own["micro_acc"]["chance"]


def test_phrases_are_grounded(cloc_dir, tmp_path, lvis):
    for folder in ("Annotations", "Sentences"):
        (tmp_path / folder).mkdir()
    for photo in "01":
        (tmp_path / "Sentences" / f"{photo}.txt").write_text("[/EN#1/people A man] runs .\n")
        (tmp_path / "Annotations" / f"{photo}.xml").write_text(
            "<a><size><width>10</width><height>10</height></size><object><name>1</name><bndbox>"
            "<xmin>0</xmin><ymin>0</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></a>"
        )
    settings = config(
        cloc_dir, tmp_path / "out", data=lvis[0] / "records", tasks=["phrase_grounding"]
    )
    metrics = evaluate(replace(settings, annotations=str(tmp_path)))
    entries = metrics["tasks"]["phrase_grounding"]
    assert entries["r_at_1"]["n"] == entries["r_at_1/people"]["n"] == 2
    with pytest.raises(ValueError, match=r"needs --annotations: .* got 'nothing'"):
        evaluate(settings)
    with pytest.raises(ValueError, match=r"got 'lvis\.json'"):
        evaluate(replace(settings, annotations="lvis.json"))


@pytest.fixture(scope="module")
def folder_records(tmp_path_factory):
    """6 images in 3 folders, built by the command."""
    directory = tmp_path_factory.mktemp("folder")
    for index, scene in enumerate(generate_scenes(6, split="test", long_side=64)):
        folder = directory / "images" / f"class_{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        scene.load_image().save(folder / f"{index}.png")
    out = str(directory / "records")
    data_main(["build", "image-folder", "--images", str(directory / "images"), "--out", out])
    return out


def test_zero_shot_classification(folder_records, cloc_dir, tmp_path):
    settings = config(cloc_dir, tmp_path, data=folder_records, tasks=["zero_shot_classification"])
    metrics = evaluate(settings)
    entries = metrics["tasks"]["zero_shot_classification"]
    assert entries["micro_acc"]["n"] == 6 and entries["micro_acc"]["chance"] == pytest.approx(1 / 3)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({f"class_{i}": f"class {i}" for i in range(20)}))
    metrics = evaluate(replace(settings, class_names=str(names)))
    assert metrics["about"]["zero_shot_classification"] == {"classes": 20, "classes_that_occur": 3}
    assert {row.num_candidates for row in read_references(tmp_path / "references.jsonl")} == {20}
    names.write_text('{"class_0": "class 0"}')
    with pytest.raises(ValueError, match=r"names.json lacks the classes \['class 1', 'class 2'\]"):
        evaluate(replace(settings, class_names=str(names)))


def test_only_an_image_folder_has_classes(lvis, cloc_dir, tmp_path):
    settings = config(
        cloc_dir, tmp_path, data=lvis[0] / "records", tasks=["zero_shot_classification"]
    )
    with pytest.raises(ValueError, match="holds nothing to ask for zero_shot_classification"):
        evaluate(settings)


def photos(num, num_captions):
    captions = [f"caption {k}" for k in range(num_captions)]
    return [
        Record(f"p{i}", b"", 9, 9, captions, [Region((0, 0, 1, 1), "x")], "s") for i in range(num)
    ]


def test_a_declared_benchmark_takes_the_first_captions():
    bench = build_benchmark(photos(2, 7), ["image_text_retrieval"], captions_per_image=5)
    assert bench.captions == [f"caption {k}" for k in range(5)]
    assert len(bench.of_task("text_to_image")) == 10


@pytest.mark.parametrize(
    ("declared", "num", "message"),
    [
        (Declared(3), 2, "benchmark 'b' has 3 images, this data has 2; build the records"),
        (Declared(2, captions_per_image=5), 2, "has 5 captions an image, record 'p0' has 4"),
        (Declared(2, num_classes=80), 2, "has 80 class names, this data has 0"),
    ],
)
def test_a_part_of_a_declared_benchmark_is_refused(declared, num, message):
    records = photos(num, 4)
    with pytest.raises(ValueError, match=message):
        check_declared("b", declared, records, build_benchmark(records, ["image_text_retrieval"]))


def test_the_whole_of_a_declared_benchmark_passes():
    records = photos(2, 5)
    check_declared("b", Declared(2, 5), records, build_benchmark(records, ["text_to_box"]))


def test_benchmarks_are_declared_by_name(cloc_dir, tmp_path):
    assert declared_benchmark("") is None
    assert declared_benchmark("coco_5k") == Declared(5000, captions_per_image=5)
    assert DECLARED["lvis_v1_val_boxes"].num_classes == 1203
    settings = config(cloc_dir, tmp_path, tasks=["text_to_box"])
    with pytest.raises(ValueError, match="unknown benchmark 'coco'; expected one of: coco_5k, "):
        evaluate(replace(settings, benchmark="coco"))
    with pytest.raises(ValueError, match="'grit_2k' has 2,000 images, this data has 2;"):
        evaluate(replace(settings, benchmark="grit_2k", limit=2))


def test_real_coco_photos(shared_data, cloc_dir, tmp_path):
    folder = shared_data / "formats"
    instances = folder / "coco_mini_instances_val2017.json"
    arguments = ["--instances", str(instances), "--max-drop-share", "1"]
    arguments += ["--images", str(folder / "coco_mini_images_val2017_24.tar")]
    data_main(["build", "coco", *arguments, "--out", str(tmp_path / "records")])
    settings = config(
        cloc_dir,
        tmp_path / "out",
        data=tmp_path / "records",
        annotations=instances,
        tasks=["true_boxes"],
    )
    about = evaluate(settings)["about"]["true_boxes"]
    assert about == {
        "boxes": 183,
        "dropped": {"no_record": 440, "crowd": 1},
        "classes": 80,
        "classes_that_occur": 46,
        "mask_pooling": {"segmentation": 183},
    }
