"""LabelMe (Wada) and X-AnyLabeling: `NAME.json` for each image, beside it or elsewhere.

`shapes` holds the shapes; the `label` of one is its class.

| shape | box |
|---|---|
| `rectangle` | itself, its corners in any order |
| `polygon` (and a shape of no stated type), `rotation`, `mask` | what encloses its points |
| `circle` (centre, point on the rim) | what encloses it |
| `point`, `points`, `line`, `linestrip`, `cuboid` | none: dropped (`no_box`) |

Frame: pixels of the stated `imageWidth` and `imageHeight`, those of the upright picture.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    open_photos,
)
from cloc_mllm.data.readers.boxes import around_ellipse, enclosing_corners
from cloc_mllm.data.readers.files import MAX_ANNOTATION_BYTES, Files, open_files
from cloc_mllm.data.readers.photos import Photos, names_of
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import decode, from_base64
from cloc_mllm.data.values import id_key, number, numbers

SOURCE = "labelme"
_NUM_SAMPLED = 50  # files that are looked at, which may hold their images
_WHOLE_PATH = re.compile(r"[/\\]|[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_NO_BOX = ("point", "points", "line", "linestrip", "cuboid")
_ENCLOSED = ("rectangle", "polygon", "rotation", "mask")
EMBEDDED = "images taken from `imageData`, as no file was found"
DESCRIPTIONS = "descriptions of shapes, which --descriptions keeps as referring expressions"
FLAGS = "flags of whole images, which are of no region"
Row = dict[str, Any]


def read_labelme(
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    descriptions: bool = False,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per JSON, with one region per shape; phrase and category are its label.

    Shapes of one label and `group_id` share a `group`.

    Args:
        annotations: folder, tar or zip of the JSON files, at any depth; or one of them.
        images: folder, tar or zip; by default `annotations`, or the folder of the one file. An
            image is what `imagePath` means from the JSON's folder, or lies in `imageData`.
        descriptions: the `description` of a shape is a referring expression.
        drop_log: beside the reasons of `validate_record`, records get `bad_annotation` and
            `other_layout`, regions `no_box` and `bad_row`.
    """
    given = Path(annotations)
    is_one = given.suffix.lower() == ".json" and not given.is_dir()
    folder = given.parent if is_one else given
    with open_files(folder) as files:
        paths = [name for name in files.names() if name.lower().endswith(".json")]
        if is_one:
            if not files.has(given.name):
                raise FileNotFoundError(f"no such file: {given}")
            paths = [given.name]

        def all_names() -> Iterator[tuple[str, ...]]:
            tables = ((path, _parsed(files, path, options.encoding)) for path in paths)
            return (names_of(_image_name(path, row)) for path, row in tables if _is_labelme(row))

        with open_photos(
            images or folder, drop_log, options, all_names, tell_unused=not is_one
        ) as photos:
            for path in paths:
                row = _parsed(files, path, options.encoding)
                stem = path[: -len(".json")]
                if not _is_labelme(row):
                    reason = "bad_annotation" if isinstance(row, str) else "other_layout"
                    drop_log.add("record", stem, reason, row)
                    continue
                drop_log.note(FLAGS, any(value is True for value in _flags(row)))
                photo = _photo(photos, path, row, drop_log)
                regions = _to_regions(row, photo, stem, descriptions, drop_log)
                yield from deliver(stem, photo, SOURCE, [], regions, drop_log)


def _parsed(files: Files, path: str, encoding: str) -> Any:
    """What a JSON file holds; a text says why it cannot be parsed."""
    text = decode(files.read(path, MAX_ANNOTATION_BYTES) or b"", path, encoding)
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return f"{path}: {error}"
    return [found] if isinstance(found, str) else found


def _is_labelme(row: Any) -> bool:
    return isinstance(row, dict) and "imagePath" in row and isinstance(row.get("shapes"), list)


def _flags(row: Row) -> list[Any]:
    return list(as_dict(row.get("flags")).values())


def _image_name(path: str, row: Row) -> str:
    """`imagePath`, from the JSON's folder unless it is a path of a whole disk or an address."""
    name, folder = id_key(row["imagePath"]) or "", path.rpartition("/")[0]
    return f"{folder}/{name}" if name and folder and not _WHOLE_PATH.match(name) else name


def _photo(photos: Photos, path: str, row: Row, drop_log: DropLog) -> Photo:
    photo = photos.find(_image_name(path, row))
    embedded = row.get("imageData")
    if not photo.fault or not isinstance(embedded, str) or not embedded:
        return photo
    if not (data := from_base64(embedded)):
        return photo.refused("broken_image", "`imageData` is no base64")
    drop_log.note(EMBEDDED, example=path)
    return replace(photo, data=data, fault="", found="")


def _to_regions(
    row: Row, photo: Photo, stem: str, descriptions: bool, drop_log: DropLog
) -> list[Region]:
    frame = photo.frame(row.get("imageWidth"), row.get("imageHeight"))
    groups = Counter(_group(as_dict(shape)) for shape in row["shapes"])
    regions = []
    for index, stated in enumerate(row["shapes"], 1):
        shape = as_dict(stated)
        kind = (shape.get("shape_type") or "polygon") if shape else None
        found = {"shape": kind, "points": shape.get("points")}
        corners = _corners(kind, as_list(shape.get("points")))
        if corners is None:
            reason = "no_box" if kind in _NO_BOX else "bad_row"
            drop_log.add("region", f"{stem}, shape {index}", reason, found if shape else stated)
            continue
        (box,) = frame.from_xyxy([corners])
        label, score = shape.get("label", ""), shape.get("score")  # X-AnyLabeling's
        said = _said(shape)
        drop_log.note(DESCRIPTIONS, 0 if descriptions else len(said))
        group = _group(shape)
        region = Region(box, label, 1.0 if score is None else number(score), category=label)
        region.expressions, region.found = said if descriptions else [], found
        region.group = group if groups[group] > 1 else ""
        regions.append(region)
    return regions


def _said(shape: Row) -> list[str]:
    text = shape.get("description")
    return [text] if isinstance(text, str) and text.strip() else []


def _group(shape: Row) -> str:
    """LabelMe's own exports join the shapes of one label and `group_id`."""
    group = id_key(shape.get("group_id"))
    return "" if group is None else f"{shape.get('label')}/{group}"


def _corners(kind: Any, points: list[Any]) -> list[float] | None:
    """xyxy in pixels, NaN for what states no numbers; None for a shape without a box."""
    if kind == "circle":
        centre, rim = (numbers(point, 2) for point in (points if len(points) == 2 else [None] * 2))
        return around_ellipse(centre, [math.dist(centre, rim)] * 2)
    if kind in _ENCLOSED:
        return enclosing_corners(points) or [math.nan] * 4
    return None


def looks_like_labelme(place: Place) -> Iterator[Reading]:
    """A folder of JSON files of `shapes` with an `imagePath`, or one such file that was named;
    words on most of the shapes are taken for referring expressions."""
    names = [name for name in place.names if name.lower().endswith(".json")]
    rows = []
    for data in place.read(names[:_NUM_SAMPLED]):
        try:
            rows.append(json.loads(decode(data, "", errors="replace")))
        except (ValueError, RecursionError):
            rows.append(None)
    if place.is_named and not place.names:
        rows = [place.table]
    found = [row for row in rows if _is_labelme(row)]
    if 2 * len(found) > len(rows):
        why = f"{len(found)} of {len(rows)} JSON files have shapes and imagePath, LabelMe's"
        shapes = [as_dict(shape) for row in found for shape in row["shapes"]]
        said = {"descriptions": True} if 2 * sum(map(len, map(_said, shapes))) > len(shapes) else {}
        why += "; most shapes are described: leave --descriptions out if by notes" if said else ""
        needs_images = not all(row.get("imageData") for row in found)
        folders = {name.rpartition("/")[0] for name in names}
        folder = place.path / folders.pop() if len(folders) == 1 else place.path
        options = {"annotations": folder, **said}
        yield Reading(why, options, "pixels", needs_images=needs_images)
