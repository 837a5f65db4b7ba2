"""YOLO folders (Ultralytics and others): `labels/NAME.txt` beside `images/NAME.jpg`, and the class
names. Rows: `yolo_rows.py`. A photo without a label file has no object.

Frame: 0..1 of the original image.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cloc_mllm.data.readers import DEFAULTS, Photo, ReadOptions, as_dict, deliver, open_photos
from cloc_mllm.data.readers.files import Files, Match, Names, open_files, settle
from cloc_mllm.data.readers.names import (
    ids_of_names,
    is_image_name,
    name_to_id,
    without_suffix,
)
from cloc_mllm.data.readers.photos import OTHER_FILES, Photos
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.readers.yolo_rows import Task, parse_row, tell_task
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import (
    decode,
    is_yaml,
    lines_of,
    read_class_list,
    read_text,
    read_yaml,
)
from cloc_mllm.data.values import number, numbers

SOURCE = "yolo"
_SPLITS = ("train", "val", "test")
_CLASS_LISTS = ("classes.txt", "obj.names", "labels.txt", "names.txt")
_LISTS = ("classes.txt", "labels.txt", "notes.txt")  # what tools put among the label files
_NUM_SAMPLED = 2000  # label files that are looked at to tell what their rows are
_IMAGES_PART = re.compile(r"(^|.*/)images(/.*|$)")  # the last part of this name
_SWAPPED = r"\1labels\2"


class _Known(NamedTuple):
    """The known facts about the rows of a data set."""

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
    """The places of images and labels.

    Attributes:
        folders: images below these folders count, "" is all.
        listed: images that count because a text file names them.
        lists: these text files.
    """

    images: Path
    labels: Path
    folders: tuple[str, ...] = ("",)
    listed: tuple[str, ...] = ()
    lists: tuple[Path, ...] = ()


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
    places = _stated_places(images, labels) or _places_of(Path(names), table, split, options)
    with (
        open_files(places.labels) as label_files,
        open_photos(places.images, drop_log, options, tuple, tell_unused=False) as photos,
    ):
        labels_there = _Labels(label_files, options.encoding)
        if task is None:
            task = "pose" if "kpt_shape" in table else _told_task(labels_there, bool(table))
        known = _Known(class_names, task, keypoints)
        named = settle(photos.files, ((name,) for name in places.listed))
        image_paths = _image_paths(photos.files, places, named.values())
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
        yield from _missing(photos, named, drop_log)
        used |= _used_elsewhere(photos.files, labels_there, places, image_paths, drop_log)
        _log_orphans(labels_there, used | {Path(names).name}, drop_log)


def _image_paths(files: Files, places: _Places, named: Iterable[Match]) -> list[str]:
    below = (path for path in files.names() if path.startswith(places.folders))
    listed = (match.path for match in named if match.path)
    return list(dict.fromkeys([*filter(is_image_name, below), *listed]))


def _missing(photos: Photos, named: dict[Names, Match], drop_log: DropLog) -> Iterator[Record]:
    """Drops the images that a list names and that are not there."""
    for (name,), match in named.items():
        if not match.path:
            photo = photos.find(name).refused(match.fault, match.found)
            yield from deliver(name_to_id(name), photo, SOURCE, [], [], drop_log)


def _used_elsewhere(
    files: Files, labels: _Labels, places: _Places, image_paths: list[str], drop_log: DropLog
) -> set[str]:
    """The label files of images that no list names, and the lists. Notes what is no image."""
    others = set(files.names()) - set(image_paths)
    for path in others:
        is_known = PurePosixPath(path).suffix.lower() in (".txt", ".yaml", ".yml", ".cache")
        if path.startswith(places.folders) and not is_known:
            drop_log.note(OTHER_FILES, example=path)
    if not places.lists:
        return set()
    unlisted = list(filter(is_image_name, others))
    drop_log.note("images that no list names", len(unlisted))
    used = {labels.files.match(*_label_names(places.images, path)).path for path in unlisted}
    return used | {path.name for path in places.lists}


def _stated_places(images: str | Path | None, labels: str | Path | None) -> _Places | None:
    if not images:
        return None
    return _Places(Path(images), Path(labels) if labels else _labels_beside(Path(images)))


def _labels_beside(images: Path) -> Path:
    """Ultralytics' rule: the last `images` of the path is `labels`; else they lie together."""
    return Path(_IMAGES_PART.sub(_SWAPPED, images.as_posix()))


def _places_of(path: Path, table: dict[str, Any], split: str, options: ReadOptions) -> _Places:
    """The folders, or text files of image paths, that a data set's YAML names.

    They are found as its tools find them: `path` is absolute or relative to the YAML;
    `../train/images`, as Roboflow writes it, means a folder beside the YAML.
    """
    bases = [path.parent / str(table.get("path") or ""), path.parent]
    folders: list[Path] = []
    lists: list[Path] = []
    for name in [split] if split else _SPLITS:
        stated = table.get(name) or []
        for entry in [stated] if isinstance(stated, str) else stated:
            below = re.sub(r"^(\.\./)+", "", str(entry))
            tried = [base / part for base in bases for part in (str(entry), below)]
            found = next((place for place in tried if place.is_dir() or _is_list(place)), None)
            if found is None:
                raise ValueError(
                    f"{path}: `{name}` names {entry!r}, which is no folder and no text file of "
                    f"image paths (tried {tried[0]}); name the folders with --images and --labels"
                )
            (folders if found.is_dir() else lists).append(found.resolve())
    if lists:
        return _listed_places(next(filter(Path.is_dir, bases)), folders, lists, options.encoding)
    if not folders:
        raise ValueError(
            f"{path} names no folder of images ({', '.join(_SPLITS)}); name the folders with "
            "--images and --labels"
        )
    root = Path(os.path.commonpath(folders))
    return _Places(root, _labels_beside(root), _prefixes(folders, root))


def _listed_places(base: Path, folders: list[Path], lists: list[Path], encoding: str) -> _Places:
    """Lists name images anywhere below the data set's folder, perhaps as paths of another disk."""
    root = Path(os.path.commonpath([base.resolve(), *folders]))
    lines = (line.strip() for path in lists for line in lines_of(read_text(path, encoding)))
    listed = tuple(dict.fromkeys(filter(None, lines)))
    return _Places(root, root, _prefixes(folders, root), listed, tuple(lists))


def _is_list(path: Path) -> bool:
    return path.suffix.lower() == ".txt" and path.is_file()


def _prefixes(folders: list[Path], root: Path) -> tuple[str, ...]:
    below_root = (folder.relative_to(root).as_posix() for folder in folders)
    return tuple("" if part == "." else f"{part}/" for part in below_root)


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
    """The possible names of an image's label file, from the top of the disk and below."""
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


def looks_like_yolo(place: Place) -> Iterator[Reading]:
    """Text files of numbers, with the names of their classes in a YAML or a list."""
    if is_yaml(place.path) or place.path.name in _CLASS_LISTS:
        around = looks_like_yolo(Place(place.path.parent, place.encoding))
        yield from (found for found in around if found.options.get("names") == place.path)
        return
    labels = [name for name in place.names if name.lower().endswith(".txt")][:_NUM_SAMPLED]
    lists = [name for name in labels if PurePosixPath(name).name in _LISTS]
    rows = [name for name in labels if name not in lists]
    texts = (data.decode("utf-8", "replace").splitlines() for data in place.read(rows))
    lines = [line for text in texts for line in text if line.strip()]
    if 2 * sum(map(_is_of_numbers, lines)) <= len(lines):
        return
    yamls = [name for name in place.names if is_yaml(name)]
    tables = {name: as_dict(_yaml_or_none(place.path / name, place.encoding)) for name in yamls}
    named = sorted((n for n in yamls if "names" in tables[n]), key=lambda name: name.count("/"))
    named += [name for name in place.names if PurePosixPath(name).name in _CLASS_LISTS]
    why = f"{place.path.resolve().name} holds {len(rows)} text files of numbers"
    if not named:
        lacks = "--names, data.yaml or a text file of one class name per line"
        options: dict[str, Any] = {"images": place.path, "labels": place.path}
        yield Reading(why, options, "0..1", "cxcywh", needs_images=False, lacks=lacks)
        return
    names = place.path / named[0]
    why += f", and {named[0]} names the classes"
    options = {"names": names}
    if not _says_where(names, tables.get(named[0], {}), ReadOptions(place.encoding)):
        images = [name for name in place.names if is_image_name(name)]
        are_parted = _are_below("images", images) and _are_below("labels", rows)
        below = ("images", "labels") if are_parted else ("", "")
        options |= {"images": place.path / below[0], "labels": place.path / below[1]}
    yield Reading(why, options, "0..1", "cxcywh", needs_images=False)


def _is_of_numbers(line: str) -> bool:
    values = [number(text) for text in line.split()]
    return len(values) >= 5 and not any(map(math.isnan, values))


def _are_below(folder: str, names: list[str]) -> bool:
    return all(name.startswith(f"{folder}/") for name in names)


def _says_where(path: Path, table: dict[str, Any], options: ReadOptions) -> bool:
    """Whether a YAML names folders of images that are there."""
    try:
        _places_of(path, table, "", options)
    except ValueError:
        return False
    return True


def _yaml_or_none(path: Path, encoding: str) -> Any:
    try:
        return read_yaml(path, encoding)
    except ValueError:  # some other YAML
        return None
