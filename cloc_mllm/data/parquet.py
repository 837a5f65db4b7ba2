"""Stores records and chats on disk: Parquet shards with `datasets` features and a manifest.

A data set is a directory of `shard-00000.parquet ...` and `manifest.json`. It gets its name only
once it is whole: it is built under another name and renamed. Any Parquet reader opens the shards;
`datasets.load_dataset("parquet", data_files=...)` decodes the images as well.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cloc_mllm import __version__
from cloc_mllm.card import write_data_card
from cloc_mllm.data.acceptance import refuse_lossy_build, refuse_no_places, refuse_no_regions
from cloc_mllm.data.chats import Chat
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.records import SCHEMA_VERSION, Record
from cloc_mllm.data.schemas import (
    SetKind,
    columns_without_images,
    features_of,
    from_row,
    image_bytes_column,
    to_row,
)
from cloc_mllm.data.sequences import LazySequence
from cloc_mllm.data.storage import (
    Place,
    cached,
    is_url,
    join,
    open_binary,
    partial_directory,
    sha256_of,
)

MANIFEST_NAME = "manifest.json"
DROPS_NAME = "drops.jsonl"
# The rows that one random access reads. With half as many, the footers, which stay in memory for
# each open shard, would be twice as large.
ROW_GROUP_ROWS = 8
CACHE_BYTES = 256 << 20  # size of the row groups that a process keeps; a small set is read once
MAX_OPEN_SHARDS = 256  # per process; each is an open file and its footer
_REBUILD = "the data set is damaged: build it again with `cloc-mllm data build`"
_VERSION_KEY, _KIND_KEY = b"cloc_mllm.schema_version", b"cloc_mllm.kind"
Item = TypeVar("Item", Record, Chat)


def write_records(  # noqa: PLR0913  what a build can be told
    records: Iterable[Record],
    directory: str | Path,
    *,
    shard_size: int = 1000,
    arguments: dict[str, Any] | None = None,
    drop_log: DropLog | None = None,
    max_drop_share: float = 1.0,
    allow_no_regions: bool = True,
) -> int:
    """Writes records that passed `validate_record` as a new data set.

    Args:
        directory: must not exist, or be an empty folder.
        arguments: what the records were made from (source, seed, ...), for the manifest.
        drop_log: the account that the records' reader keeps; read once `records` is exhausted.
        max_drop_share: largest share of records, regions, expressions or captions that may be
            dropped.
        allow_no_regions: off refuses a set without a region, unless it has captions and the source
            has no regions either.

    Returns:
        the number of records written.

    Raises:
        RefusedBuildError: there is no usable record or no region, or too much was dropped.
        ValueError: the directory is taken.
    """
    return _write_set(
        "records",
        records,
        Path(directory),
        shard_size,
        _Account(arguments or {}, drop_log or DropLog(), max_drop_share, allow_no_regions),
    )


def write_chats(  # noqa: PLR0913  what a build can be told
    chats: Iterable[Chat],
    directory: str | Path,
    *,
    shard_size: int = 1000,
    arguments: dict[str, Any] | None = None,
    drop_log: DropLog | None = None,
    max_drop_share: float = 1.0,
    allow_no_regions: bool = True,
) -> int:
    """Write chats (already through `validate_chat`) as a new data set; see `write_records`."""
    account = _Account(arguments or {}, drop_log or DropLog(), max_drop_share, allow_no_regions)
    return _write_set("chats", chats, Path(directory), shard_size, account)


@dataclass(frozen=True)
class _Account:
    """What becomes of a set beside its rows: see `write_records`."""

    arguments: dict[str, Any]
    drop_log: DropLog
    max_drop_share: float
    allow_no_regions: bool = True


def _write_set(
    kind: SetKind,
    items: Iterable[Record] | Iterable[Chat],
    directory: Path,
    shard_size: int,
    account: _Account,
) -> int:
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(
            f"{directory} already exists; name another directory or remove this one first"
        )
    drop_log = account.drop_log
    with partial_directory(directory) as partial:
        files = _write_shards(kind, items, partial, shard_size)
        num_rows = sum(file["rows"] for file in files)
        refuse_lossy_build(num_rows, drop_log, account.max_drop_share)
        if not account.allow_no_regions and kind == "records":
            refuse_no_regions(drop_log)
        elif not account.allow_no_regions:
            refuse_no_places(drop_log, account.max_drop_share)
        drop_log.write(partial / DROPS_NAME)
        contents = {
            "kind": kind,
            "arguments": account.arguments,
            "delivered": dict(drop_log.delivered),
            "dropped": drop_log.counts,
            "set_aside": drop_log.set_aside,
            "notes": dict(drop_log.notes),
            "files": files,
        }
        seal_data_set(partial, directory, contents)
    return num_rows


def seal_data_set(partial: Path, directory: Path, contents: dict[str, Any]) -> None:
    """Writes the manifest of a directory of shards, flushes all to disk and gives it its name.

    Args:
        contents: `files` as `write_shard` describes them, `kind` (by default records),
            `arguments`, `notes`, and the counts `delivered`, `dropped` and `set_aside` of a
            `DropLog`.
    """
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "cloc_mllm_version": __version__,
        "num_records": sum(file["rows"] for file in contents["files"]),
        **contents,
    }
    (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    write_data_card(partial, manifest, directory.name)
    for path in (*partial.iterdir(), partial):
        _fsync(path)
    partial.chmod(0o755)  # mkdtemp makes it private
    partial.rename(directory)  # replaces an empty folder, fails on any other
    _fsync(directory.parent)


def _write_shards(
    kind: SetKind, items: Iterable[Record] | Iterable[Chat], directory: Path, shard_size: int
) -> list[dict[str, Any]]:
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    files: list[dict[str, Any]] = []
    stream: Iterator[Any] = iter(items)
    while first := next(stream, None):
        shard = itertools.chain([first], itertools.islice(stream, shard_size - 1))
        files.append(write_shard(shard, directory / f"shard-{len(files):05d}.parquet", kind))
    return files


def write_shard(
    items: Iterable[Record] | Iterable[Chat], path: Path, kind: SetKind = "records"
) -> dict[str, Any]:
    """Writes one file of at least one row; returns its entry of the manifest."""
    schema = features_of(kind).arrow_schema
    metadata = {_VERSION_KEY: str(SCHEMA_VERSION).encode(), _KIND_KEY: kind.encode()}
    schema = schema.with_metadata({**schema.metadata, **metadata})
    rows = 0
    stream: Iterator[Any] = iter(items)
    # image files are compressed already; a checksum per page finds bit rot at reading
    compression = dict.fromkeys(columns_without_images(kind), "zstd")
    images = image_bytes_column(kind)
    compression[images] = "none"
    # a dictionary keeps a picture once per row group, however many chats are about it
    shared = {"use_dictionary": [images], "dictionary_pagesize_limit": 1 << 30}
    with pq.ParquetWriter(
        path,
        schema,
        compression=compression,
        **(shared if kind == "chats" else {"use_dictionary": False}),
        write_statistics=False,  # they take a third of the footer, and nobody filters by them
        write_page_checksum=True,
    ) as writer:
        while group := list(itertools.islice(stream, ROW_GROUP_ROWS)):
            table = pa.Table.from_pylist(list(map(to_row, group)), schema=schema)
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            rows += len(group)
    return {
        "name": path.name,
        "rows": rows,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }


class ItemDataset(LazySequence[Item]):
    """Reads records or chats of Parquet shards by index.

    Shards on a disk are memory-mapped, shards behind a URL are read by range requests, both one row
    group at a time, so a set may be larger than the memory. Images stay encoded. Pickled, it is its
    list of files; after a fork it opens them anew, so each worker of a loader has its own.
    """

    def __init__(self, shards: Sequence[_Shard], kind: SetKind) -> None:
        self.shards = list(shards)
        self.kind = kind
        self._ends = list(itertools.accumulate(shard.num_rows for shard in shards))
        self._cached_bytes = 0
        self._forget()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _item(self, position: int) -> Item:
        if self._process != os.getpid():
            self._forget()
        shard = bisect.bisect_right(self._ends, position)
        row = position - (self._ends[shard - 1] if shard else 0)
        if shard not in self._group_rows:
            self._open(shard)
        group, row_in_group = divmod(row, self._group_rows[shard])
        table = self._read_group(shard, group)
        return self._from_row(table.slice(row_in_group, 1).to_pylist()[0])

    def without_images(self) -> Iterator[Item]:
        """Yields all items in order with empty image bytes, which are not read from the files."""
        columns = columns_without_images(self.kind)
        for shard in self.shards:
            with shard.open() as file:
                for batch in file.iter_batches(columns=columns, use_threads=False):
                    yield from map(self._from_row, batch.to_pylist())

    def _from_row(self, row: dict[str, Any]) -> Item:
        return cast(Item, from_row(self.kind, row))

    def _read_group(self, shard: int, group: int) -> pa.Table:
        if (shard, group) not in self._groups:
            file = self._open(shard)
            try:
                table = file.read_row_group(group, use_threads=False)
            except OSError as error:
                place = self.shards[shard].place
                raise OSError(f"{place}, row group {group}, cannot be read: {error}") from error
            if self._cached_bytes + table.nbytes > CACHE_BYTES:
                self._groups.clear()
                self._cached_bytes = 0
            self._groups[shard, group] = table
            self._cached_bytes += table.nbytes
        return self._groups[shard, group]

    def _open(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                del self._files[next(iter(self._files))]  # the one opened first
            self._files[shard] = self.shards[shard].open()
            self._group_rows[shard] = self._files[shard].metadata.row_group(0).num_rows
        return self._files[shard]

    def _forget(self) -> None:
        self._process = os.getpid()
        self._files: dict[int, pq.ParquetFile] = {}
        self._group_rows: dict[int, int] = {}
        self._groups: dict[tuple[int, int], pa.Table] = {}
        self._cached_bytes = 0

    def __getstate__(self) -> tuple[list[_Shard], SetKind]:
        return self.shards, self.kind

    def __setstate__(self, state: tuple[list[_Shard], SetKind]) -> None:
        self.__init__(*state)  # type: ignore[misc]


RecordDataset = ItemDataset[Record]
ChatDataset = ItemDataset[Chat]


@dataclass(frozen=True)
class _Shard:
    """A file of the manifest. `cache_dir` "" reads a URL in place."""

    place: Place
    num_rows: int
    sha256: str = ""
    cache_dir: str = ""

    def open(self) -> pq.ParquetFile:
        place = self.place
        if self.cache_dir and is_url(place):
            place = cached(place, self.sha256, self.cache_dir)
        file = _open_parquet(place)
        if file.metadata.num_rows != self.num_rows:
            raise ValueError(
                f"{self.place} has {file.metadata.num_rows:,} rows, its manifest says "
                f"{self.num_rows:,}; {_REBUILD}"
            )
        return file


def load_records(
    path: str | Path, *, verify: bool = False, cache_dir: str | Path = ""
) -> RecordDataset:
    """Opens a directory that `write_records` made, or one of its Parquet files.

    Args:
        path: a path, or a URL as text (`s3://bucket/set`); only its manifest is read until a record
            is needed.
        verify: whether to compare every file's sha256 with the manifest (reads everything once).
        cache_dir: keeps whole shards of a URL here, each fetched and verified when first needed.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        OSError: the URL does not answer.
        ValueError: the manifest or a file is missing, a file is cut or changed, the schema version
            is another, these are chats, or this kind of URL needs another package.
    """
    dataset = load_set(path, verify=verify, cache_dir=cache_dir)
    if dataset.kind != "records":
        raise ValueError(
            f"{path} holds chats; records are needed here, which `cloc-mllm data build` makes of "
            "conversations with --as regions"
        )
    return cast(RecordDataset, dataset)


def load_chats(
    path: str | Path, *, verify: bool = False, cache_dir: str | Path = ""
) -> ChatDataset:
    """Open a directory that `write_chats` made, or one of its files; see `load_records`."""
    dataset = load_set(path, verify=verify, cache_dir=cache_dir)
    if dataset.kind != "chats":
        raise ValueError(f"{path} holds records, chats are needed here")
    return cast(ChatDataset, dataset)


def load_set(
    path: str | Path, *, verify: bool = False, cache_dir: str | Path = ""
) -> RecordDataset | ChatDataset:
    """Open a set of either kind; see `load_records`."""
    place: Place = path if is_url(path) else Path(path)
    if str(place).endswith(".parquet") and (is_url(place) or Path(place).is_file()):
        file = _open_parquet(place)
        kind = (file.schema_arrow.metadata or {}).get(_KIND_KEY, b"records").decode()
        return _dataset([_Shard(place, file.metadata.num_rows)], kind)
    manifest = read_manifest(place)
    shards = []
    for entry in manifest["files"]:
        shard = _Shard(join(place, entry["name"]), entry["rows"], entry["sha256"], str(cache_dir))
        fault = _shard_fault(shard.place, entry, verify)
        if fault:
            raise ValueError(f"{shard.place} {fault}; {_REBUILD}")
        shards.append(shard)
    return _dataset(shards, manifest.get("kind", "records"))


def _dataset(shards: list[_Shard], kind: str) -> RecordDataset | ChatDataset:
    return ChatDataset(shards, "chats") if kind == "chats" else RecordDataset(shards, "records")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Reads the manifest of a data set and checks its schema version."""
    if not is_url(directory) and not Path(directory).is_dir():
        raise FileNotFoundError(f"no records at {directory}; make some with `cloc-mllm data build`")
    place = join(directory, MANIFEST_NAME)
    try:
        with open_binary(place) as file:
            manifest = json.load(file)
    except FileNotFoundError as error:
        raise ValueError(
            f"{directory} has no {MANIFEST_NAME}: not a directory that `cloc-mllm data build` "
            "finished"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON ({error}); build the data again") from error
    _require_version(manifest.get("schema_version"), place)
    return manifest


def _shard_fault(place: Place, expected: dict[str, Any], verify: bool) -> str | None:
    if isinstance(place, Path):  # asking a store about many shards, one by one, takes minutes
        if not place.is_file():
            return "is missing"
        size = place.stat().st_size
        if size != expected["bytes"]:
            return f"has {size:,} bytes, its manifest says {expected['bytes']:,}"
    if verify and sha256_of(place) != expected["sha256"]:
        return "differs from its manifest (sha256)"
    return None


def _open_parquet(place: Place) -> pq.ParquetFile:
    remote = is_url(place)
    source = open_binary(place) if remote else place
    try:
        file = pq.ParquetFile(  # pre_buffer: one request for a row group, not one for a column
            source, memory_map=not remote, pre_buffer=remote, page_checksum_verification=True
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{place} is not a whole Parquet file: {error}") from error
    version = (file.schema_arrow.metadata or {}).get(_VERSION_KEY)
    _require_version(int(version) if version else None, place)
    return file


def _require_version(version: Any, path: Place) -> None:
    if version != SCHEMA_VERSION:
        found = "no schema version" if version is None else f"schema version {version}"
        raise ValueError(
            f"{path} has {found}, this release reads version {SCHEMA_VERSION}; "
            "build the records again with `cloc-mllm data build`"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
