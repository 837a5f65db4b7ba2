"""WebDataset tars, sample by sample: read forwards in memory, nothing is ever extracted."""

from __future__ import annotations

import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path

from cloc_mllm.data.readers.files import MAX_FILE_BYTES, require_end_mark
from cloc_mllm.data.records import DropLog

Sample = dict[str, bytes]  # suffix without its dot -> content


def read_samples(path: str | Path, drop_log: DropLog) -> Generator[tuple[str, Sample], None, None]:
    """(key, files of that key) of a tar whose members of one key stand together.

    The key is a member's path up to the first dot of its last part. Links, devices and files over
    `MAX_FILE_BYTES` are noted and not read; a key that comes again later is a sample of its own.

    Raises:
        ValueError: no uncompressed tar, or one that is cut or damaged.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            yield from _grouped(_files(archive, drop_log))
            require_end_mark(Path(path), archive)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no whole tar ({error}); fetch it again") from error


def _files(archive: tarfile.TarFile, drop_log: DropLog) -> Iterator[tuple[str, str, bytes]]:
    for info in archive:
        vars(archive)["members"] = []  # or tarfile would keep an entry for each
        folder, _, base = info.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if info.isdir():
            continue
        if not info.isreg() or info.size > MAX_FILE_BYTES or not stem:
            drop_log.note("tar members that are no usable file (links, devices, too large)")
            continue
        file = archive.extractfile(info)  # a view of the member: nothing goes to disk
        assert file is not None
        yield f"{folder}/{stem}" if folder else stem, suffix.lower(), file.read()


def _grouped(files: Iterator[tuple[str, str, bytes]]) -> Iterator[tuple[str, Sample]]:
    key, sample = "", Sample()
    for file_key, suffix, data in files:
        if sample and (file_key != key or suffix in sample):
            yield key, sample
            sample = {}
        key = file_key
        sample[suffix] = data
    if sample:
        yield key, sample
