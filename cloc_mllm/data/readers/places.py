"""Looks at the files of a path, without reading all of them, to find how a source may read them.

A reader's module has a `looks_like_...(place)` that yields a `Reading` for each way in which the
source could read the place; `data.sources.LOOKS` lists them. Keys and file names decide here.
Whether the numbers fit is judged afterwards, by what the reader delivers (`data.checks.judge`).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cloc_mllm.data.readers.boxes import BoxOrder
from cloc_mllm.data.readers.files import open_files, split_archive
from cloc_mllm.data.readers.names import is_image_name
from cloc_mllm.data.texts import read_json, read_rows
from cloc_mllm.data.values import as_dict

Row = dict[str, Any]
ROW_SUFFIXES = (".json", ".jsonl", ".ndjson", ".odgt", ".csv", ".tsv")
_TABLE_SUFFIXES = (*ROW_SUFFIXES, ".xml", ".p", ".zip")
_IMAGE_FOLDERS = ("images", "JPEGImages", "train2017", "val2017")
_ANNOTATION_FOLDERS = ("annotations", "annotation", "labels", "json")
_NUM_ROWS = 200  # rows of a file that are looked at
_NUM_LOOKED_AT = 20_000  # files of a folder that are searched for an image
_MAX_ALIKE = 20  # if a folder has more files of one suffix, they are one file per image


class Reading(NamedTuple):
    """One way to read a place.

    Attributes:
        why: the evidence for it, for people.
        options: options of `cloc-mllm data build SOURCE`, by name; True for a switch.
        frame: the frame of the boxes, a name of `checks.frames`; "" if there is no box or the
            reader alone knows.
        order: the order of the four numbers.
        needs_images: whether --images must be found and added.
        lacks: an option that it needs and that is missing, with its meaning; "" for none.
        doubt: why the format may be another one nevertheless; "" for no reason.
        is_general: whether any other source that reads the file counts more.
        is_declared: whether the format has this frame and order; off if they are guesses.
    """

    why: str
    options: Mapping[str, Any]
    frame: str = ""
    order: BoxOrder = "xyxy"
    needs_images: bool = True
    lacks: str = ""
    doubt: str = ""
    is_general: bool = False
    is_declared: bool = True


class Place:
    """A file, a folder, an archive, or a file or folder in one.

    Args:
        encoding: encoding of text files without a byte order mark; "" is UTF-8.
        is_named: whether the user named it; off for a file that was found in what they named.
    """

    def __init__(self, path: str | Path, encoding: str = "", *, is_named: bool = True) -> None:
        self.path = Path(path)
        self.encoding = encoding
        self.is_named = is_named
        archive, below = split_archive(self.path)
        self._archive = archive if below else None  # in which it lies
        self._may_hold_files = bool(below) or self.path.is_dir() or _is_archive(self.path)

    @cached_property
    def names(self) -> list[str]:
        """The files below, sorted; none if this is a file."""
        if not self._may_hold_files:
            return []
        try:
            with open_files(self.path) as files:
                return files.names()
        except FileNotFoundError:  # a file in an archive
            return []

    def read(self, names: Sequence[str]) -> Iterator[bytes]:
        """Reads the content of files below."""
        if not names:
            return
        with open_files(self.path) as files:
            for name in names:
                yield files.read(name) or b""

    def tables(self) -> list[Path]:
        """The files below that may be annotations of many images."""
        alike: dict[tuple[str, str], list[str]] = {}
        for name in self.names:
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in _TABLE_SUFFIXES:
                alike.setdefault((str(PurePosixPath(name).parent), suffix), []).append(name)
        few = [names for names in alike.values() if len(names) <= _MAX_ALIKE]
        return [self.path / name for name in sorted(itertools.chain.from_iterable(few))]

    def sibling(self, name: str) -> Path | None:
        """The file of this name beside this one; None if there is none."""
        other = self.path.with_name(name)
        if self._archive is None:
            return other if other.is_file() else None
        with open_files(self._archive) as files:
            is_there = files.has(other.relative_to(self._archive).as_posix())
        return other if is_there else None

    def siblings(self, suffix: str) -> list[Path]:
        """The other files of a suffix beside this one, on the disk."""
        found = sorted(self.path.parent.glob(f"*{suffix}")) if self._archive is None else []
        return [path for path in found if path != self.path]

    @cached_property
    def rows(self) -> list[Row]:
        """The first rows of a JSON list, JSON lines or a CSV file; none of another file."""
        if self.names or self.path.suffix.lower() not in ROW_SUFFIXES:
            return []
        rows = [row for _, row in itertools.islice(read_rows(self.path, self.encoding), _NUM_ROWS)]
        objects = [row for row in rows if isinstance(row, dict)]
        return objects if 2 * len(objects) > len(rows) else []

    @cached_property
    def table(self) -> Row:
        """The object that a JSON file holds; an empty one for another file."""
        if self.names or self.path.suffix.lower() != ".json" or len(self.rows) > 1:
            return {}
        return self.rows[0] if self.rows else as_dict(read_json(self.path, self.encoding))

    def has_rows_with(self, *keys: str) -> bool:
        """Whether most of the rows have all of these keys."""
        num_with = sum(all(key in row for key in keys) for row in self.rows)
        return 2 * num_with > len(self.rows)

    def mentions(self, text: str) -> bool:
        """Whether a row has this text in it."""
        return any(text in json.dumps(row, ensure_ascii=False, default=str) for row in self.rows)

    def image_places(self) -> list[Path]:
        """Lists places where the images may lie if nothing says it, the likeliest first."""
        inside = [self.path / name for name in _IMAGE_FOLDERS] + [self.path] if self.names else []
        folder = self.path.parent
        beside = [*(folder / name for name in _IMAGE_FOLDERS), folder]
        if self._archive is None:
            beside += [path for path in sorted(folder.glob("*")) if _is_archive(path)]
        if folder.resolve().name.lower() in _ANNOTATION_FOLDERS:
            above = folder.parent if folder.name else Path("..")  # of the working directory
            beside += [*(above / name for name in _IMAGE_FOLDERS), above]
        return [place for place in dict.fromkeys(inside + beside) if _holds_images(place)]


def _is_archive(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".zip", ".tar")


def _holds_images(place: Path) -> bool:
    if place.is_dir():  # which may be large, so the first image ends the walk
        walk = itertools.chain.from_iterable(names for _, _, names in os.walk(place))
        return any(map(is_image_name, itertools.islice(walk, _NUM_LOOKED_AT)))
    try:
        with open_files(place) as files:
            return any(map(is_image_name, files.names()))
    except (FileNotFoundError, ValueError):
        return False
