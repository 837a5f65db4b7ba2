"""The photos that `label` finds at any depth; each is read or named."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from PIL import Image

from cloc_mllm.data.readers.photos import OTHER_FILES
from cloc_mllm.vesl.sources import open_source


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.JPG", "sub/a.jpg", "d.bmp"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    (folder / "a.txt").write_bytes(codecs.BOM_UTF8 + "a café\n\nin Paris\n".encode())
    (folder / "b.txt").write_bytes("a red box".encode("utf-16"))
    (folder / "sub" / "a.txt").write_text("another")
    (folder / "notes.md").write_text("?")
    (folder / "e.txt").write_text("of no photo")
    return folder


def test_photos_at_any_depth_with_their_captions(photos: Path) -> None:
    source = open_source(str(photos))
    assert [(record.id, record.captions) for record in source.read(0, len(source))] == [
        ("a.jpg", ["a café", "in Paris"]),
        ("b.JPG", ["a red box"]),
        ("d.bmp", []),
        ("sub/a.jpg", ["another"]),
    ]
    assert source.notes == {OTHER_FILES: 2}
    assert source.examples == {OTHER_FILES: ["e.txt", "notes.md"]}


def test_captions_in_another_encoding(photos: Path) -> None:
    (photos / "a.txt").write_bytes("un café".encode("cp1252"))
    assert open_source(str(photos), "", "cp1252").read(0, 1)[0].captions == ["un café"]
    assert open_source(str(photos)).read(0, 1)[0].captions == ["un caf\udce9"]  # will be dropped


def test_a_file_of_captions_by_path(photos: Path, tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "captions": ["first"]},
        {"image": "photos\\sub\\a.jpg", "captions": ["second"]},
        {"image": "B.jpg", "captions": ["third"]},
        {"image": "gone.jpg", "captions": ["nothing"]},
    ]
    path = tmp_path / "captions.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + "\n".join(map(json.dumps, rows)).encode())
    source = open_source(str(photos), str(path))
    captions = {record.id: record.captions for record in source.read(0, len(source))}
    assert captions == {
        "a.jpg": ["first"],
        "sub/a.jpg": ["second"],
        "b.JPG": ["third"],
        "d.bmp": [],
    }
    assert source.notes["captioned images that are not there"] == 1
    assert source.examples["captioned images that are not there"] == ["gone.jpg"]
    assert source.examples["photos that no row captions"] == ["d.bmp"]


def test_a_folder_without_photos_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "film.mp4").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"holds no photo, but film\.mp4"):
        open_source(str(tmp_path / "photos"))
