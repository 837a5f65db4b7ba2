"""Opens files on disk, or at any URL that fsspec knows: `s3://`, `gs://`, `hf://`, `https://`."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
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
