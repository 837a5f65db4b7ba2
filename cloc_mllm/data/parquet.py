"""Records on disk: Parquet shards with Hugging Face `datasets` features and a manifest.

A data set is a directory of `shard-00000.parquet ...` and `manifest.json`. It appears under its
name only when it is whole: it is built beside it and renamed. Any Parquet reader opens the
shards; `datasets.load_dataset("parquet", data_files=...)` decodes the images as well.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cloc_mllm import __version__
from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.records import SCHEMA_VERSION, Record, Region

if TYPE_CHECKING:
    from datasets import Features

MANIFEST_NAME = "manifest.json"
DROPS_NAME = "drops.jsonl"
ROW_GROUP_ROWS = 16  # what one random access reads; small, as an image set wants it
CACHE_BYTES = 256 << 20  # row groups that one process keeps, so a small set is read once
_VERSION_KEY = b"cloc_mllm.schema_version"


class RefusedBuildError(ValueError):
    """A build whose source gave no record, or lost more of them than it may; nothing is kept."""


def record_features() -> Features:
    """The `datasets` features of a record: what the Parquet columns are."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    region = {
        "box": List(Value("float64"), length=4),
        "phrase": text,
        "score": Value("float64"),
        "expressions": List(text),
        "category": text,
        "group": text,
    }
    return Features(
        {
            "id": text,
            "image": Image(),
            "width": Value("int32"),
            "height": Value("int32"),
            "captions": List(text),
            "regions": List(region),
            "source": text,
        }
    )


def write_records(
    records: Iterable[Record],
    directory: str | Path,
    *,
    shard_size: int = 1000,
    arguments: dict[str, Any] | None = None,
    drop_log: DropLog | None = None,
    max_drop_share: float = 1.0,
) -> int:
    """Write records (already through `validate_record`) as a new data set.

    Args:
        directory: must not exist, or be an empty folder.
        arguments: how the records were made (source, seed, ...), for the manifest.
        drop_log: the account that the records' reader keeps; read when `records` is exhausted.
        max_drop_share: largest share of dropped records that is still delivered.

    Returns:
        the number of records written.

    Raises:
        RefusedBuildError: no usable record, or more was dropped than allowed.
        ValueError: the directory is taken.
    """
    directory = Path(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(
            f"{directory} already exists; name another directory or remove this one first"
        )
    drop_log = drop_log or DropLog()
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        files = _write_shards(records, partial, shard_size)
        num_records = sum(file["rows"] for file in files)
        _refuse_bad_build(num_records, drop_log, max_drop_share)
        drop_log.write(partial / DROPS_NAME)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "cloc_mllm_version": __version__,
            "num_records": num_records,
            "arguments": arguments or {},
            "dropped": drop_log.counts,
            "notes": dict(drop_log.notes),
            "files": files,
        }
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(directory)  # replaces an empty folder, fails on any other
        _fsync(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return num_records


def _refuse_bad_build(num_records: int, drop_log: DropLog, max_drop_share: float) -> None:
    share = drop_log.drop_share()
    if share > max_drop_share:
        raise RefusedBuildError(
            f"{drop_log.num_dropped('record'):,} records ({share:.1%}) were dropped, at most "
            f"{max_drop_share:.1%} may be; nothing was written. Mend the source, or allow it "
            "with a larger --max-drop-share (max_drop_share)"
        )
    if num_records == 0:
        raise RefusedBuildError("the source holds no record that can be used; nothing was written")


def _write_shards(
    records: Iterable[Record], directory: Path, shard_size: int
) -> list[dict[str, Any]]:
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    schema = record_features().arrow_schema
    schema = schema.with_metadata({**schema.metadata, _VERSION_KEY: str(SCHEMA_VERSION).encode()})
    files: list[dict[str, Any]] = []
    stream = iter(records)
    while first := next(stream, None):
        path = directory / f"shard-{len(files):05d}.parquet"
        shard = itertools.chain([first], itertools.islice(stream, shard_size - 1))
        rows = _write_shard(shard, path, schema)
        files.append(
            {
                "name": path.name,
                "rows": rows,
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
        )
    return files


def _write_shard(records: Iterator[Record], path: Path, schema: pa.Schema) -> int:
    rows = 0
    # image files are compressed already, and a checksum a page catches bit rot when it is read
    columns = [name for name in schema.names if name != "image"]
    compression = {"image.bytes": "none", **dict.fromkeys(columns, "zstd")}
    with pq.ParquetWriter(
        path, schema, compression=compression, use_dictionary=False, write_page_checksum=True
    ) as writer:
        while group := list(itertools.islice(records, ROW_GROUP_ROWS)):
            table = pa.Table.from_pylist([_to_row(record) for record in group], schema=schema)
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            rows += len(group)
    return rows


def _to_row(record: Record) -> dict[str, Any]:
    row = dict(vars(record))
    row["image"] = {"bytes": record.image, "path": None}
    row["regions"] = [vars(region) for region in record.regions]
    return row


def _from_row(row: dict[str, Any]) -> Record:
    regions = [Region(**{**region, "box": tuple(region["box"])}) for region in row["regions"]]
    return Record(**{**row, "image": row["image"]["bytes"], "regions": regions})


class RecordDataset(Sequence[Record]):
    """Records of Parquet shards by index.

    Shards are memory-mapped and read a row group (16 records) at a time, so a set may be larger
    than the memory. Images stay encoded. It pickles as its list of files: a loader's workers
    open their own.
    """

    def __init__(self, paths: Sequence[Path], num_rows: Sequence[int]) -> None:
        self.paths = list(paths)
        self._ends = list(itertools.accumulate(num_rows))
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups: dict[tuple[int, int], pa.Table] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, position)
        row = position - (self._ends[shard - 1] if shard else 0)
        table = self._read_group(shard, row // ROW_GROUP_ROWS)
        return _from_row(table.slice(row % ROW_GROUP_ROWS, 1).to_pylist()[0])

    def _read_group(self, shard: int, group: int) -> pa.Table:
        if (shard, group) not in self._groups:
            if shard not in self._files:
                self._files[shard] = _open_shard(self.paths[shard])
            table = self._files[shard].read_row_group(group, use_threads=False)
            if self._cached_bytes + table.nbytes > CACHE_BYTES:
                self._groups, self._cached_bytes = {}, 0
            self._groups[shard, group] = table
            self._cached_bytes += table.nbytes
        return self._groups[shard, group]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}, "_groups": {}, "_cached_bytes": 0}


def load_records(path: str | Path, *, verify: bool = False) -> RecordDataset:
    """Open a directory that `write_records` made, or one of its Parquet files.

    Args:
        verify: also compare every file's sha256 with the manifest (reads everything once).

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: no manifest, a missing, cut or changed file, or another schema version.
    """
    path = Path(path)
    if path.is_file():
        return RecordDataset([path], [_open_shard(path).metadata.num_rows])
    manifest = read_manifest(path)
    paths = [path / file["name"] for file in manifest["files"]]
    for file, shard in zip(manifest["files"], paths, strict=True):
        fault = _shard_fault(shard, file, verify)
        if fault:
            raise ValueError(
                f"{shard} {fault}; the data set is damaged: build it again with "
                "`cloc-mllm data build`"
            )
    return RecordDataset(paths, [file["rows"] for file in manifest["files"]])


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a data set, its schema version checked."""
    path = Path(directory) / MANIFEST_NAME
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no records at {directory}; make some with `cloc-mllm data build`")
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {MANIFEST_NAME}: not a directory that `cloc-mllm data build` "
            "finished"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); build the data again") from error
    _require_version(manifest.get("schema_version"), path)
    return manifest


def _shard_fault(path: Path, expected: dict[str, Any], verify: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"has {size:,} bytes, its manifest says {expected['bytes']:,}"
    if verify and _sha256(path) != expected["sha256"]:
        return "differs from its manifest (sha256)"
    return None


def _open_shard(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}") from error
    version = (file.schema_arrow.metadata or {}).get(_VERSION_KEY)
    _require_version(int(version) if version else None, path)
    return file


def _require_version(version: Any, path: Path) -> None:
    if version != SCHEMA_VERSION:
        found = "no schema version" if version is None else f"schema version {version}"
        raise ValueError(
            f"{path} has {found}, this release reads version {SCHEMA_VERSION}; "
            "build the records again with `cloc-mllm data build`"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
