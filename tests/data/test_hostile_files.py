"""Images, archives, pickles and shards that were made to hurt, or got hurt."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cloc_mllm.data.checks.validate import whole_items
from cloc_mllm.data.commands import main
from cloc_mllm.data.parquet import load_records, read_manifest, write_records
from cloc_mllm.data.readers.files import open_files, read_image
from cloc_mllm.data.readers.grit import read_grit_tars
from cloc_mllm.data.readers.odgt import read_odgt
from cloc_mllm.data.readers.plain_pickle import read_plain_pickle
from cloc_mllm.data.readers.tar_stream import read_samples
from cloc_mllm.data.records import DropLog, Record
from tests.data.formats import add_member, write_lines

# images


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def png_bomb(side: int) -> bytes:
    """A PNG of side x side pixels of one bit, in a thousandth of the bytes of its pixels."""
    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side), 9)
    head = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in chunks
    )


def hostile_images() -> dict[str, bytes]:
    photo = Image.effect_noise((96, 64), 80).convert("RGB")
    files = {"html.jpg": b"<html>404 Not Found</html>", "empty.jpg": b""}
    plain, progressive = encode(photo, "JPEG"), encode(photo, "JPEG", progressive=True)
    for percent in range(1, 100):
        files[f"cut_{percent}.jpg"] = plain[: len(plain) * percent // 100]
        files[f"progressive_{percent}.jpg"] = progressive[: len(progressive) * percent // 100]
    files["bomb.png"] = png_bomb(12_700)
    files["one_pixel.png"] = encode(photo.crop((0, 0, 1, 1)), "PNG")
    files["line.png"] = encode(Image.new("RGB", (65_500, 1)), "PNG")
    files["cmyk.jpg"] = encode(photo.convert("CMYK"), "JPEG")
    files["deep.png"] = encode(Image.fromarray(np.full((64, 96), 40_000, np.uint16)), "PNG")
    palette = photo.quantize(16)
    files["palette.png"] = encode(palette, "PNG", transparency=3)
    frames = {"save_all": True, "append_images": [photo.transpose(Image.Transpose.ROTATE_180)]}
    files["animated.webp"] = encode(photo, "WEBP", **frames)
    files["animated.gif"] = encode(photo, "GIF", **frames)
    return files


_READ_ALL = r"""
import json, re, sys
from pathlib import Path
from cloc_mllm.data.readers.odgt import read_odgt
from cloc_mllm.data.records import DropLog
folder = Path(sys.argv[1])
def megabytes():  # the peak of this process; ru_maxrss would also know its parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
list(read_odgt(folder / "warm.jsonl", folder, drop_log=DropLog()))
before, log = megabytes(), DropLog()
kept = [record.id for record in read_odgt(folder / "rows.jsonl", folder, drop_log=log)]
print(json.dumps({"kept": kept, "entries": log.entries, "megabytes": megabytes() - before}))
"""


def test_hostile_images_are_refused_in_little_memory(tmp_path: Path, project_root: Path) -> None:
    files = hostile_images()
    assert len(files["bomb.png"]) < 21_000  # and 484 MB as RGB
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    write_lines(tmp_path / "rows.jsonl", [{"ID": name, "gtboxes": []} for name in files])
    write_lines(tmp_path / "warm.jsonl", [{"ID": "cmyk.jpg", "gtboxes": []}])
    run = subprocess.run(
        [sys.executable, "-c", _READ_ALL, str(tmp_path)],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(run.stdout)
    reasons = {item: reason for kind, item, reason in result["entries"] if kind == "record"}
    assert len(result["kept"]) + len(reasons) == len(files)
    assert result["megabytes"] < 200
    assert sorted(result["kept"]) == sorted(
        ["animated.gif", "animated.webp", "cmyk", "deep", "line", "one_pixel", "palette"]
    )
    assert reasons["bomb"] == "image_too_large"
    assert reasons["html"] == "not_an_image"
    assert reasons["empty"] == "missing_image"
    cut = {reason for item, reason in reasons.items() if item.startswith(("cut", "progressive"))}
    assert cut <= {"broken_image", "not_an_image"}


@pytest.mark.parametrize("tag", range(1, 9))
def test_a_box_covers_the_painted_place_of_a_turned_photo(tag: int, tmp_path: Path) -> None:
    upright = Image.new("RGB", (80, 40), "white")
    upright.paste("red", (8, 4, 24, 20))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that `tag` asks to undo
    stored = upright.transpose(Image.Transpose(undo[tag])) if tag in undo else upright
    exif = Image.Exif()
    exif[0x0112] = tag
    stored.save(tmp_path / "a.png", exif=exif)
    row = {"ID": "a", "gtboxes": [{"tag": "red", "box": [8, 4, 16, 16]}]}
    write_lines(tmp_path / "rows.jsonl", [row])
    (record,) = read_odgt(tmp_path / "rows.jsonl", tmp_path, drop_log=DropLog())
    image = record.load_image()
    assert image.size == (80, 40)
    x1, y1, x2, y2 = record.regions[0].box
    inside = image.crop((round(x1 * 80), round(y1 * 40), round(x2 * 80), round(y2 * 40)))
    assert inside.getcolors() == [(256, (255, 0, 0))]


# pickles


class Exploit:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.canary}",))


@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_runs_code(protocol: int, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([{"ref_id": 1}, Exploit(canary)], protocol=protocol))
    with pytest.raises(ValueError, match=r"refs\(unc\).p is no pickle of plain .*it asks for"):
        read_plain_pickle(path)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickle_of_any_protocol(protocol: int, tmp_path: Path) -> None:
    refs = [{"ref_id": 1, "box": [1.5, 2], "names": ("a", "猫"), "set": {1}, "none": None}]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, protocol=protocol))
    if protocol < 4:  # a set is a class to them
        del refs[0]["set"]
        (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, protocol=protocol))
    assert read_plain_pickle(tmp_path / "refs.p") == refs


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of two thousand million places
        b"cos\nsystem\n.",
        b"P1\n.",
        b"(lp0\nS'a",
        b"<html>",
        b"\x80\x04\x95" + b"\xff" * 8 + b".",
        b"\x82\x01.",
        b"]" * 100_000,
    ],
)
def test_broken_pickle_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "refs.p").write_bytes(data)
    with pytest.raises(ValueError, match="no pickle of plain"):
        read_plain_pickle(tmp_path / "refs.p")


# archives


def write_hostile_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("../../up.jpg", "/tmp/absolute.jpg", "plain.jpg"):
            add_member(tar, name, b"data")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"special{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        sparse = tarfile.TarInfo("huge.jpg")
        sparse.size = 0
        tar.addfile(sparse)


def test_hostile_tar_writes_nothing_and_follows_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    write_hostile_tar(folder / "x.tar")
    with open_files(folder / "x.tar") as files:
        assert files.names() == ["huge.jpg", "plain.jpg", "tmp/absolute.jpg", "up.jpg"]
        assert files.read("special2.jpg") is None
    log = DropLog()
    samples = dict(read_samples(folder / "x.tar", log))
    assert samples["plain"] == {"jpg": b"data"}
    assert not any("root:" in str(sample) for sample in samples.values())
    assert sum(log.notes.values()) == 4
    assert list(read_grit_tars([folder / "x.tar"], drop_log=log)) == []
    assert log.num_dropped("record") == len(samples)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "x.tar"]


def test_hostile_zip_writes_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../../up.jpg", b"data")
        archive.writestr(zipfile.ZipInfo("/absolute.jpg"), b"data")
    with open_files(tmp_path / "x.zip") as files:
        assert files.names() == ["absolute.jpg", "up.jpg"]
        assert read_image(files, "../../up.jpg") == b"data"
        assert read_image(files, "/absolute.jpg") == b"data"
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


@pytest.mark.parametrize("name", ["../secret.jpg", "/secret.jpg", "a/../../secret.jpg"])
def test_a_folder_is_not_left(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "images").mkdir()
    with open_files(tmp_path / "images") as files:
        for sought in (name, str(tmp_path / "secret.jpg")):
            assert files.read(sought) is None
            assert read_image(files, sought) == b""


def test_a_cut_stream_of_samples_is_noticed(tmp_path: Path) -> None:
    """At every multiple of 97 bytes: whole samples come, then an error; never a quiet end."""
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for number in range(4):
            add_member(tar, f"{number}.jpg", bytes([number]) * 600)
            add_member(tar, f"{number}.json", json.dumps({"id": number}).encode())
    data = (tmp_path / "whole.tar").read_bytes()
    end_of_data = 4 * (512 + 1024 + 512 + 512)
    for cut in range(1, end_of_data, 97):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        samples = []
        with pytest.raises(ValueError, match=r"cut.tar is"):
            for _, sample in read_samples(tmp_path / "cut.tar", DropLog()):
                samples.append(sample)
        assert all(sample["jpg"] == bytes([i]) * 600 for i, sample in enumerate(samples))


# shards


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = io.BytesIO()
    Image.effect_noise((24, 24), 60).convert("RGB").save(file, "PNG")
    records = [Record(f"r{i}", file.getvalue(), 24, 24, [f"c {i}"], [], "t") for i in range(20)]
    directory = tmp_path_factory.mktemp("shards") / "data"
    write_records(records, directory, shard_size=5)
    return directory


def account(directory: Path) -> tuple[int, dict[str, dict[str, int]]]:
    log = DropLog()
    return len(list(whole_items(directory, log))), log.counts


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_shards_are_counted(damage: str, built: Path) -> None:
    """Cut at 200 random offsets, or one bit flipped at 200: delivered + dropped == manifest."""
    rng = np.random.default_rng(0)
    path = built / "shard-00002.parquet"
    whole = path.read_bytes()
    num_records = read_manifest(built)["num_records"]
    try:
        for offset in rng.integers(0, len(whole), 200).tolist():
            data = bytearray(whole)
            if damage == "cut":
                data = data[:offset]
            else:
                data[offset] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            delivered, counts = account(built)
            assert counts == {"record": {"damaged_shard": 5}}
            assert delivered + 5 == num_records
            with pytest.raises(ValueError, match=r"shard-00002"):
                load_records(built, verify=True)
    finally:
        path.write_bytes(whole)
    assert account(built) == (20, {})


def test_validate_counts_damage(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(built)]) == 0
    path = built / "shard-00001.parquet"
    whole = path.read_bytes()
    path.unlink()
    try:
        assert main(["validate", str(built)]) == 1
        assert main(["validate", str(built), "--max_drop_share", "0.25"]) == 0
    finally:
        path.write_bytes(whole)
    printed = capsys.readouterr().out
    assert "15 kept         5 dropped (damaged_shard 5)" in printed
    assert "first 'shard-00001.parquet/0'" in printed
