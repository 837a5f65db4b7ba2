from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
from PIL import Image

from cloc_mllm.data.readers.image_folder import read_class_names, read_image_folder
from cloc_mllm.data.readers.photos import OTHER_FILES
from cloc_mllm.data.records import DropLog


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes with an image each, one of them also with a text file and a broken image."""
    for folder, color in (("n00000001", "red"), ("guinea_pig", "blue")):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8), color).save(tmp_path / "images" / folder / "one.JPEG")
    (tmp_path / "images" / "guinea_pig" / "notes.txt").write_text("?")
    (tmp_path / "images" / "guinea_pig" / "two.jpg").write_bytes(b"no image")
    return tmp_path / "images"


def test_a_folder_is_a_class(images: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("n00000001 tench, Tinca tinca\nguinea_pig guinea_pig\nn9 not here\n")
    log = DropLog()
    records = list(read_image_folder(images, class_names=names, drop_log=log))
    assert [(record.id, record.captions) for record in records] == [
        ("guinea_pig/one", ["guinea pig"]),
        ("n00000001/one", ["tench"]),
    ]
    assert records[0].source == "image-folder"
    assert log.counts == {"record": {"not_an_image": 1}, "caption": {"not_an_image": 1}}
    assert log.notes == {OTHER_FILES: 1}
    assert log.examples == {OTHER_FILES: ["guinea_pig/notes.txt"]}


def test_without_names_the_folder_is_the_name(images: Path) -> None:
    records = list(read_image_folder(images, drop_log=DropLog()))
    assert [record.captions for record in records] == [["guinea pig"], ["n00000001"]]


def test_wordnet_folders_need_names_unless_they_are_all_of_imagenet(tmp_path: Path) -> None:
    for index in range(999):
        (tmp_path / f"n{index:08}").mkdir()
    with pytest.raises(ValueError, match=r"has 999 WordNet folders .* --class_names"):
        list(read_image_folder(tmp_path, drop_log=DropLog()))
    (tmp_path / "n00000999").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "n00000999" / "x.png")
    (record,) = read_image_folder(tmp_path, drop_log=DropLog())
    assert record.captions == [open_clip.IMAGENET_CLASSNAMES[-1]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "n1\tgreat grey  owl, Strix\nn2 a_b\n", {"n1": "great grey owl", "n2": "a b"}),
        ("a.json", json.dumps({"n1": "tench, x"}), {"n1": "tench"}),
    ],
)
def test_class_names(tmp_path: Path, name: str, content: str, expected: dict[str, str]) -> None:
    (tmp_path / name).write_text(content)
    assert read_class_names(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "n1\n"), ("a.txt", ""), ("a.json", "[1]"), ("a.json", '{"a":1}')],
)
def test_other_name_files_are_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"expected a JSON object folder -> name, or lines"):
        read_class_names(tmp_path / name)


def test_a_folder_without_a_name_or_no_folder_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text('{"n00000001": "tench"}')
    with pytest.raises(
        ValueError, match=r"names.json has no name for the folders \['guinea_pig'\]"
    ):
        list(read_image_folder(images, class_names=tmp_path / "names.json", drop_log=DropLog()))
    with pytest.raises(ValueError, match="one folder of images per class"):
        list(read_image_folder(images / "guinea_pig", drop_log=DropLog()))
