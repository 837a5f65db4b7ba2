from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloc_mllm.data import parquet
from cloc_mllm.data.acceptance import RefusedBuildError
from cloc_mllm.data.parquet import load_records, read_manifest, write_records
from cloc_mllm.data.records import DropLog, Record, Region


def make_records(num_records: int) -> list[Record]:
    return [
        Record(
            id=f"r{i}",
            image=bytes([255, i % 256]) * 50,
            width=30 + i,
            height=20,
            captions=[f"caption {i}", "猫"][: i % 3],
            regions=[
                Region((0.1, 0.2, 1 / 3, 0.9), f"thing {j}", 0.5, ["the thing"] * j, "c", f"g{j}")
                for j in range(i % 4)
            ],
            source="test",
        )
        for i in range(num_records)
    ]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    write_records(make_records(50), tmp_path / "data", shard_size=20, arguments={"seed": 3})
    return tmp_path / "data"


def test_round_trip_is_exact(built: Path) -> None:
    expected = make_records(50)
    actual = load_records(built, verify=True)
    assert len(actual) == 50
    assert list(actual) == expected
    assert [actual[i] for i in (49, 0, 33, 16, 17)] == [expected[i] for i in (49, 0, 33, 16, 17)]
    assert actual[-1] == expected[-1]
    assert actual[10:13] == expected[10:13]
    with pytest.raises(IndexError, match="record 50 of 50"):
        actual[50]


def test_small_cache_reads_the_same(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    assert list(load_records(built)) == make_records(50)


def test_few_open_shards_read_the_same(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_OPEN_SHARDS", 1)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    expected, actual = make_records(50), load_records(built)
    assert [actual[i] for i in (49, 0, 48, 25, 1)] == [expected[i] for i in (49, 0, 48, 25, 1)]


def test_row_groups_of_another_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets of older releases have 16 rows a group."""
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 16)
    write_records(make_records(50), tmp_path / "data")
    monkeypatch.undo()
    assert list(load_records(tmp_path / "data")) == make_records(50)


def test_manifest_tells_what_was_made(built: Path) -> None:
    manifest = read_manifest(built)
    assert manifest["num_records"] == 50
    assert manifest["arguments"] == {"seed": 3}
    assert [file["rows"] for file in manifest["files"]] == [20, 20, 10]
    assert [len(file["sha256"]) for file in manifest["files"]] == [64] * 3


def test_dataset_pickles_as_its_paths(built: Path) -> None:
    records = load_records(built)
    first = records[0]
    state = pickle.dumps(records)
    assert len(state) < 2_000
    assert pickle.loads(state)[0] == first


def test_single_file(built: Path) -> None:
    assert load_records(built / "shard-00002.parquet")[0] == make_records(50)[40]


def test_other_readers_decode_the_images(tiny_scenes: list[Record], tmp_path: Path) -> None:
    import datasets

    write_records(tiny_scenes, tmp_path / "data")
    (shard,) = (tmp_path / "data").glob("*.parquet")
    rows = datasets.Dataset.from_parquet(str(shard), cache_dir=str(tmp_path / "cache"))
    assert rows[0]["image"].size == (tiny_scenes[0].width, tiny_scenes[0].height)
    assert rows[0]["regions"][0]["phrase"] == tiny_scenes[0].regions[0].phrase


# refusals


def test_taken_directory_is_refused(built: Path) -> None:
    with pytest.raises(ValueError, match="already exists"):
        write_records(make_records(1), built)
    assert len(load_records(built)) == 50


def test_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert write_records(make_records(3), tmp_path / "data") == 3
    assert len(load_records(tmp_path / "data")) == 3


def test_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def records():
        yield from make_records(30)
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        write_records(records(), tmp_path / "data", shard_size=10)
    assert list(tmp_path.iterdir()) == []


def test_build_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedBuildError, match="no record"):
        write_records([], tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_too_many_drops_are_refused(tmp_path: Path) -> None:
    log = DropLog()
    for i in range(8):
        log.deliver(f"r{i}")
    log.add("record", "x", "broken_image")
    log.add("record", "y", "broken_image")
    with pytest.raises(RefusedBuildError, match=r"2 records \(20.0%\).*at most 5.0%"):
        write_records(make_records(8), tmp_path / "data", drop_log=log, max_drop_share=0.05)
    assert list(tmp_path.iterdir()) == []
    write_records(make_records(8), tmp_path / "data", drop_log=log, max_drop_share=0.2)
    assert read_manifest(tmp_path / "data")["dropped"] == {"record": {"broken_image": 2}}
    assert len((tmp_path / "data" / "drops.jsonl").read_text().splitlines()) == 2


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*data build"):
        load_records(tmp_path / "nowhere")


def test_directory_without_manifest_is_refused(built: Path) -> None:
    (built / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        load_records(built)


def test_cut_manifest_is_refused(built: Path) -> None:
    text = (built / "manifest.json").read_text()
    (built / "manifest.json").write_text(text[:100])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_records(built)


def test_missing_shard_is_refused(built: Path) -> None:
    (built / "shard-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"shard-00001.parquet is missing.*build it again"):
        load_records(built)


def test_shard_of_another_build_is_refused(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    manifest["files"][2]["rows"] = 11
    (built / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has 10 rows, its manifest says 11"):
        load_records(built)[45]


def test_cut_shard_is_refused(built: Path) -> None:
    shard = built / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"shard-00001.parquet has [\d,]+ bytes"):
        load_records(built)
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        load_records(shard)


def test_flipped_bit_is_found(built: Path) -> None:
    shard = built / "shard-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[data.index(bytes([255, 5]) * 50) + 7] ^= 1  # in the image of record 5
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"sha256"):
        load_records(built, verify=True)
    # each page also carries its checksum
    with pytest.raises(OSError, match=r"shard-00000.parquet, row group 0, .*(?i:crc)"):
        load_records(built)[5]


def test_other_schema_version_is_refused(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    (built / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 999}))
    with pytest.raises(ValueError, match="schema version 999, this release reads version 1"):
        load_records(built)


def test_foreign_parquet_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no schema version"):
        load_records(tmp_path / "other.parquet")
