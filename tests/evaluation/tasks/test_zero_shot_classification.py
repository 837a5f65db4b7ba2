import json
from dataclasses import replace

import pytest

from cloc_mllm.data.commands import main as data_main
from cloc_mllm.data.scenes import generate_scenes
from cloc_mllm.evaluation.rows.files import read_references
from cloc_mllm.evaluation.run import evaluate
from cloc_mllm.evaluation.tasks.zero_shot_classification import ZeroShotClassification
from tests.evaluation.helpers import cloc_config, query_sets, record

PHOTOS = [
    record(f"p{i}", captions=[name], source="image-folder")
    for i, name in enumerate(["Golden  Fish", "crab", "golden fish"])
]


def test_images_are_classified_by_the_name_of_their_folder():
    (asked,) = query_sets(ZeroShotClassification(), PHOTOS)
    assert [row.labels for row in asked.references] == [["golden fish"], ["crab"], ["golden fish"]]
    assert asked.candidates.names == ["crab", "golden fish"]
    assert asked.candidates.kind == "class_names"
    assert asked.notes == {"classes": 2, "classes_that_occur": 2}


def test_class_names_of_a_file_that_do_not_occur_are_candidates_too(tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"n1": "Crab", "n2": "golden fish", "n3": "owl"}))
    (asked,) = query_sets(ZeroShotClassification(str(names)), PHOTOS)
    assert asked.candidates.names == ["crab", "golden fish", "owl"]
    assert {row.num_candidates for row in asked.references} == {3}
    assert asked.notes == {"classes": 3, "classes_that_occur": 2}
    names.write_text('{"n1": "crab"}')
    with pytest.raises(ValueError, match=r"names.json lacks the classes \['golden fish'\]"):
        query_sets(ZeroShotClassification(str(names)), PHOTOS)


def test_other_images_have_no_class():
    (asked,) = query_sets(ZeroShotClassification(), [record("p", captions=["a crab"])])
    assert asked.queries == []


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
    settings = cloc_config(
        cloc_dir, tmp_path, data=folder_records, tasks=["zero_shot_classification"]
    )
    metric = evaluate(settings).tasks["zero_shot_classification"].metrics["micro_acc"]
    assert metric.n == 6 and metric.chance == pytest.approx(1 / 3)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({f"class_{i}": f"class {i}" for i in range(20)}))
    named = replace(settings, tasks=[{"zero_shot_classification": {"class_names": str(names)}}])
    about = evaluate(replace(named, overwrite=True)).about
    assert about["tasks"]["zero_shot_classification"] == {"classes": 20, "classes_that_occur": 3}
    assert {row.num_candidates for row in read_references(tmp_path / "references.jsonl")} == {20}
    names.write_text('{"class_0": "class 0"}')
    with pytest.raises(ValueError, match=r"names.json lacks the classes \['class 1', 'class 2'\]"):
        evaluate(named)


def test_only_an_image_folder_has_classes(cloc_dir, tmp_path):
    settings = cloc_config(cloc_dir, tmp_path, limit=2, tasks=["zero_shot_classification"])
    with pytest.raises(ValueError, match="holds nothing to ask for zero_shot_classification"):
        evaluate(settings)
