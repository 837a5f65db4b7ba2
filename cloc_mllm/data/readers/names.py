"""File names as annotation files write them, and which of the files at hand they mean.

Nothing here reads a file: names and paths are texts, paths have `/` between their parts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from cloc_mllm.data.values import id_key

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".mpo", ".avif", ".heic", ".heif"),
)
_SCHEME = re.compile(r"^(?P<scheme>[a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_DRIVE = re.compile(r"^/*[a-z]:/", re.IGNORECASE)
_LOCAL_FILES = "/data/local-files/?d="  # Label Studio's address of a file on its disk
_UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-(?=.)")  # Label Studio's, of an uploaded file

# how a name that is no path of a file was matched, in the order in which they are tried
SPELLING = "file names written otherwise (slashes, quoting, prefixes)"
DEEPER = "file names found in a folder below"
TAIL = "file names found by the end of their path alone"
CASE = "file names found by another letter case or Unicode form"
SUFFIX = "file names found under another suffix"


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def without_suffix(name: str) -> str:
    """Cuts the suffix of an image off; another one is part of the name."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name


def plain_path(name: str) -> str:
    """Rewrites a name as a relative path: no drive, address, `.` or `..`, and `/` as separator."""
    text = name.strip(" \t\r\n\ufeff")
    if _LOCAL_FILES in text:
        text = text.partition(_LOCAL_FILES)[2]
    if scheme := _SCHEME.match(text):
        text = text[scheme.end() :]
        if scheme["scheme"].lower() in ("http", "https"):
            text = re.split(r"[?#]", text, maxsplit=1)[0]
    return relative_path(_DRIVE.sub("", text.replace("\\", "/")))


def relative_path(path: str) -> str:
    """Takes out what leads nowhere or up: `/a/./b`, `../a/b` and `a\\b` are `a/b`."""
    parts: list[str] = []
    for part in path.replace("\\", "/").split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def spellings(name: str) -> list[str]:
    """Lists the paths that a name may mean, the likeliest first.

    The name with plain separators, without URL-quoting, then without Label Studio's prefix.
    """
    found = [plain_path(name)]
    if "%" in name:
        found.append(plain_path(unquote(name)))
    for path in list(found):
        folder, slash, base = path.rpartition("/")
        found.append(f"{folder}{slash}{_UPLOAD_PREFIX.sub('', base)}")
    return list(dict.fromkeys(path for path in found if path))


def name_to_id(name: Any) -> str:
    """Makes the id of an image that is known by its file alone: its path without suffix."""
    return without_suffix(plain_path(id_key(name) or ""))


def ids_of_names(names: Iterable[Any]) -> dict[Any, str]:
    """Makes an id of each name; names that differ in their suffix alone keep it."""
    names = list(names)
    by_id: dict[str, set[str]] = {}
    for name in names:
        by_id.setdefault(name_to_id(name), set()).add(plain_path(id_key(name) or ""))
    return {
        name: found
        if len(by_id[found := name_to_id(name)]) == 1
        else plain_path(id_key(name) or "")
        for name in names
    }


def may_be_same(name: str, other: str) -> bool:
    """Whether two plain paths may be spellings of one: all but case, form and suffix is equal."""
    suffixes = {folded(path)[len(folded(without_suffix(path))) :] for path in (name, other)}
    is_same_stem = folded(without_suffix(name)) == folded(without_suffix(other))
    return is_same_stem and len(suffixes - {""}) <= 1


def folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


class Found(NamedTuple):
    """The paths that fit a name best.

    Attributes:
        is_whole: the whole name is the end of these paths, not its own end alone.
        difference: `DEEPER`, `TAIL`, `CASE` or `SUFFIX`; "" where the name but lacks a suffix.
    """

    paths: list[str]
    is_whole: bool
    difference: str


class PathIndex:
    """Finds paths by the longest end of a name that they share, in any case, form and suffix.

    One table per length of an end is made when a name first asks for it.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(paths)
        self._depth = max((_num_parts(path) for path in self.paths), default=0)
        self._tables: dict[int, dict[str, list[str]]] = {}

    def find(self, name: str) -> Found | None:
        """Finds a plain path; None where no file shares its last part."""
        parts = name.split("/")
        for length in range(min(len(parts), self._depth), 0, -1):
            tail = "/".join(parts[-length:])
            if paths := self._table(length).get(_tail_key(tail)):
                distance = {path: _distance(tail, path) for path in paths}
                nearest = min(distance.values())
                best = [path for path in paths if distance[path] == nearest]
                is_whole = length == len(parts)
                is_all = is_whole and without_suffix(best[0]) == without_suffix(name)
                alike = "" if is_all else DEEPER if is_whole else TAIL
                return Found(best, is_whole, (alike, alike, CASE, CASE, SUFFIX)[nearest])
        return None

    def _table(self, length: int) -> dict[str, list[str]]:
        if length not in self._tables:
            table: dict[str, list[str]] = {}
            for path in self.paths:
                parts = relative_path(path).split("/")  # a name may hold a Windows path
                if len(parts) >= length:
                    table.setdefault(_tail_key("/".join(parts[-length:])), []).append(path)
            self._tables[length] = table
        return self._tables[length]


def _num_parts(path: str) -> int:
    return relative_path(path).count("/") + 1


def _tail_key(tail: str) -> str:
    return folded(without_suffix(tail))


def _distance(tail: str, path: str) -> int:
    """0: the path ends in the tail; 1: but for a suffix, of which the tail has none; 2: in another
    Unicode form; 3: in another case; 4: with another suffix."""
    end = "/".join(relative_path(path).split("/")[-(tail.count("/") + 1) :])
    if end == tail:
        return 0
    if without_suffix(end) == tail:
        return 1
    if unicodedata.normalize("NFC", end) == unicodedata.normalize("NFC", tail):
        return 2
    return 3 if folded(end) == folded(tail) else 4
