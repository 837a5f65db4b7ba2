"""Label Studio's JSON: its results, its ways to name an image, several annotators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm.data.readers.label_studio import OTHER_RESULTS, PREDICTIONS, read_label_studio
from cloc_mllm.data.records import DropLog, Record

BOX = pytest.approx((0.1, 0.2, 0.3, 0.6))
PLACE = {"x": 10, "y": 20, "width": 20, "height": 40, "rotation": 0}
RECT = {**PLACE, "rectanglelabels": ["cat"]}


def result(value: Any, region: str = "r1", kind: str = "rectanglelabels", **more: Any) -> Any:
    size = {"original_width": 200, "original_height": 100, "image_rotation": 0}
    names = {"from_name": "label", "to_name": "image", "origin": "manual"}
    return {**size, **names, "value": value, "id": region, "type": kind, **more}


def task(*results: Any, image: str = "/data/upload/3/0a1b2c3d-a.png", **more: Any) -> Any:
    annotation = {"id": 1, "result": list(results), "was_cancelled": False, "ground_truth": False}
    return {"id": 7, "annotations": [annotation], "data": {"image": image}, **more}


def read(folder: Path, *tasks: Any, **options: Any) -> tuple[list[Record], DropLog]:
    Image.new("RGB", (200, 100), "green").save(folder / "a.png")
    (folder / "export.json").write_text(json.dumps(list(tasks)))
    log = DropLog()
    return list(read_label_studio(folder / "export.json", folder, drop_log=log, **options)), log


SHAPES: dict[str, tuple[Any, Any]] = {
    "rectangle": (result(RECT), BOX),
    # 60 x 20 pixels turned a quarter about their corner at 100, 10
    "turned": (
        result({**RECT, "x": 50, "y": 10, "width": 30, "height": 20, "rotation": 90}),
        pytest.approx((0.4, 0.1, 0.5, 0.7)),
    ),
    "polygon": (
        result({"points": [[10, 20], [30, 20], [30, 60]], "polygonlabels": ["cat"]}),
        BOX,
    ),
    "ellipse": (
        result({"x": 20, "y": 40, "radiusX": 10, "radiusY": 20, "ellipselabels": ["cat"]}),
        BOX,
    ),
    "labels_of_a_plain_rectangle": (result({**PLACE, "labels": ["cat"]}), BOX),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, tmp_path: Path) -> None:
    stated, expected = SHAPES[shape]
    (record,), log = read(tmp_path, task(stated))
    assert record.id == "7"
    assert [(r.phrase, r.category, r.box) for r in record.regions] == [("cat", "cat", expected)]
    assert log.counts == {}


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        (result({"format": "rle", "rle": [0, 1], "brushlabels": ["cat"]}), "brush_mask"),
        (result({"x": 10, "y": 20, "width": 0.5, "keypointlabels": ["cat"]}), "no_box"),
        (result({"vertices": [{"x": 1, "y": 2}], "vectorlabels": ["cat"]}), "no_box"),
        (result(RECT, image_rotation=90), "turned_view"),
        (result(PLACE), "empty_text"),
        (result({**RECT, "width": None}), "not_finite"),
        (result({"rectanglelabels": ["cat"]}), "not_finite"),
        (result({"points": "?", "polygonlabels": ["cat"]}), "not_finite"),
    ],
)
def test_what_is_not_read_is_counted(stated: Any, reason: str, tmp_path: Path) -> None:
    (record,), log = read(tmp_path, task(stated))
    assert record.regions == []
    assert log.counts == {"region": {reason: 1}}


def test_words_of_regions_and_of_the_image(tmp_path: Path) -> None:
    words = {**PLACE, "text": ["the left cat", "a sleeping cat"]}
    second = {**PLACE, "x": 50}
    (record,), log = read(
        tmp_path,
        task(
            result(RECT),
            result(words, kind="textarea", from_name="words"),
            result({**second, "text": ["a dog"]}, "r2", "textarea"),
            result(second, "r2", "rectangle"),
            {"type": "textarea", "value": {"text": ["Two animals."]}, "id": "c1"},
            {"type": "choices", "value": {"choices": ["indoor"]}, "id": "c2"},
            {"type": "relation", "from_id": "r1", "to_id": "r2"},
        ),
    )
    assert [(r.phrase, r.category, r.expressions) for r in record.regions] == [
        ("cat", "cat", ["the left cat", "a sleeping cat"]),
        ("a dog", "", ["a dog"]),
    ]
    assert record.captions == ["Two animals."]
    assert log.counts == {}
    assert log.notes[OTHER_RESULTS] == 2


def test_several_labels_of_one_shape(tmp_path: Path) -> None:
    (record,), _ = read(tmp_path, task(result({**PLACE, "rectanglelabels": ["cat", "pet"]})))
    assert [(r.phrase, r.box) for r in record.regions] == [("cat", BOX), ("pet", BOX)]


def test_several_annotators(tmp_path: Path) -> None:
    first, second, skipped, truth = (
        {"id": i, "result": [result({**PLACE, "rectanglelabels": [name]})]}
        for i, name in enumerate(["first", "second", "skipped", "truth"])
    )
    skipped["was_cancelled"] = True

    def names(annotations: list[Any], **options: Any) -> tuple[list[str], Any]:
        row = {**task(), "annotations": annotations, "predictions": [{"result": []}]}
        records, log = read(tmp_path, row, **options)
        assert log.notes[PREDICTIONS] == 1
        assert log.set_aside.get("record", {}) == ({} if records else {"skipped": 1})
        phrases = [region.phrase for record in records for region in record.regions]
        return phrases, log.set_aside.get("region", {})

    assert names([skipped, first, second]) == (["first"], {"skipped": 1, "other_annotation": 1})
    truth["ground_truth"] = True
    assert names([first, truth]) == (["truth"], {"other_annotation": 1})
    assert names([first, second], all_annotations=True) == (["first", "second"], {})
    assert names([skipped]) == ([], {"skipped": 1})


@pytest.mark.parametrize(
    "address",
    [
        "a.png",
        "/data/upload/3/0a1b2c3d-a.png",
        "/data/local-files/?d=photos/a.png",
        "http://localhost:8080/data/upload/3/0a1b2c3d-a.png?x=1",
        "s3://bucket/some/a.png",
        "https://host/some%20folder/a.png",
    ],
)
@pytest.mark.parametrize("key", ["image", "picture"])
def test_names_of_images(address: str, key: str, tmp_path: Path) -> None:
    row = {**task(result(RECT)), "data": {key: address, "text": "a note", "number": 3}}
    (record,), _ = read(tmp_path, row)
    assert len(record.regions) == 1


def test_the_key_of_the_image(tmp_path: Path) -> None:
    row = {**task(result(RECT)), "data": {"left": "a.png", "right": "b.png"}}
    _, log = read(tmp_path, row)
    assert log.counts == {"record": {"bad_row": 1}, "region": {"bad_row": 1}}
    (record,), _ = read(tmp_path, row, image_key="left")
    assert len(record.regions) == 1


def test_completions_of_old_versions(tmp_path: Path) -> None:
    row = {"id": 1, "completions": [{"result": [result(RECT)]}], "data": {"image": "a.png"}}
    (record,), _ = read(tmp_path, row)
    assert len(record.regions) == 1


def test_json_min(tmp_path: Path) -> None:
    shape = {**RECT, "original_width": 200, "original_height": 100}
    row = {"image": "a.png", "id": 4, "label": [shape], "choice": "indoor", "annotator": 1}
    (record,), _ = read(tmp_path, row)
    assert (record.id, [(r.phrase, r.box) for r in record.regions]) == ("4", [("cat", BOX)])


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"x.json: expected a JSON list of tasks"):
        list(read_label_studio(tmp_path / "x.json", tmp_path, drop_log=DropLog()))
