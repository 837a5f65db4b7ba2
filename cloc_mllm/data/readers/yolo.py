"""YOLO folders (Ultralytics and others): `labels/NAME.txt` beside `images/NAME.jpg`, and the class
names. Rows: `yolo_rows.py`. A photo without a label file has no object.

Frame: 0..1 of the original image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cloc_mllm.data.readers import DEFAULTS, Photo, ReadOptions, as_dict, deliver, open_photos
from cloc_mllm.data.readers.files import Files, Names, open_files, settle
from cloc_mllm.data.readers.names import ids_of_names, is_image_name, without_suffix
from cloc_mllm.data.readers.photos import OTHER_FILES
from cloc_mllm.data.readers.yolo_rows import Task, parse_row, tell_task
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import decode, is_yaml, lines_of, read_class_list, read_yaml
from cloc_mllm.data.values import numbers

SOURCE = "yolo"
_SPLITS = ("train", "val", "test")
_LISTS = ("classes.txt", "labels.txt", "notes.txt")  # what tools put among the label files
_NUM_SAMPLED = 2000  # label files that are looked at to tell what their rows are
_IMAGES_PART = re.compile(r"(^|.*/)images(/.*|$)")  # the last part of this name
_SWAPPED = r"\1labels\2"


class _Known(NamedTuple):
    """What is known of the rows of a data set."""

    class_names: dict[str, str]
    task: Task | None
    keypoints: tuple[int, int] | None


class _Labels(NamedTuple):
    """The label files."""

    files: Files
    encoding: str

    def paths(self) -> list[str]:
        return [path for path in self.files.names() if path.lower().endswith(".txt")]

    def lines(self, path: str) -> list[str]:
        data = self.files.read(path) or b""
        text = decode(data, path, self.encoding, errors="replace")
        return [line for line in lines_of(text) if line.strip()]


class _Places(NamedTuple):
    """Where images and labels lie; images count below `folders` of theirs, "" is all."""

    images: Path
    labels: Path
    folders: tuple[str, ...] = ("",)


def read_yolo(  # noqa: PLR0913  what the source can be told
    images: str | Path | None,
    labels: str | Path | None,
    names: str | Path,
    *,
    task: Task | None = None,
    split: str = "",
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image, with one region per row; phrase and category are its class.

    Args:
        images, labels: folder, tar or zip each, searched at any depth; a label file has its image's
            name and folder, with `labels` for `images`. Without `labels` they lie where Ultralytics
            looks for them; without `images` both lie where `names`, a YAML, says.
        names: `data.yaml` with `names` (list, or number -> name), or a text file of one per line.
        task: what rows of more than a box are; None tells by `kpt_shape` and by the rows.
        split: of the YAML, `train`, `val` or `test`; "" is all.
        drop_log: beside the reasons of `validate_record`: records get `bad_annotation` (several
            label files may be the image's), regions `bad_row` (a line that is no class and box),
            `unknown_category` and `unknown_image` (a label file alone).

    Raises:
        ValueError: neither `images` nor a YAML that says where they are.
    """
    class_names = read_class_list(names, options.encoding)
    table = as_dict(read_yaml(names, options.encoding)) if is_yaml(names) else {}
    keypoints = _keypoints(table.get("kpt_shape"))
    places = _stated_places(images, labels) if images else _places_of(Path(names), table, split)
    with (
        open_files(places.labels) as label_files,
        open_photos(places.images, drop_log, options, tuple, tell_unused=False) as photos,
    ):
        labels_there = _Labels(label_files, options.encoding)
        if task is None:
            task = "pose" if "kpt_shape" in table else _told_task(labels_there, bool(table))
        known = _Known(class_names, task, keypoints)
        paths = [path for path in photos.files.names() if path.startswith(places.folders)]
        image_paths = [path for path in paths if is_image_name(path)]
        ids = ids_of_names(image_paths)
        names_of = {path: _label_names(places.images, path) for path in image_paths}
        label_of = settle(label_files, names_of.values())
        used = set()
        for path in image_paths:
            label, photo = label_of[names_of[path]], photos.find(path)
            regions: list[Region] = []
            # the end of a path alone does not do: most data sets have images without labels
            if label.rank > 2 or label.fault == "missing_image":
                drop_log.note("images without a label file", example=path)
            elif label.fault:
                photo = photo.refused("bad_annotation", label.found)
            else:
                used.add(label.path)
                regions = _to_regions(label.path, labels_there, photo, known, drop_log)
            yield from deliver(ids[path], photo, SOURCE, [], regions, drop_log)
        for path in set(paths) - set(image_paths):
            if PurePosixPath(path).suffix.lower() not in (".txt", ".yaml", ".yml", ".cache"):
                drop_log.note(OTHER_FILES, example=path)
        _log_orphans(labels_there, used | {Path(names).name}, drop_log)


def _stated_places(images: str | Path, labels: str | Path | None) -> _Places:
    return _Places(Path(images), Path(labels) if labels else _labels_beside(Path(images)))


def _labels_beside(images: Path) -> Path:
    """Ultralytics' rule: the last `images` of the path is `labels`; else they lie together."""
    return Path(_IMAGES_PART.sub(_SWAPPED, images.as_posix()))


def _places_of(path: Path, table: dict[str, Any], split: str) -> _Places:
    """The folders that a data set's YAML names, as its tools resolve them.

    `path` is absolute or relative to the YAML; `../train/images`, as Roboflow writes it, means a
    folder beside the YAML.
    """
    bases = [path.parent / str(table.get("path") or ""), path.parent]
    folders: list[Path] = []
    for name in [split] if split else _SPLITS:
        stated = table.get(name) or []
        for entry in [stated] if isinstance(stated, str) else stated:
            below = re.sub(r"^(\.\./)+", "", str(entry))
            tried = [base / part for base in bases for part in (str(entry), below)]
            folder = next((place for place in tried if place.is_dir()), None)
            if folder is None:
                raise ValueError(
                    f"{path}: `{name}` names {entry!r}, which is no folder (tried {tried[0]}); "
                    "name the folders with --images and --labels"
                )
            folders.append(folder.resolve())
    if not folders:
        raise ValueError(
            f"{path} names no folder of images ({', '.join(_SPLITS)}); name the folders with "
            "--images and --labels"
        )
    root = Path(os.path.commonpath(folders))
    below_root = (folder.relative_to(root).as_posix() for folder in folders)
    prefixes = tuple("" if part == "." else f"{part}/" for part in below_root)
    return _Places(root, _labels_beside(root), prefixes)


def _keypoints(stated: Any) -> tuple[int, int] | None:
    """`kpt_shape`: the number of keypoints, and of values of each."""
    number, size = numbers(stated, 2)
    return (int(number), int(size)) if number > 0 and size > 0 else None


def _told_task(labels: _Labels, has_yaml: bool) -> Task | None:
    """Tells what long rows are. A YAML of keypoints states `kpt_shape`, so others have polygons."""
    paths = islice(labels.paths(), _NUM_SAMPLED)
    rows = (line for path in paths for line in labels.lines(path))
    return tell_task(rows) or ("segment" if has_yaml else None)


def _label_names(images: Path, path: str) -> Names:
    """What the label file of an image may be called, from the top of the disk and below."""
    stem = without_suffix(path)
    whole = f"{images.resolve().as_posix()}/{stem}"
    names = (f"{_IMAGES_PART.sub(_SWAPPED, name)}.txt" for name in (whole, stem))
    return tuple(dict.fromkeys((*names, f"{stem}.txt")))


def _to_regions(
    path: str, labels: _Labels, photo: Photo, known: _Known, drop_log: DropLog
) -> list[Region]:
    regions = []
    frame = photo.share_frame()
    for index, line in enumerate(labels.lines(path)):
        row = parse_row(line, known.task, known.keypoints)
        item = f"{path}, row {index + 1}"
        if row.fault:
            drop_log.add("region", item, "bad_row", f"{line.strip()}: {row.fault}")
        elif row.class_key not in known.class_names:
            found = f"class {line.split()[0]} of {len(known.class_names)} names"
            drop_log.add("region", item, "unknown_category", found)
        else:
            (box,) = frame.from_cxcywh([row.cxcywh])
            name = known.class_names[row.class_key]
            regions.append(Region(box, name, row.score, category=name, found=line.strip()))
    return regions


def _log_orphans(labels: _Labels, used: set[str], drop_log: DropLog) -> None:
    """Drops the rows of label files that no image has."""
    for path in labels.paths():
        if path in used or PurePosixPath(path).name in _LISTS:
            continue
        lines = labels.lines(path)
        if not any(map(_is_row, lines)):
            drop_log.note("text files that are no labels", example=path)
            continue
        for index, line in enumerate(lines):
            drop_log.add("region", f"{path}, row {index + 1}", "unknown_image", line.strip())


def _is_row(line: str) -> bool:
    return not parse_row(line, "segment", None).fault
