"""The images of a source: found by the names that annotations write, with what became of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.images import FILE_FORMATS, Header, read_header, stretched
from cloc_mllm.data.readers.boxes import (
    FAR_BORDER,
    OTHER_SHAPE,
    RESTORED,
    BoxesOf,
    BoxFrame,
    Units,
    box_frame,
    share_frame,
)
from cloc_mllm.data.readers.files import MAX_FILE_BYTES, Files, Match, Names, open_files, settle
from cloc_mllm.data.readers.names import is_image_name, plain_path
from cloc_mllm.data.values import id_key

UNNAMED_IMAGES = "images that no annotation names"
OTHER_FILES = "files that are no images by their name"


@dataclass(frozen=True)
class ReadOptions:
    """Options of every source.

    Args:
        encoding: of text files without a byte order mark; "" is UTF-8.
        boxes_of: which picture boxes of a photo with an EXIF orientation are of: what the stated
            size tells, the `upright` or the `stored` one.
        restore_shape: stretch photos that were squashed after annotation back to the shape that
            their annotation states.
        max_side: records hold larger photos reduced to this long side, in pixels; 0 keeps all.
    """

    encoding: str = ""
    boxes_of: BoxesOf = "stated"
    restore_shape: bool = False
    max_side: int = 0


DEFAULTS = ReadOptions()


@dataclass
class Photo:
    """One image of a source.

    Attributes:
        name: as the annotations write it.
        data: its file; b"" where there is none.
        fault: why there is none: `missing_image`, `ambiguous_image`, `file_too_large`; else "".
        found: the fault in words.
        drop_log: gets the remarks on stated sizes.
    """

    name: str
    data: bytes
    fault: str = ""
    found: str = ""
    drop_log: DropLog | None = None
    options: ReadOptions = DEFAULTS

    def refused(self, fault: str, found: str) -> Photo:
        """The photo with a fault of its annotation, under which its record is dropped."""
        return replace(self, fault=fault, found=found)

    @cached_property
    def header(self) -> Header | None:
        return read_header(self.data, formats=FILE_FORMATS)

    def frame(self, width: Any = None, height: Any = None) -> BoxFrame:
        """The frame of pixel boxes: of the stated size, or the file's own where none is stated.

        With `restore_shape`, a photo of another shape than stated gets the stated one.
        """
        frame = box_frame(self.header, width, height, self.options.boxes_of)
        if frame.remark == OTHER_SHAPE and self.options.restore_shape:
            frame = replace(frame, remark=RESTORED)
            self.data = stretched(self.data, frame.upright_wh, name=self.name)
            del self.header  # that of the squashed file
        return self._noted(frame)

    def frame_in(self, units: Units, width: Any = None, height: Any = None) -> BoxFrame:
        """The frame of boxes in declared units; a stated size is of pixels."""
        if units == "pixels":
            return self.frame(width, height)
        return self.share_frame(FAR_BORDER[units])

    def share_frame(self, scale: float = 1.0) -> BoxFrame:
        """The frame of boxes in 0..`scale` of the image's width and height."""
        return self._noted(share_frame(self.header, scale, self.options.boxes_of))

    def _noted(self, frame: BoxFrame) -> BoxFrame:
        if frame.remark and self.drop_log is not None:
            self.drop_log.note_once(frame.remark, self.name)
        return frame


class Photos:
    """The images of a folder or archive.

    Args:
        names: gives what the annotations name, each image once: one name, or several of which the
            surest comes first. Asked for only when a name is no path.
    """

    def __init__(
        self,
        files: Files,
        drop_log: DropLog,
        options: ReadOptions,
        names: Callable[[], Iterable[Names]],
    ) -> None:
        self.files = files
        self._drop_log = drop_log
        self._options = options
        self._names = names
        self._settled: dict[Names, Match] | None = None
        self._used: set[str] = set()

    def find(self, *names: Any) -> Photo:
        """Reads the image that the names of `names_of` mean; see `Files.match`."""
        wanted = names_of(*names)
        match = self._match(wanted)
        name = wanted[0] if wanted else ""
        if not match.path:
            return self._photo(name, b"", match.fault, match.found)
        self._used.add(match.path)
        if match.difference:
            self._drop_log.note_once(match.difference, f"{match.name} -> {match.path}")
        data = self.files.read(match.path)
        if data is None:
            found = f"{match.path} has more than {MAX_FILE_BYTES:,} bytes"
            return self._photo(name, b"", "file_too_large", found)
        return self._photo(name, data, "" if data else "missing_image", f"{match.path} is empty")

    def _photo(self, name: str, data: bytes, fault: str, found: str) -> Photo:
        return Photo(name, data, fault, found, self._drop_log, self._options)

    def _match(self, names: Names) -> Match:
        if self._settled is None:
            match = self.files.match(*names)
            if match.rank <= 1:
                return match
            self._settled = settle(self.files, self._names())
        return self._settled.get(names) or self.files.match(*names)

    def tell_unused(self) -> None:
        """Notes the files that nothing named."""
        for path in self.files.names():
            if path not in self._used:
                what = UNNAMED_IMAGES if is_image_name(path) else OTHER_FILES
                self._drop_log.note(what, example=path)


def names_of(*names: Any) -> Names:
    """Lists the values that name an image: texts and numbers; others are left out."""
    return tuple(
        name if isinstance(name, str) else str(id_key(name))
        for name in names
        if id_key(name) is not None
    )


@contextmanager
def open_photos(
    path: str | Path,
    drop_log: DropLog,
    options: ReadOptions,
    names: Callable[[], Iterable[Names]],
    *,
    tell_unused: bool = True,
) -> Iterator[Photos]:
    """Opens the images of a folder, tar or zip; at the end, notes those that nothing named.

    Args:
        names: see `Photos`.
        tell_unused: off where a part of the annotations is read.
    """
    with open_files(path) as files:
        photos = Photos(files, drop_log, options, names)
        yield photos
        if tell_unused:
            photos.tell_unused()


def group_by_photo(rows: Iterable[tuple[Any, Any]]) -> dict[str, list[Any]]:
    """Groups (name of the image, row) pairs by the path that the name means, in their order.

    Returns:
        the first name that was written for an image -> its rows.
    """
    first_names: dict[str, str] = {}
    grouped: dict[str, list[Any]] = {}
    for name, row in rows:
        written = id_key(name) or ""
        first = first_names.setdefault(plain_path(written), written)
        grouped.setdefault(first, []).append(row)
    return grouped


def single(names: Iterable[Any]) -> Callable[[], Sequence[Names]]:
    """Makes the names for `open_photos`, if each image has one name."""
    return lambda: [names_of(name) for name in names]
