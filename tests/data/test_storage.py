"""Records behind URLs: fsspec's own stores, and a web server that answers range requests."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
from torch.utils.data import DataLoader

from cloc_mllm.data import parquet
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.data.records import Record
from cloc_mllm.data.storage import join

NUM_RECORDS = 60


def make_records() -> list[Record]:
    """Photos of 20 kB, so that a shard of 20 is well above what one request reads ahead."""
    return [
        Record(f"r{i}", bytes([255, i]) * 10_000, 30, 20, [f"caption {i}"], [], "test")
        for i in range(NUM_RECORDS)
    ]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    write_records(make_records(), tmp_path / "data", shard_size=20)
    return tmp_path / "data"


class RangeHandler(SimpleHTTPRequestHandler):
    """Answers `Range: bytes=a-b` and notes how many bytes each request got."""

    sent: list[tuple[str, int]]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), self.headers.get("Range")
        first, last = 0, len(data) - 1
        if asked:
            start, end = asked.removeprefix("bytes=").split("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(data[first : last + 1])
        self.sent.append((path.name, last + 1 - first))

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web(built: Path) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """URL of the built set on a web server, and what the server sent."""
    pytest.importorskip("aiohttp")
    sent: list[tuple[str, int]] = []
    handler = type("Handler", (RangeHandler,), {"sent": sent, "protocol_version": "HTTP/1.1"})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: handler(*args, directory=str(built.parent))
    )
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/data", sent
    server.shutdown()
    server.server_close()


def read_all(url: str, cache_dir: str = "") -> list[Record]:
    return list(load_records(url, cache_dir=cache_dir))


def in_workers(records: Any, num_workers: int) -> list[Record]:
    order = list(range(0, NUM_RECORDS, 7)) + list(range(NUM_RECORDS))
    loader = DataLoader(
        records, sampler=order, batch_size=4, collate_fn=list, num_workers=num_workers
    )
    return [record for batch in loader for record in batch]


def test_a_store_in_memory(built: Path) -> None:
    fsspec.filesystem("memory").put(str(built), "/bucket", recursive=True)
    records = load_records("memory://bucket", verify=True)
    assert list(records) == make_records()
    assert load_records("memory://bucket/shard-00001.parquet")[0] == make_records()[20]
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_open_their_own_files(
    built: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are forked from a process that has read already; inherited files would share their
    position, and one would read at the place of the other."""
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    records = load_records(f"file://{built}")
    assert records[59] == make_records()[59]
    assert records[0] == make_records()[0]
    assert in_workers(records, num_workers) == in_workers(make_records(), 0)


def test_a_record_costs_a_few_range_requests(web: tuple[str, list[tuple[str, int]]]) -> None:
    url, sent = web
    records = load_records(url)
    assert [name for name, _ in sent] == ["manifest.json"]
    assert records[30] == make_records()[30]
    shard_sizes = [size for name, size in sent if name.startswith("shard")]
    opening = len(shard_sizes)
    assert {name for name, _ in sent[1:]} == {"shard-00001.parquet"}
    assert sum(shard_sizes) < 350_000  # a row group of 8 x 20 kB and a footer, not 20 x 20 kB
    assert records[21] == make_records()[21]
    assert len([name for name, _ in sent if name.startswith("shard")]) - opening <= 2
    assert records[22] == make_records()[22]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_read_from_the_web(
    web: tuple[str, list[tuple[str, int]]], num_workers: int
) -> None:
    records = load_records(web[0])
    assert records[59] == make_records()[59]
    assert in_workers(records, num_workers) == in_workers(make_records(), 0)


def test_an_unreachable_server_is_named() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(
        OSError, match=r"cannot open http://127.0.0.1:9/data/manifest.json: .*Connect"
    ):
        load_records("http://127.0.0.1:9/data")


# the local cache


def test_cached_shards_outlive_their_source(built: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    records = load_records(f"file://{built}", cache_dir=cache)
    assert not cache.exists()
    assert records[25] == make_records()[25]
    digests = [
        file["sha256"] for file in json.loads((built / "manifest.json").read_text())["files"]
    ]
    assert digests[1] in {path.name for path in cache.iterdir()}  # only the shard that was needed
    assert not {digests[0], digests[2]} & {path.name for path in cache.iterdir()}
    (built / "shard-00001.parquet").unlink()
    again = load_records(f"file://{built}", cache_dir=cache)
    assert again[39] == make_records()[39]


def test_processes_share_a_cache(built: Path, tmp_path: Path) -> None:
    with get_context("fork").Pool(3) as pool:
        arguments = [(f"file://{built}", str(tmp_path / "cache"))] * 3
        for records in pool.starmap(read_all, arguments):
            assert records == make_records()
    assert not list((tmp_path / "cache").glob(".partial-*"))


def test_a_changed_shard_does_not_enter_the_cache(built: Path, tmp_path: Path) -> None:
    shutil.copyfile(built / "shard-00000.parquet", built / "shard-00001.parquet")
    records = load_records(f"file://{built}", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"shard-00001.parquet differs from its manifest"):
        records[25]
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


# refusals


def test_an_address_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"file://.*/nowhere has no manifest.json"):
        load_records(f"file://{tmp_path}/nowhere")


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/set", "s3fs"), ("gs://bucket/set", "gcsfs")]
)
def test_a_missing_package_is_named(url: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=rf"cannot open {url}/manifest.json: .*nstall {package}"):
        load_records(url)


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(ValueError, match=r"cannot open nosuch://x/manifest.json"):
        load_records("nosuch://x")


def test_a_missing_shard_is_named(built: Path) -> None:
    (built / "shard-00001.parquet").unlink()
    records = load_records(f"file://{built}")
    assert records[0] == make_records()[0]
    with pytest.raises(FileNotFoundError, match=r"shard-00001.parquet"):
        records[25]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("s3://bucket/set/", "s3://bucket/set/x"),
        ("filecache::s3://bucket/set", "filecache::s3://bucket/set/x"),
        ("zip://set::https://host/all.zip", "zip://set/x::https://host/all.zip"),
        ("runs/data", Path("runs/data/x")),
    ],
)
def test_join(place: str, expected: str | Path) -> None:
    assert join(place, "x") == expected
