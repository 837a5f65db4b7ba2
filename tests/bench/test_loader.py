from __future__ import annotations

import dataclasses
import io
import sys
import tarfile
from pathlib import Path

import pytest

from cloc_mllm.data.parquet import write_records
from cloc_mllm.data.records import Record
from loader import MissingPeerError, OpenClipLoader, OurLoader, write_tars


@pytest.fixture
def photos(tiny_scenes: list[Record]) -> list[Record]:
    photos = []
    for scene in tiny_scenes:
        file = io.BytesIO()
        scene.load_image().save(file, "JPEG")
        photos.append(dataclasses.replace(scene, image=file.getvalue()))
    return photos


def test_an_epoch_delivers_every_record_once(photos: list[Record], tmp_path: Path) -> None:
    write_records(photos, tmp_path / "data")
    loader = OurLoader(str(tmp_path / "data"), batch_size=5, image_size=64, num_workers=1)
    assert loader.check_delivery().startswith("delivered 16 + quarantined 0 == manifest 16")


def test_a_lost_record_gives_no_number(
    photos: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(photos, tmp_path / "data")
    loader = OurLoader(str(tmp_path / "data"), batch_size=8, image_size=64, num_workers=0)
    ids, num_boxes = loader.epoch()
    monkeypatch.setattr(loader, "epoch", lambda: ([*ids[1:], ids[1]], num_boxes))
    with pytest.raises(ValueError, match=rf"missing \['{ids[0]}'\], too often \['{ids[1]}'\]"):
        loader.check_delivery()


def test_tars_hold_the_same_files(photos: list[Record], tmp_path: Path) -> None:
    found = []
    for path in write_tars(photos, tmp_path, num_shards=3):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        found += [(members[name], members[f"{name[:-3]}txt"]) for name in members if "jpg" in name]
    assert sorted(found) == sorted((p.image, p.captions[0].encode()) for p in photos)


def test_the_peer_reads_them(photos: list[Record], tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    tars = write_tars(photos, tmp_path, num_shards=2)
    assert OpenClipLoader(tars, 16, batch_size=4, image_size=32).epoch(num_workers=1) == 16


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip_train", None)  # importing it fails from now on
    with pytest.raises(MissingPeerError, match="pip install --target DIR"):
        OpenClipLoader([], 16, batch_size=4, image_size=32)
