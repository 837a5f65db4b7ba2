"""Opens files on disk, or at any URL that fsspec knows: `s3://`, `gs://`, `hf://`, `https://`."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
from filelock import FileLock

Place = str | Path  # a URL or a local path


def is_url(place: Place) -> bool:
    """Whether a place is a URL. URLs are text: a `Path` would lose one of their slashes."""
    return isinstance(place, str) and "://" in place


def join(place: Place, name: str) -> Place:
    """Names the file `name` in the directory `place`, which may be a chain of URLs
    (`filecache::s3://bucket/set`)."""
    if not is_url(place):
        return Path(place) / name
    links = str(place).split("::")
    index = next(i for i, link in enumerate(links) if "://" in link)
    links[index] = f"{links[index].rstrip('/')}/{name}"
    return "::".join(links)


def open_binary(place: Place) -> BinaryIO:
    """Opens a file for reading; from a URL only the parts that are read are fetched.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: this kind of URL is unknown or needs a package; the message names it.
        OSError: the store does not answer.
    """
    if not is_url(place):
        return Path(place).open("rb")
    try:
        filesystem, path = fsspec.core.url_to_fs(place)
        return cast(BinaryIO, filesystem.open(path, "rb", cache_type="none"))
    except FileNotFoundError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError):
            raise
        # fsspec also raises this for a web server that cannot be reached
        raise OSError(f"cannot open {place}: {type(cause).__name__}: {cause}") from error
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {place}: {error}") from error
    except Exception as error:  # each kind of store has its own errors
        raise OSError(f"cannot open {place}: {type(error).__name__}: {error}") from error


@contextmanager
def partial_directory(directory: Path) -> Iterator[Path]:
    """Gives a folder beside `directory` to write into and then to rename; after an error it is
    removed, and so is what killed writers of the same directory left."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}.partial-"
    for leftover in directory.parent.glob(f"{glob.escape(prefix)}*"):
        with _held(leftover) as is_abandoned:
            if is_abandoned:
                remove(leftover)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    try:
        with _held(partial):
            yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Holds a folder as long as this process lives, if nobody else does; says whether."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Gives a folder to write into that appears as `directory` only when all went well.

    Raises:
        ValueError: `directory` is taken.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} already exists; name another directory or remove this one")
    with partial_directory(directory) as partial:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(directory)


def write_whole(path: str | Path, text: str) -> None:
    """Writes all of a file or nothing, also when the disk is full or the process is killed."""
    path = Path(path)
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Gives an empty directory beside `final`, which takes its name, and place, at the end of the
    context: so `final` is whole or not there. After an error what was written is removed."""
    partial, old = (final.with_name(f".{what}_{final.name}") for what in ("partial", "removed"))
    for leftover in (partial, old):  # of a run that was killed
        remove(leftover)
    partial.mkdir()
    try:
        yield partial
        if final.exists():
            os.replace(final, old)
        os.replace(partial, final)
        remove(old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Removes a file or a directory with all it holds, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(place: Place) -> str:
    digest = hashlib.sha256()
    with open_binary(place) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cached(place: Place, sha256: str, directory: Place) -> Path:
    """Returns the local copy of a file, which is fetched the first time.

    Copies are named by their sha256, so data sets may share the directory, and so may processes:
    one fetches, the others wait, and none sees half a file.

    Raises:
        ValueError: the fetched file has another sha256.
        FileNotFoundError, OSError: as `open_binary`.
    """
    directory = Path(directory)
    copy = directory / sha256
    if copy.is_file():
        return copy
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / f"{sha256}.lock"):
        if not copy.is_file():
            _fetch(place, sha256, copy)
    return copy


def _fetch(place: Place, sha256: str, copy: Path) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".partial-", dir=copy.parent)
    try:
        with open_binary(place) as source, os.fdopen(descriptor, "wb") as target:
            shutil.copyfileobj(source, target, 4 << 20)
        if sha256_of(Path(name)) != sha256:
            raise ValueError(f"{place} differs from its manifest (sha256)")
        os.replace(name, copy)
    finally:
        Path(name).unlink(missing_ok=True)
