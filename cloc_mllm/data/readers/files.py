"""Files of a folder, a tar or a zip, each known by its path below it.

Archives are read in memory, never extracted. `Files.read` takes such a path; `Files.match` finds
the file that a name, as annotations write it, means.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.readers.names import (
    SPELLING,
    Found,
    PathIndex,
    is_image_name,
    may_be_same,
    plain_path,
    relative_path,
    spellings,
)

MAX_FILE_BYTES = 64 << 20  # of one file in a folder or an archive; larger ones are not read
MAX_ANNOTATION_BYTES = 2 << 30  # of one annotation file in an archive
# the last two: an encrypted member, an unknown compression
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)
_NUM_SHOWN = 3  # candidates in a message
Names = tuple[str, ...]  # what may name a file, the surest first


class Match(NamedTuple):
    """The file that a name means.

    Attributes:
        path: below the folder or in the archive; "" for none.
        name: the one of several names that found it, as a plain path.
        difference: "" for the path itself, else how the name differs from it.
        rank: 0: the name is the path; 1: but for its spelling; 2: the whole name is the end of the
            path, in some case and with some suffix; 3: the ends of both are alike.
        fault: `missing_image` or `ambiguous_image` where there is no path.
        found: what was sought and what is there, for the message.
    """

    path: str
    name: str = ""
    difference: str = ""
    rank: int = 0
    fault: str = ""
    found: str = ""


class _Store(Protocol):
    def has(self, path: str) -> bool: ...

    def read(self, path: str, max_bytes: int) -> bytes | None: ...

    def paths(self) -> Iterable[str]: ...


class Files:
    """The files of a store.

    Args:
        root: parts of the folder's own path: names may start above it.
    """

    def __init__(self, store: _Store, root: Sequence[str] = ()) -> None:
        self._store = store
        self._root = list(root)
        self._listed: list[str] | None = None
        self._index: PathIndex | None = None

    def names(self) -> list[str]:
        """All paths, sorted; hidden files are left out. They are listed once."""
        if self._listed is None:
            self._listed = sorted(filter(_is_visible, self._store.paths()))
        return self._listed

    def read(self, path: str, max_bytes: int | None = None) -> bytes | None:
        """The content of a path of `names`; None where there is none, or a larger one than
        `max_bytes`, by default `MAX_FILE_BYTES`."""
        return self._store.read(path, MAX_FILE_BYTES if max_bytes is None else max_bytes)

    def has(self, path: str) -> bool:
        return self._store.has(path)

    def match(self, *names: str) -> Match:
        """Finds the file that one of the names means; the first that finds any counts.

        The exact path wins, then the path but for its spelling, then the path with a part of the
        folder's own in front, then paths that end in the whole name, in any letter case and with
        any image's suffix or none, at last the longest end that a name and a path share. Files are
        listed only when an exact path fails. Where several fit alike, none is taken.
        """
        several = None
        for max_rank in (2, 3):
            for name in names:
                match = self._match(name, max_rank)
                if match.path:
                    return match
                if match.fault and several is None:
                    several = match
            if several is not None:
                return several
        sought = ", ".join(map(shown, names)) or "an image without a name"
        return Match("", fault="missing_image", found=f"{sought}; {self._holds}")

    def _match(self, name: str, max_rank: int) -> Match:
        if self._store.has(name):
            return Match(name, name)
        for path in self._spelled(name):
            if self._store.has(path):
                return Match(path, plain_path(name), SPELLING, 1)
        if self._index is None:
            self._index = PathIndex(self.names())
        for path in spellings(name):
            found = self._index.find(path)
            if found is not None and (found.is_whole or max_rank == 3):
                return _found_match(name, found)
        return Match("")

    def _spelled(self, name: str) -> Iterator[str]:
        """The paths a name may mean but for its spelling, also from a folder above."""
        for path in spellings(name):
            yield path
            parts = path.split("/")
            for length in range(min(len(parts) - 1, len(self._root)), 0, -1):
                if parts[:length] == self._root[-length:]:
                    yield "/".join(parts[length:])

    @cached_property
    def _holds(self) -> str:
        """Names some files that are there instead, to compare a name with."""
        images = [path for path in self.names() if is_image_name(path)]
        if not images:
            return "there is no image file"
        return f"there are {len(images):,} image files, such as {shown(images[0])}"


def _found_match(name: str, found: Found) -> Match:
    rank = 2 if found.is_whole else 3
    if len(found.paths) == 1:
        return Match(found.paths[0], plain_path(name), found.difference, rank)
    listed = ", ".join(map(shown, found.paths[:_NUM_SHOWN]))
    num_more = len(found.paths) - _NUM_SHOWN
    more = f" or {num_more:,} more" if num_more > 0 else ""
    said = f"{shown(name)}, which may be {listed}{more}"
    return Match("", rank=rank, fault="ambiguous_image", found=said)


def settle(files: Files, items: Iterable[Names]) -> dict[Names, Match]:
    """Matches the names of all items; different names that would share a file get none.

    Annotations may name files of one name in different folders, of which only one is there: a name
    that is a path, but for its spelling, keeps its file, and one that found it by its end does not.
    """
    matches = {names: files.match(*names) for names in dict.fromkeys(items)}
    claims: dict[str, dict[str, int]] = {}  # path -> name -> rank
    for match in matches.values():
        if match.path:
            claims.setdefault(match.path, {})[match.name] = match.rank
    return {names: _settled(match, claims.get(match.path, {})) for names, match in matches.items()}


def _settled(match: Match, claims: dict[str, int]) -> Match:
    rivals = [
        name
        for name, rank in claims.items()
        if match.rank > 1 and rank <= match.rank and not may_be_same(name, match.name)
    ]
    if not rivals:
        return match
    found = f"{shown(match.name)}, which may be {shown(match.path)}, as may {shown(rivals[0])}"
    return Match("", match.name, rank=3, fault="ambiguous_image", found=found)


@contextmanager
def open_files(path: str | Path, under: str = "") -> Iterator[Files]:
    """Opens a folder, a tar or a zip, or a folder in one (`set.zip/train`), with all below it.

    Args:
        under: only what lies in a folder of this name; paths start below it.

    Raises:
        FileNotFoundError: nothing at `path`, or a folder without `under`.
        ValueError: not an archive, a damaged one, or two members of one path.
    """
    path, below = split_archive(path)
    if path.is_dir():
        folder = path / under
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} has no folder {under!r}")
        yield Files(_Folder(folder), folder.resolve().parts[1:])
    elif not path.exists():
        raise FileNotFoundError(f"no such folder or archive: {path}")
    else:
        with _open_archive(path) as archive:
            store: _Zip | _Tar
            if isinstance(archive, zipfile.ZipFile):
                store = _Zip(path, archive, below, under)
            else:
                store = _Tar(path, archive, below, under)
            if below and not store.members:
                raise FileNotFoundError(f"{path} has no folder {below!r}")
            yield Files(store, below.split("/") if below else ())


def split_archive(path: str | Path) -> tuple[Path, str]:
    """Parts `set.zip/train/a.json` into the archive and the path in it, "" for all of it.

    What is on the disk under this path stays whole, and so does what is nowhere.
    """
    path = Path(path)
    if not path.exists():
        for above in path.parents:
            if above.is_file():
                return above, path.relative_to(above).as_posix()
    return path, ""


def read_annotation_file(path: str | Path) -> bytes:
    """Reads a file on the disk or in an archive (`set.zip/train/a.json`).

    Raises:
        FileNotFoundError: there is none, or a larger one than `MAX_ANNOTATION_BYTES` in an archive.
        ValueError: the archive is damaged, or none.
    """
    archive, below = split_archive(path)
    if not below:
        return archive.read_bytes()
    with open_files(archive) as files:
        data = files.read(below, MAX_ANNOTATION_BYTES)
    if data is None:
        raise FileNotFoundError(f"{archive} has no file {below!r} that can be read")
    return data


def read_image(files: Files, name: str) -> bytes:
    """The file that a name means; b"" (a missing image) where none does, or several may."""
    match = files.match(name)
    return (files.read(match.path) or b"") if match.path else b""


def _open_archive(path: Path) -> zipfile.ZipFile | tarfile.TarFile:
    try:
        if zipfile.is_zipfile(path):
            return zipfile.ZipFile(path)
        return tarfile.open(path, "r:")
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(
            f"{path} is no folder, zip or uncompressed tar ({error}); unpack what is compressed"
        ) from error


def _is_visible(path: str) -> bool:
    """Leaves out `.DS_Store`, `._x` and `__MACOSX/`, which macOS adds, and other hidden files."""
    parts = path.split("/")
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, path: str) -> bool:
        is_inside = not any(part in ("", ".", "..") for part in path.split("/"))
        return is_inside and os.path.isfile(self.folder / path)

    def read(self, path: str, max_bytes: int) -> bytes | None:
        file = self.folder / path
        if not self.has(path) or file.stat().st_size > max_bytes:
            return None
        return file.read_bytes()

    def paths(self) -> Iterator[str]:
        """Walks through the folder, links to folders included, each folder once."""
        top = str(self.folder)
        seen: set[tuple[int, int]] = set()
        for folder, below, names in os.walk(top, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                below.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            below[:] = [name for name in below if _is_visible(name)]
            start = os.path.relpath(folder, top).replace(os.sep, "/")
            prefix = "" if start == "." else f"{start}/"
            yield from (prefix + name for name in names)


class _Zip:
    def __init__(self, path: Path, archive: zipfile.ZipFile, below: str, under: str) -> None:
        self.path, self.archive = path, archive
        members = ((info.filename, info) for info in archive.infolist() if not info.is_dir())
        self.members = _by_path(path, members, below, under)

    def has(self, path: str) -> bool:
        return path in self.members

    def paths(self) -> Iterable[str]:
        return self.members

    def read(self, path: str, max_bytes: int) -> bytes | None:
        info = self.members.get(path)
        if info is None or info.file_size > max_bytes:
            return None
        try:
            with self.archive.open(info) as file:  # a lying header is cut off by the limit
                return file.read(max_bytes)
        except _ZIP_ERRORS as error:
            raise ValueError(f"{self.path} is damaged at {info.filename!r}: {error}") from error


class _Tar:
    def __init__(self, path: Path, archive: tarfile.TarFile, below: str, under: str) -> None:
        self.archive = archive
        try:
            regular = [info for info in archive.getmembers() if info.isreg()]
        except tarfile.TarError as error:
            raise ValueError(f"{path} is a damaged tar: {error}; fetch it again") from error
        require_end_mark(path, archive)
        members = ((info.name, info) for info in regular)
        self.members = _by_path(path, members, below, under)

    def has(self, path: str) -> bool:
        return path in self.members

    def paths(self) -> Iterable[str]:
        return self.members

    def read(self, path: str, max_bytes: int) -> bytes | None:
        info = self.members.get(path)
        if info is None or info.size > max_bytes:
            return None
        file = self.archive.extractfile(info)  # a view of the member: nothing goes to disk
        return file.read() if file is not None else None


def require_end_mark(path: Path, archive: tarfile.TarFile) -> None:
    """Call it after the last member: ValueError where the tar does not end there.

    tarfile takes a cut or damaged header for the end, which would lose the rest silently.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(
            f"{path} is a damaged tar: no header and no end mark at byte {archive.offset:,}; "
            "fetch it again"
        )


def _by_path(
    archive: Path, members: Iterable[tuple[str, Any]], below: str, under: str
) -> dict[str, Any]:
    """Members by their path, which never leaves the archive: `../../x` is `x`.

    Args:
        below: only those of this folder of the archive; paths start below it.
        under: only those in a folder of this name, at any depth.
    """
    found: dict[str, Any] = {}
    top = below.split("/") if below else []
    for name, member in members:
        parts = relative_path(name).split("/")
        if parts[: len(top)] != top:
            continue
        parts = parts[len(top) :]
        if under:
            parts = parts[parts.index(under) + 1 :] if under in parts[:-1] else []
        path = "/".join(parts)
        if not path or not _is_visible(path):
            continue
        if path in found:
            raise ValueError(f"{archive} holds two files named {path!r}; which one is meant?")
        found[path] = member
    return found
