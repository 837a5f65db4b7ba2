"""Files by name from a folder, a tar or a zip. Archives are read in memory, never extracted."""

from __future__ import annotations

import json
import tarfile
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

MAX_FILE_BYTES = 64 << 20  # of one file in a folder or an archive; larger ones count as missing
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# the last two: an encrypted member, an unknown compression
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)


class Files(Protocol):
    """Readable files, each known by its last path component; a folder takes paths below it too."""

    def names(self) -> Iterable[str]: ...

    def read(self, name: str) -> bytes | None:
        """The content, or None where there is no such file."""


@contextmanager
def open_files(path: str | Path, under: str = "") -> Iterator[Files]:
    """Open a folder (its direct files), a tar or a zip (regular members at any depth).

    Args:
        under: only what lies in a folder of this name.

    Raises:
        FileNotFoundError: nothing at `path`, or a folder without `under`.
        ValueError: not an archive, a damaged one, or two members of one name.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / under
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} has no folder {under!r}")
        yield _Folder(folder)
    elif not path.exists():
        raise FileNotFoundError(f"no such folder or archive: {path}")
    else:
        with _open_archive(path) as archive:
            if isinstance(archive, zipfile.ZipFile):
                yield _Zip(path, archive, under)
            else:
                yield _Tar(path, archive, under)


def _open_archive(path: Path) -> zipfile.ZipFile | tarfile.TarFile:
    try:
        if zipfile.is_zipfile(path):
            return zipfile.ZipFile(path)
        return tarfile.open(path, "r:")
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(f"{path} is no folder, zip or uncompressed tar ({error})") from error


def read_image(files: Files, name: str) -> bytes:
    """The file `name`, or `name` with an image suffix; b"" (a missing image) where none is."""
    for suffix in ("", *IMAGE_SUFFIXES):
        data = files.read(name + suffix)
        if data is not None:
            return data
    return b""


def read_json(path: str | Path) -> Any:
    """A JSON file; ValueError names the file that is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:  # also of what is no UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(id for messages, row) of a JSON list, or of JSON lines, where a line that is none is None.

    Raises:
        ValueError: a file that starts as a JSON list and is not valid JSON.
    """
    with open(path, "rb") as file:
        start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if start == b"[":
            yield from ((f"row {index}", row) for index, row in enumerate(read_json(path)))
            return
        file.seek(0)
        for index, line in enumerate(file):
            if line.strip():
                yield f"line {index + 1}", _json_or_none(line)


def _json_or_none(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def parse_xml(data: bytes) -> ET.Element:
    """`ET.ParseError` for what is no XML, and for document types: entities can blow up."""
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ET.ParseError("document type declarations are refused")
    try:
        return ET.fromstring(data)
    except (ValueError, LookupError) as error:  # an encoding that is unknown
        raise ET.ParseError(str(error)) from error


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> Iterable[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def read(self, name: str) -> bytes | None:
        below = PurePosixPath(name)
        inside = not below.is_absolute() and ".." not in below.parts
        path = (self.folder / below) if inside else self.folder / _base_name(name)
        try:
            if not path.is_file():
                path = self.folder / _base_name(name)
            usable = path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
        except (OSError, ValueError):  # a name that no file can have: too long, a NUL in it
            return None
        return path.read_bytes() if usable else None


class _Zip:
    def __init__(self, path: Path, archive: zipfile.ZipFile, under: str) -> None:
        self.path, self.archive = path, archive
        members = (info for info in archive.infolist() if not info.is_dir())
        self.members = _by_base_name(path, ((info.filename, info) for info in members), under)

    def names(self) -> Iterable[str]:
        return self.members

    def read(self, name: str) -> bytes | None:
        info = self.members.get(_base_name(name))
        if info is None or info.file_size > MAX_FILE_BYTES:
            return None
        try:
            with self.archive.open(info) as file:  # a lying header is cut off by the limit
                return file.read(MAX_FILE_BYTES)
        except _ZIP_ERRORS as error:
            raise ValueError(f"{self.path} is damaged at {info.filename!r}: {error}") from error


class _Tar:
    def __init__(self, path: Path, archive: tarfile.TarFile, under: str) -> None:
        self.archive = archive
        try:
            regular = [info for info in archive.getmembers() if info.isreg()]
        except tarfile.TarError as error:
            raise ValueError(f"{path} is a damaged tar: {error}; fetch it again") from error
        require_end_mark(path, archive)
        self.members = _by_base_name(path, ((info.name, info) for info in regular), under)

    def names(self) -> Iterable[str]:
        return self.members

    def read(self, name: str) -> bytes | None:
        info = self.members.get(_base_name(name))
        if info is None or info.size > MAX_FILE_BYTES:
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


def _base_name(name: str) -> str:
    return PurePosixPath(name).name


def _by_base_name(path: Path, members: Iterable[tuple[str, Any]], under: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, member in members:
        base, folders = _base_name(name), PurePosixPath(name).parts[:-1]
        if not base or base.startswith("._") or (under and under not in folders):
            continue  # "._x": what macOS adds to archives
        if base in found:
            raise ValueError(f"{path} holds two files named {base!r}; which one is meant?")
        found[base] = member
    return found
