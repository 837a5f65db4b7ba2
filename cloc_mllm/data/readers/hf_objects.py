"""Data sets of Hugging Face `datasets` with an image and an `objects` column: `save_to_disk`,
Parquet, ImageFolder with `metadata.jsonl`, other folders that `load_dataset` reads, and names on
the hub. Rows are streamed: nothing is copied to the cache of `datasets`.

`objects` is a struct of lists, `{"bbox": [[...], ...], "category": [...]}`, or a list of structs.
A category is a text, or a number that the column's `ClassLabel` or a list of names explains.

Frame: what the user says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow.parquet as pq

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    open_photos,
)
from cloc_mllm.data.readers.boxes import FRAME_NAMES, BoxFrame, BoxOrder, Units
from cloc_mllm.data.readers.files import MAX_FILE_BYTES, Names
from cloc_mllm.data.readers.names import name_to_id
from cloc_mllm.data.readers.photos import Photos, names_of
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_class_list, read_rows
from cloc_mllm.data.values import id_key

SOURCE = "hf-objects"
_BOX_KEYS = ("bbox", "bboxes", "box", "boxes")
_CATEGORY_KEYS = (
    *("category", "categories", "label", "labels", "class", "classes", "category_id"),
    *("phrase", "phrases", "name", "names"),
)
_JSON = (".json", ".jsonl")
_SAVED = ("dataset_dict.json", "state.json")
Row = dict[str, Any]


@dataclass(frozen=True)
class ObjectColumns:
    """Names of columns, and of keys of the objects; "" is the usual one that is there."""

    image: str = "image"
    objects: str = "objects"
    box: str = ""
    category: str = ""


def read_hf_objects(  # noqa: PLR0913  what the source can be told
    dataset: str | Path,
    images: str | Path | None = None,
    *,
    frame: Units,
    box_order: BoxOrder,
    split: str = "",
    subset: str = "",
    columns: ObjectColumns = ObjectColumns(),
    names: str | Path | None = None,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per row, with one region per object; phrase and category are its class.

    A record's id is the row's `image_id` or `id`, else the name of its image file, else its number;
    where there are several splits, the split's name stands before it.

    Args:
        dataset: folder of `save_to_disk`, folder that `load_dataset` reads, Parquet or JSON file,
            or a name on the hub.
        images: folder, tar or zip, where the image column holds names of files.
        frame: what the numbers are measured in; pixels are of the row's `width` and `height`, or
            of the image.
        box_order: what the four numbers are.
        split: "" is all.
        subset: the configuration of a data set that has several.
        names: class names of numbers (`read_class_list`), where the columns do not hold them.
        drop_log: beside the reasons of `validate_record`, records and regions get `bad_row`,
            regions `unknown_category`.

    Raises:
        ValueError: the data set cannot be loaded, or has no such split, column or key.
    """
    splits = _load(str(dataset), subset, split, options.encoding)
    class_names = read_class_list(names, options.encoding) if names else {}
    for split_name, rows in splits.items():
        rows, columns_there = _undecoded(rows, columns, dataset)
        known = class_names or _class_names(columns_there[columns.objects], columns)
        prefix = f"{split_name}/" if len(splits) > 1 else ""
        with _opened(images, rows, columns, options, drop_log, len(splits) == 1) as photos:
            for index, row in enumerate(rows):
                if not isinstance(row, dict):
                    drop_log.add("record", f"row {index}", "bad_row", row)
                    continue
                stated = row.get(columns.image)
                record_id = f"{prefix}{_id_of(row, _file_name(stated)) or index}"
                photo = _photo(stated, record_id, photos, options, drop_log)
                place = photo.frame_in(frame, row.get("width"), row.get("height"))
                things = _things(row.get(columns.objects), columns, record_id, drop_log)
                regions = _to_regions(things, place, box_order, known, record_id, drop_log)
                yield from deliver(record_id, photo, SOURCE, [], regions, drop_log)


def _load(dataset: str, subset: str, split: str, encoding: str) -> dict[str, Any]:
    """Split name -> streamed rows; of a JSON file, those of `read_rows`."""
    import datasets

    path = Path(dataset)
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(dataset)
            if isinstance(loaded, datasets.Dataset):
                loaded = {split or "train": loaded}
        elif path.suffix.lower() in _JSON and path.is_file():
            loaded = {split or "train": [row for _, row in read_rows(path, encoding)]}
        elif path.is_file():
            loaded = datasets.load_dataset("parquet", data_files=dataset, streaming=True)
        else:
            name = str(path.resolve()) if path.is_dir() else dataset  # of "." it finds no name
            loaded = datasets.load_dataset(name, subset or None, streaming=True)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"{dataset}: expected a folder or file of `datasets`, or a name on the hub; it cannot "
            f"be loaded ({error})"
        ) from error
    if split and split not in loaded:
        raise ValueError(f"{dataset}: no split {split!r}; there are {', '.join(loaded)}")
    return {split: loaded[split]} if split else dict(loaded)


def _undecoded(rows: Any, columns: ObjectColumns, dataset: Any) -> tuple[Any, dict[str, Any]]:
    """The rows with images as files, and the columns that they have, with their features."""
    import datasets

    if isinstance(rows, list):  # of a JSON file
        features = dict.fromkeys(key for row in rows for key in as_dict(row))
    else:
        features = dict(rows.features or dict.fromkeys(next(iter(rows), {})))
    for name, option in ((columns.image, "image_column"), (columns.objects, "objects_column")):
        if name not in features:
            raise ValueError(
                f"{dataset}: expected a column {name!r}, there are {', '.join(features)}; name it "
                f"with --{option}"
            )
    if isinstance(features[columns.image], datasets.Image):
        rows = rows.cast_column(columns.image, datasets.Image(decode=False))
    return rows, features


def _class_names(feature: Any, columns: ObjectColumns) -> dict[str, str]:
    """Number (as text) -> name, of the objects' `ClassLabel`; empty where they have none."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    feature = as_dict(feature).get(_key(as_dict(feature), columns.category, _CATEGORY_KEYS))
    while hasattr(feature, "feature"):
        feature = feature.feature
    return {str(number): name for number, name in enumerate(getattr(feature, "names", None) or ())}


def _key(thing: Row, chosen: str, usual: Iterable[str]) -> str:
    return chosen or next((key for key in usual if key in thing), "")


def _opened(
    images: str | Path | None,
    rows: Any,
    columns: ObjectColumns,
    options: ReadOptions,
    drop_log: DropLog,
    tell_unused: bool,
) -> Any:
    """The photos that the image column names; None where it holds them."""
    if images is None:
        return nullcontext()

    def all_names() -> Iterator[Names]:
        return (names_of(_file_name(as_dict(row).get(columns.image))) for row in rows)

    return open_photos(images, drop_log, options, all_names, tell_unused=tell_unused)


def _file_name(value: Any) -> Any:
    return value if isinstance(value, str) else as_dict(value).get("path")


def _photo(
    value: Any, record_id: str, photos: Photos | None, options: ReadOptions, drop_log: DropLog
) -> Photo:
    name = _file_name(value)
    data = value if isinstance(value, bytes) else as_dict(value).get("bytes") or b""
    if not data and photos is not None:
        return photos.find(name)
    fault = found = ""
    if not data:
        data, fault, found = _fetched(name if isinstance(value, dict) else None, value)
    return Photo(record_id, data, fault, found, drop_log, options)


def _fetched(path: str | None, value: Any) -> tuple[bytes, str, str]:
    """The file that `datasets` names, on this disk or on the hub, or the fault of having none."""
    if path is None:
        return b"", "missing_image", f"{value!r}; name the images' folder with --images"
    try:
        with fsspec.open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        return b"", "missing_image", f"{path}: {error}"
    if len(data) > MAX_FILE_BYTES:
        return b"", "file_too_large", f"{path} has more than {MAX_FILE_BYTES:,} bytes"
    return data, "", ""


def _id_of(row: Row, file_name: str | None) -> str:
    stated = id_key(row.get("image_id")) or id_key(row.get("id"))
    return stated or name_to_id(Path(file_name or "").name)


def _things(
    objects: Any, columns: ObjectColumns, item: str, drop_log: DropLog
) -> list[tuple[Any, Any]]:
    """(box, category) of each object."""
    if isinstance(objects, dict):
        boxes = objects.get(_key(objects, columns.box, _BOX_KEYS))
        categories = objects.get(_key(objects, columns.category, _CATEGORY_KEYS))
        if isinstance(boxes, list):
            return list(itertools.zip_longest(boxes, as_list(categories)))
    if objects and not isinstance(objects, list):
        found = f"{shown(objects)}: no list of boxes; name its key with --box_key"
        drop_log.add("region", item, "bad_row", found)
    things = []
    for thing in as_list(objects):
        if not isinstance(thing, dict):
            drop_log.add("region", item, "bad_row", thing)
            continue
        box = thing.get(_key(thing, columns.box, _BOX_KEYS))
        things.append((box, thing.get(_key(thing, columns.category, _CATEGORY_KEYS))))
    return things


def _to_regions(
    things: list[tuple[Any, Any]],
    place: BoxFrame,
    box_order: BoxOrder,
    class_names: dict[str, str],
    item: str,
    drop_log: DropLog,
) -> list[Region]:
    regions = []
    for stated, category in things:
        is_number = category is not None and not isinstance(category, str)
        name = class_names.get(id_key(category) or "") if is_number else category
        if is_number and name is None:
            found = f"class {category!r} of {len(class_names)} names; give them with --names"
            drop_log.add("region", item, "unknown_category", found)
            continue
        (box,) = place.from_order([stated], box_order)
        regions.append(Region(box, name or "", category=name or "", found=stated))
    return regions


def looks_like_hf_objects(place: Place) -> Iterator[Reading]:
    """Folders of `save_to_disk`, of Parquet or of images with `metadata.jsonl`, and rows, each with
    a column `objects`; its boxes state neither frame nor order."""
    folder, name = place.path.parent, place.path.name
    saved = [path for path in place.names if PurePosixPath(path).name in _SAVED]
    tables = [path for path in place.names if path.endswith(".parquet")]
    if saved:
        top = min(saved, key=lambda path: (path.count("/"), path))
        folder = (place.path / top).parent
        yield from _unframed(
            f"{folder.resolve().name} was saved by `datasets`", folder, needs_images=False
        )
    elif tables and _has_objects(place.path / tables[0]):
        folders = {(place.path / path).parent for path in tables}
        folder = folders.pop() if len(folders) == 1 else place.path
        why = f"{folder.resolve().name} holds Parquet with the column objects"
        yield from _unframed(why, folder, needs_images=False)
    elif _has_objects(place.path):
        why = f"{name} has the column objects"
        yield from _unframed(why, place.path, needs_images=False)
    elif place.has_rows_with("file_name", "objects") and name.startswith("metadata."):
        why = (
            f"{folder.resolve().name} has metadata of images with objects, `datasets`' ImageFolder"
        )
        yield from _unframed(why, folder, needs_images=False)
    elif place.has_rows_with("image", "objects") and not place.has_rows_with("messages"):
        yield from _unframed(f"{name} has rows with image and objects", place.path)


def _unframed(why: str, dataset: Path, needs_images: bool = True) -> Iterator[Reading]:
    for frame, stated in FRAME_NAMES.items():
        for order in ("xywh", "xyxy", "cxcywh"):
            options = {"dataset": dataset, "frame": frame, "box_order": order}
            yield Reading(why, options, stated, order, needs_images, is_declared=False)


def _has_objects(path: Path) -> bool:
    if path.suffix != ".parquet" or not path.is_file():
        return False
    return "objects" in pq.read_schema(path).names
