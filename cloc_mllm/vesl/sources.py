"""What is labelled: records, or a folder, tar or zip of photos with their captions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Protocol

from cloc_mllm.data.parquet import load_records, read_manifest
from cloc_mllm.data.readers.files import IMAGE_SUFFIXES, open_files, read_rows
from cloc_mllm.data.records import Record
from cloc_mllm.data.storage import is_url, sha256_of


class Source(Protocol):
    """Images with captions in a fixed order.

    Attributes:
        notes: what it holds that is not labelled, with its number.
    """

    notes: dict[str, int]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[Record]:
        """Images `start` .. `stop`, not validated; their regions are not used."""

    def fingerprint(self) -> str:
        """Changes when the images, their order or the file of captions do."""

    def has_captions(self) -> bool:
        """Whether any image has one."""


def open_source(images: str, captions: str = "") -> Source:
    """
    Raises:
        FileNotFoundError: there is nothing at `images`.
        ValueError: it holds no image, or `captions` cannot be used.
    """
    if not images:
        raise ValueError("nothing to label; name records or a folder of photos with --images")
    path = Path(images)
    is_records = is_url(images) or images.endswith(".parquet") or (path / "manifest.json").is_file()
    if not is_records:
        return _Photos(path, captions)
    if captions:
        raise ValueError(f"{images} holds records with captions of their own; leave out --captions")
    return _Records(images)


class _Records:
    def __init__(self, place: str) -> None:
        self.place = place
        self.records = load_records(place)
        self.notes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.records)

    def read(self, start: int, stop: int) -> list[Record]:
        return [self.records[index] for index in range(start, stop)]

    def fingerprint(self) -> str:
        if self.place.endswith(".parquet"):
            return sha256_of(self.place)
        return _digest(file["sha256"] for file in read_manifest(self.place)["files"])

    def has_captions(self) -> bool:
        return any(record.captions for record in self.records)


class _Photos:
    """The id of a photo is its file name."""

    def __init__(self, path: Path, captions: str) -> None:
        self.path = path
        self._stack = ExitStack()
        self.files = self._stack.enter_context(open_files(path))
        names = self.files.names()
        self.names = sorted(n for n in names if n.lower().endswith(IMAGE_SUFFIXES))
        if not self.names:
            raise ValueError(
                f"{path} holds no photo ({', '.join(IMAGE_SUFFIXES)}); for records give the "
                "directory that `cloc-mllm data build` made"
            )
        self.captions_file = captions
        self.captions = _read_captions(captions) if captions else None
        if self.captions is not None and not self.captions.keys() & set(self.names):
            raise ValueError(
                f"no image of {captions} is in {path}: its first is "
                f"{next(iter(self.captions), None)!r}, the first photo is {self.names[0]!r}"
            )
        num_absent = len((self.captions or {}).keys() - set(self.names))
        self.notes = {"captioned images that are not there": num_absent} if num_absent else {}

    def __len__(self) -> int:
        return len(self.names)

    def read(self, start: int, stop: int) -> list[Record]:
        return [
            Record(name, self.files.read(name) or b"", 0, 0, self._captions(name), [], "photos")
            for name in self.names[start:stop]
        ]

    def fingerprint(self) -> str:
        captions = sha256_of(Path(self.captions_file)) if self.captions_file else ""
        return _digest([captions, *self.names])

    def has_captions(self) -> bool:
        return any(self._captions(name) for name in self.names)

    def _captions(self, name: str) -> list[str]:
        if self.captions is not None:
            return self.captions.get(name, [])
        beside = self.files.read(f"{PurePosixPath(name).stem}.txt") or b""
        lines = beside.decode("utf-8", errors="surrogateescape").splitlines()
        return [line for line in lines if line.strip()]


def _read_captions(path: str) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for place, row in read_rows(path):
        name = row.get("image") if isinstance(row, dict) else None
        texts = row.get("captions") if isinstance(row, dict) else None
        if not isinstance(name, str) or not isinstance(texts, list):
            raise ValueError(
                f'{path}, {place}: expected {{"image": NAME, "captions": [TEXT, ...]}}, got '
                f"{'no valid JSON' if row is None else str(row)[:80]}"
            )
        captions.setdefault(PurePosixPath(name).name, []).extend(texts)
    return captions


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", errors="surrogateescape") + b"\n")
    return digest.hexdigest()
