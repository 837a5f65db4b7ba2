"""YOLO folders as Ultralytics, Roboflow, CVAT and Label Studio lay them out."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.data.readers.photos import OTHER_FILES
from cloc_mllm.data.readers.yolo import read_yolo
from cloc_mllm.data.records import DropLog, Record

ROW = "0 0.25 0.5 0.3 0.4\n"
BOX = pytest.approx((0.1, 0.3, 0.4, 0.7))
POSE = "0 0.25 0.5 0.3 0.4 0.15 0.40 0.25 0.50 0.35 0.60\n"
POLYGON = "0 0.1 0.3 0.4 0.3 0.4 0.7 0.1 0.7\n"


def put(folder: Path, **files: str) -> None:
    """Writes `a__b_dot_png="red"` as a red picture `a/b.png`, and texts as they are."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg", ".bmp"):
            Image.new("RGB", (200, 100), content).save(path)
        else:
            path.write_text(content)


def read(
    folder: Path,
    images: str | None = None,
    labels: str | None = None,
    names: str = "data.yaml",
    **options: object,
) -> tuple[list[Record], DropLog]:
    log = DropLog()
    paths = [None if part is None else folder / part for part in (images, labels)]
    return list(read_yolo(*paths, folder / names, drop_log=log, **options)), log


def test_ultralytics_tree(tmp_path: Path) -> None:
    """images/train and labels/train, named by the YAML or given; equal names in two splits."""
    put(
        tmp_path,
        ds__images__train__0001_dot_png="red",
        ds__images__val__0001_dot_png="blue",
        ds__images__val__0002_dot_png="green",
        ds__labels__train__0001_dot_txt=ROW,
        ds__labels__val__0001_dot_txt="1 0.5 0.5 0.2 0.2\n",
        ds__data_dot_yaml="path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n",
    )
    folder = tmp_path / "ds"
    given = [(None, None), ("images", "labels"), ("images", None), (".", ".")]
    for images, labels in given:
        records, log = read(folder, images, labels)
        prefix = "images/" if images == "." else ""
        assert [record.id for record in records] == [
            f"{prefix}{name}" for name in ("train/0001", "val/0001", "val/0002")
        ]
        phrases = [[region.phrase for region in record.regions] for record in records]
        assert phrases == [["cat"], ["dog"], []]
        assert log.counts == {}
        assert log.examples["images without a label file"] == [f"{prefix}val/0002.png"]
    records, _ = read(folder, split="val")
    assert [(r.id, len(r.regions)) for r in records] == [("0001", 1), ("0002", 0)]
    records, _ = read(folder, "images/train", "labels")
    assert [(r.id, [region.phrase for region in r.regions]) for r in records] == [("0001", ["cat"])]


@pytest.mark.parametrize(
    "stated",
    [
        "train: ../train/images\nval: ../valid/images",  # as Roboflow writes it
        "train: train/images\nval: valid/images",
        "path: /content/somewhere/else\ntrain: train/images\nval: valid/images",
        "train: [train/images, valid/images]",
    ],
)
def test_roboflow_tree(stated: str, tmp_path: Path) -> None:
    put(
        tmp_path,
        train__images__a_dot_jpg="red",
        train__labels__a_dot_txt=ROW,
        valid__images__a_dot_jpg="blue",
        valid__labels__a_dot_txt=POLYGON,
        data_dot_yaml=f"{stated}\nnc: 1\nnames: ['cat']\n",
    )
    records, log = read(tmp_path)
    assert [record.id for record in records] == ["train/images/a", "valid/images/a"]
    assert [record.regions[0].box for record in records] == [BOX, BOX]
    assert log.counts == {}


def test_labels_beside_images_and_lists(tmp_path: Path) -> None:
    """CVAT's obj_train_data, LabelImg's classes.txt, a train.txt of paths."""
    put(
        tmp_path,
        data__a_dot_jpg="red",
        data__a_dot_txt=ROW,
        data__classes_dot_txt="cat\ndog\n",
        data__train_dot_txt="data/a.jpg\n",
        data__film_dot_mp4="?",
    )
    (record,), log = read(tmp_path, "data", None, "data/classes.txt")
    assert [region.phrase for region in record.regions] == ["cat"]
    assert log.counts == {}
    assert log.examples == {
        OTHER_FILES: ["film.mp4"],
        "text files that are no labels": ["train.txt"],
    }


def test_a_label_of_another_folder_is_not_taken(tmp_path: Path) -> None:
    put(
        tmp_path,
        images__train__a_dot_png="red",
        images__val__a_dot_png="blue",
        labels__train__a_dot_txt=ROW,
        data_dot_yaml="names: [cat]",
    )
    records, log = read(tmp_path, "images", "labels")
    assert [len(record.regions) for record in records] == [1, 0]
    (tmp_path / "images" / "train" / "a.png").unlink()
    (record,), log = read(tmp_path, "images", "labels")
    assert record.regions == []
    assert log.counts == {"region": {"unknown_image": 1}}
    assert log.drops[0].found == ROW.strip()


def test_several_label_files_of_one_image(tmp_path: Path) -> None:
    put(
        tmp_path,
        images__a_dot_png="red",
        labels__x__a_dot_txt=ROW,
        labels__y__a_dot_txt=ROW,
        data_dot_yaml="names: [cat]",
    )
    records, log = read(tmp_path, "images", "labels")
    assert records == []
    assert log.counts == {"record": {"bad_annotation": 1}, "region": {"unknown_image": 2}}
    assert log.drops[0].found == "a.txt, which may be x/a.txt, y/a.txt"


def test_equal_names_of_different_suffix_stay_two_records(tmp_path: Path) -> None:
    put(tmp_path, images__a_dot_png="red", images__a_dot_bmp="blue", data_dot_yaml="names: [cat]")
    records, _ = read(tmp_path, "images", "images")
    assert [record.id for record in records] == ["a.bmp", "a.png"]


@pytest.mark.parametrize(
    ("yaml", "row", "expected"),
    [
        ("names: [cat]\nkpt_shape: [3, 2]", POSE, "box"),
        ("names: [cat]\nkpt_shape: [3, 2]", ROW, "box"),
        ("names: [cat]\nkpt_shape: [9, 2]", POSE, "bad_row"),
        ("names: [cat]", POLYGON, "box"),
        ("names: [cat]", POSE, "polygon"),  # a YAML of poses states kpt_shape
        ("names: {1: dog}", ROW, "unknown_category"),
        ("names: ['']", ROW, "empty_text"),
    ],
)
def test_what_rows_are(yaml: str, row: str, expected: str, tmp_path: Path) -> None:
    put(tmp_path, images__a_dot_png="red", labels__a_dot_txt=row, data_dot_yaml=yaml)
    (record,), log = read(tmp_path, "images", "labels")
    if expected in ("box", "polygon"):
        assert log.counts == {}
        assert (record.regions[0].box == BOX) == (expected == "box")
    else:
        assert log.counts == {"region": {expected: 1}}


def test_rows_that_may_be_both_are_refused_unless_said(tmp_path: Path) -> None:
    put(tmp_path, images__a_dot_png="red", labels__a_dot_txt=POSE, names_dot_txt="cat\n")
    _, log = read(tmp_path, "images", "labels", "names.txt")
    assert log.counts == {"region": {"bad_row": 1}}
    assert "say which with --task" in log.drops[0].found
    (record,), _ = read(tmp_path, "images", "labels", "names.txt", task="pose")
    assert record.regions[0].box == BOX
    (record,), _ = read(tmp_path, "images", "labels", "names.txt", task="segment")
    assert record.regions[0].box != BOX


def test_the_score_of_a_prediction_is_kept(tmp_path: Path) -> None:
    put(tmp_path, images__a_dot_png="red", data_dot_yaml="names: [cat]")
    put(tmp_path, labels__a_dot_txt=f"{ROW.strip()} 0.91\n{POLYGON.strip()} 0.5\n")
    (record,), _ = read(tmp_path, "images", "labels")
    assert [region.score for region in record.regions] == [0.91, 0.5]
    assert [region.box for region in record.regions] == [BOX, BOX]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [cat]", "names no folder of images"),
        ("names: [cat]\ntrain: nowhere", "`train` names 'nowhere', which is no folder"),
        (
            "names: [cat]\ntrain: x.txt",
            "`train` names 'x.txt', which is no folder and no text file",
        ),
    ],
)
def test_a_yaml_without_folders_says_what_to_give(yaml: str, message: str, tmp_path: Path) -> None:
    put(tmp_path, data_dot_yaml=yaml, train_dot_txt="images/a.png\n")
    with pytest.raises(ValueError, match=rf"data.yaml.*{message}.*--images and --labels"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("train.txt", "images/train/{}.png"),
        ("train.txt", "./images/train/{}.png"),
        ("train.txt", "data/images/train/{}.png"),  # as CVAT writes it
        ("train.txt", "/somebody/else/images/train/{}.png"),
        ("[train.txt, images/val]", "images\\train\\{}.png"),
    ],
)
def test_splits_that_are_lists_of_images(place: str, line: str, tmp_path: Path) -> None:
    names = ("a", "b", "gone")
    put(
        tmp_path,
        images__train__a_dot_png="red",
        images__train__b_dot_png="blue",
        images__train__unlisted_dot_png="green",
        images__val__a_dot_png="white",
        labels__train__a_dot_txt=ROW,
        labels__train__b_dot_txt=ROW * 2,
        labels__train__unlisted_dot_txt=ROW,
        labels__val__a_dot_txt=ROW * 3,
        train_dot_txt="".join(line.format(name) + "\n" for name in names) + "\n",
        data_dot_yaml=f"path: .\ntrain: {place}\nnames: [cat]\n",
    )
    records, log = read(tmp_path)
    expected = {"images/train/a": 1, "images/train/b": 2}
    num_others = 2
    if "val" in place:
        expected["images/val/a"] = 3
        num_others = 1
    assert {record.id: len(record.regions) for record in records} == expected
    assert log.counts == {"record": {"missing_image": 1}}
    assert log.drops[0].item.endswith("train/gone")
    assert log.notes["images that no list names"] == num_others
