"""Reads what is labelled: records, or a folder, tar or zip of photos with their captions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.parquet import load_records, read_manifest
from cloc_mllm.data.readers.files import open_files, settle
from cloc_mllm.data.readers.names import is_image_name, without_suffix
from cloc_mllm.data.readers.photos import OTHER_FILES
from cloc_mllm.data.records import Record
from cloc_mllm.data.storage import is_url, sha256_of
from cloc_mllm.data.texts import decode, lines_of, read_rows

_NUM_EXAMPLES = 3  # names shown with a note


class Source(Protocol):
    """Images with captions in a fixed order.

    Attributes:
        notes: number of items of each sort that are not labelled.
        examples: the first few names of each sort.
    """

    notes: dict[str, int]
    examples: dict[str, list[str]]

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[Record]:
        """Reads images `start` to before `stop`, not validated; their regions are not used."""

    def fingerprint(self) -> str:
        """A text that changes when the images, their order or the file of captions change."""

    def has_captions(self) -> bool:
        """Whether any image has a caption."""


def open_source(images: str, captions: str = "", encoding: str = "") -> Source:
    """Opens records, or a folder, tar or zip of photos.

    Args:
        captions: a file of captions of photos; "" looks for NAME.txt beside each photo.
        encoding: encoding of texts without a byte order mark; "" is UTF-8.

    Raises:
        FileNotFoundError: there is nothing at `images`.
        ValueError: it holds no image, or `captions` cannot be used.
    """
    if not images:
        raise ValueError("nothing to label; name records or a folder of photos with --images")
    path = Path(images)
    is_records = is_url(images) or images.endswith(".parquet") or (path / "manifest.json").is_file()
    if not is_records:
        return _Photos(path, captions, encoding)
    if captions:
        raise ValueError(f"{images} holds records with captions of their own; leave out --captions")
    return _Records(images)


class _Records:
    def __init__(self, place: str) -> None:
        self.place = place
        self.records = load_records(place)
        self.notes: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

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
    """Photos at any depth. The id of a photo is its path below the folder."""

    def __init__(self, path: Path, captions: str, encoding: str) -> None:
        self.path = path
        self.encoding = encoding
        self._stack = ExitStack()
        self.files = self._stack.enter_context(open_files(path))
        self.names = [name for name in self.files.names() if is_image_name(name)]
        if not self.names:
            there = ", ".join(map(shown, self.files.names()[:_NUM_EXAMPLES])) or "nothing"
            raise ValueError(
                f"{path} holds no photo, but {there}; to label records, give the directory that "
                "`cloc-mllm data build` made"
            )
        self.notes: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}
        captioned = set() if captions else {f"{without_suffix(n)}.txt" for n in self.names}
        others = [n for n in self.files.names() if not is_image_name(n) and n not in captioned]
        self._note(OTHER_FILES, others)
        self.captions_file = captions
        self.captions = self._read_captions(captions) if captions else None

    def _note(self, what: str, names: list[str]) -> None:
        if names:
            self.notes[what] = len(names)
            self.examples[what] = [shown(name) for name in names[:_NUM_EXAMPLES]]

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
        beside = self.files.read(f"{without_suffix(name)}.txt") or b""
        text = decode(beside, name, self.encoding, "surrogateescape")
        return [line for line in lines_of(text) if line.strip()]

    def _read_captions(self, path: str) -> dict[str, list[str]]:
        """Reads the captions by photo; rows of photos that are not there are noted."""
        texts_of: dict[str, list[str]] = {}
        for place, row in read_rows(path, self.encoding):
            name = row.get("image") if isinstance(row, dict) else None
            texts = row.get("captions") if isinstance(row, dict) else None
            if not isinstance(name, str) or not isinstance(texts, list):
                raise ValueError(
                    f'{path}, {place}: expected {{"image": NAME, "captions": [TEXT, ...]}}, got '
                    f"{shown(row)}"
                )
            texts_of.setdefault(name, []).extend(texts)
        matches = settle(self.files, [(name,) for name in texts_of])
        captions: dict[str, list[str]] = {}
        for (name,), match in matches.items():
            if match.path:
                captions.setdefault(match.path, []).extend(texts_of[name])
        absent = [name for (name,), match in matches.items() if not match.path]
        if not captions:
            raise ValueError(
                f"{path} names no photo of {self.path}: its first is {next(iter(texts_of), None)!r}"
                f", the first photo is {self.names[0]!r}"
            )
        self._note("captioned images that are not there", absent)
        without = [name for name in self.names if name not in captions]
        self._note("photos that no row captions", without)
        return captions


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", errors="surrogateescape") + b"\n")
    return digest.hexdigest()
