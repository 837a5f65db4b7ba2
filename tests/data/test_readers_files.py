"""Folders, tars and zips alike: files by their path, and what is no such source."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from cloc_mllm.data.readers import files as files_module
from cloc_mllm.data.readers.files import open_files, read_annotation_file, read_image, settle

CONTENT = {"a.jpg": b"first", "night/a.jpg": b"second", "night/b.png": b"third", "x.txt": b"text"}


def add_to_tar(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture(params=["folder", "tar", "zip"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The files of CONTENT below `images/`, as each kind of source."""
    if request.param == "folder":
        for name, data in CONTENT.items():
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path
    path = tmp_path / f"images.{request.param}"
    if request.param == "tar":
        with tarfile.open(path, "w") as tar:
            for name, data in CONTENT.items():
                add_to_tar(tar, f"./images/{name}", data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in CONTENT.items():
                archive.writestr(f"images\\{name}", data)
    return path


def test_files_are_known_by_their_path(source: Path) -> None:
    with open_files(source, "images") as files:
        assert files.names() == sorted(CONTENT)
        assert {name: files.read(name) for name in files.names()} == CONTENT
        assert read_image(files, "some/where/night/b.png") == b"third"
        assert [read_image(files, name) for name in ("b", "night/a", "c")] == [
            b"third",
            b"second",
            b"",
        ]
    with open_files(source) as files:
        assert files.names() == sorted(f"images/{name}" for name in CONTENT)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "c.jpg", "x" * 5000, "a\0.jpg", "night"])
def test_absent_name_is_none(source: Path, name: str) -> None:
    with open_files(source, "images") as files:
        assert files.read(name) is None
        assert read_image(files, name) == b""


def test_large_file_is_not_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MAX_FILE_BYTES", 5)
    with open_files(source, "images") as files:
        assert files.read("a.jpg") == b"first"
        assert files.read("night/a.jpg") is None


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "disk" / "train").mkdir(parents=True)
    (tmp_path / "disk" / "train" / "a.jpg").write_bytes(b"1")
    (tmp_path / "images").mkdir()
    os.symlink(tmp_path / "disk" / "train", tmp_path / "images" / "train")
    os.symlink(tmp_path / "images", tmp_path / "images" / "again")
    with open_files(tmp_path / "images") as files:
        assert files.names() == ["train/a.jpg"]
        assert files.read("train/a.jpg") == b"1"


def test_links_and_devices_in_a_tar_are_not_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in [("link.jpg", tarfile.SYMTYPE), ("device.jpg", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        add_to_tar(tar, "../../escape.jpg", b"data")
        add_to_tar(tar, "._escape.jpg", b"what macOS adds")
    with open_files(tmp_path / "x.tar") as files:
        assert files.names() == ["escape.jpg"]
        assert files.read("escape.jpg") == b"data"
    assert [path.name for path in tmp_path.rglob("*")] == ["x.tar"]


def test_two_members_of_one_path_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add_to_tar(tar, "train/a.jpg", b"1")
        add_to_tar(tar, "./train/a.jpg", b"2")
    with (
        pytest.raises(ValueError, match=r"two files named 'train/a.jpg'"),
        open_files(tmp_path / "x.tar"),
    ):
        pass


@pytest.mark.parametrize(
    "kept_bytes",
    [
        pytest.param(700, id="in_the_data"),
        pytest.param(1024, id="between_two_members"),
        pytest.param(1200, id="in_a_header"),
        pytest.param(2048, id="before_the_end_mark"),
    ],
)
def test_cut_tar_is_refused(tmp_path: Path, kept_bytes: int) -> None:
    path = write_two_member_tar(tmp_path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"x.tar is a damaged tar"), open_files(path):
        pass


def test_flipped_bit_in_a_tar_header_is_found(tmp_path: Path) -> None:
    path = write_two_member_tar(tmp_path)
    data = bytearray(path.read_bytes())
    data[1024] ^= 1  # the name of the second member
    path.write_bytes(data)
    with (
        pytest.raises(ValueError, match=r"no header and no end mark at byte 1,024"),
        open_files(path),
    ):
        pass


def write_two_member_tar(folder: Path) -> Path:
    with tarfile.open(folder / "x.tar", "w") as tar:
        add_to_tar(tar, "a.jpg", b"1" * 500)
        add_to_tar(tar, "b.jpg", b"2" * 500)
    return folder / "x.tar"


def test_flipped_bit_in_a_zip_is_found(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", b"content")
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[data.index(b"content")] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    with (
        open_files(tmp_path / "x.zip") as files,
        pytest.raises(ValueError, match=r"x.zip is damaged at 'a.jpg'"),
    ):
        files.read("a.jpg")


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), open_files(tmp_path / "nowhere"):
        pass
    with (
        pytest.raises(FileNotFoundError, match="no folder 'Sentences'"),
        open_files(tmp_path, "Sentences"),
    ):
        pass


def test_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b rest")
    with (
        pytest.raises(ValueError, match="no folder, zip or uncompressed tar"),
        open_files(tmp_path / "x.tar.gz"),
    ):
        pass


def test_a_folder_in_an_archive_is_a_place(source: Path) -> None:
    with open_files(source / "images") as files:
        assert files.names() == sorted(CONTENT)
        assert files.match("images/night/b.png").path == "night/b.png"  # names may start above
    with open_files(source / "images/night") as files:
        assert files.names() == ["a.jpg", "b.png"]
        assert files.read("a.jpg") == b"second"
    assert read_annotation_file(source / "images/x.txt") == b"text"
    with pytest.raises(FileNotFoundError), open_files(source / "imag"):
        pass
    with pytest.raises(FileNotFoundError):
        read_annotation_file(source / "images/y.txt")


def test_a_name_that_many_rows_share_is_sought_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    sought: list[str] = []
    with open_files(tmp_path) as files:
        match = files.match
        monkeypatch.setattr(files, "match", lambda name: sought.append(name) or match(name))
        found = settle(files, [("set/a.png",)] * 3)
    assert [match.path for match in found.values()] == ["a.png"]
    assert sought == ["set/a.png"]
