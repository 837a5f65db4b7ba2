"""VIA, the VGG Image Annotator 1 and 2 (Dutta and Zisserman 2019): a saved project, or exported
annotations as JSON or CSV.

A region has a shape and attributes that the annotator chose; one of them says what is in it.

| shape | box |
|---|---|
| `rect` | itself |
| `polygon`, `circle`, `ellipse` | what encloses it |
| `polyline`, `point` | none: dropped (`no_box`) |

Frame: pixels of the image file; VIA states no size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import (
    DEFAULTS,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    group_by_photo,
    open_photos,
    single,
)
from cloc_mllm.data.readers.boxes import BoxFrame, around_ellipse, enclosing_corners
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_json, read_rows
from cloc_mllm.data.values import number

SOURCE = "via"
_NO_BOX = ("polyline", "point")
_TABLES = (".csv", ".tsv")
Row = dict[str, Any]


def read_via(
    annotations: str | Path,
    images: str | Path,
    *,
    phrase_attribute: str = "",
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image, with one region per shape.

    Phrase and category are the shape's attribute; a checkbox with several marks gives a region per
    mark. The file attribute `caption`, which VIA proposes, is the image's caption.

    Args:
        annotations: the project (`_via_img_metadata`), or annotations exported as JSON or CSV.
        images: folder, tar or zip.
        phrase_attribute: which attribute of a region says what is in it; by default the only one.
        drop_log: beside the reasons of `validate_record`, records get `bad_row`, regions `bad_row`
            and `no_box`.

    Raises:
        ValueError: another layout (VIA 3 among them), or several attributes and none chosen.
    """
    table = _read_images(annotations, options, drop_log)
    rows_of = group_by_photo((row.get("filename"), row) for row in table)
    regions_of = {
        name: [region for row in rows for region in _regions(row)] for name, rows in rows_of.items()
    }
    attribute = phrase_attribute or _only_attribute(annotations, regions_of)
    ids = ids_of_names(rows_of)
    with open_photos(images, drop_log, options, single(rows_of)) as photos:
        for name, rows in rows_of.items():
            photo = photos.find(name)
            frame = photo.frame()
            regions: list[Region] = []
            for index, shape in enumerate(regions_of[name]):
                item = f"{name}, region {index}"
                regions += _to_regions(shape, item, frame, attribute, drop_log)
            yield from deliver(ids[name], photo, SOURCE, _captions(rows), regions, drop_log)


def _read_images(path: str | Path, options: ReadOptions, drop_log: DropLog) -> list[Row]:
    """One row per image; of a CSV, one per region."""
    if Path(path).suffix.lower() in _TABLES:
        rows = []
        for item, row in read_rows(path, options.encoding):
            cells = {key.lstrip("#"): value for key, value in row.items() if key}
            if "region_shape_attributes" not in cells:
                raise ValueError(f"{path}: expected VIA's columns, got {', '.join(cells)}")
            rows.append(_image_of_cells(cells, f"{path}, {item}"))
        return rows
    table = as_dict(read_json(path, options.encoding))
    if "metadata" in table and "project" in table:
        raise ValueError(f"{path} is of VIA 3, whose layout is another; export it as VIA 2 or COCO")
    stated = as_dict(table.get("_via_img_metadata", table))
    rows = [row for row in stated.values() if isinstance(row, dict) and "filename" in row]
    if not rows:
        raise ValueError(
            f"{path}: expected VIA's project or annotations, an object of images with `filename` "
            "and `regions`"
        )
    for key, row in stated.items():
        if not isinstance(row, dict) or "filename" not in row:
            drop_log.add("record", key, "bad_row", row)
            drop_log.add("region", key, "bad_row", count=len(_regions(as_dict(row))))
    return rows


def _image_of_cells(cells: Row, where: str) -> Row:
    """The row of a CSV in the JSON's layout; an image without regions has an empty shape."""
    shape, attributes, of_file = (
        _object(cells.get(key), where)
        for key in ("region_shape_attributes", "region_attributes", "file_attributes")
    )
    region = {"shape_attributes": shape, "region_attributes": attributes}
    regions = [region] if shape or number(cells.get("region_count")) != 0 else []
    return {"filename": cells.get("filename"), "regions": regions, "file_attributes": of_file}


def _object(cell: Any, where: str) -> Row:
    if not cell:
        return {}
    try:
        return as_dict(json.loads(cell))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got {cell[:80]!r}") from error


def _regions(row: Row) -> list[Any]:
    """VIA 2 writes a list, VIA 1 an object number -> region."""
    regions = row.get("regions")
    return list(regions.values()) if isinstance(regions, dict) else as_list(regions)


def _only_attribute(path: str | Path, regions_of: dict[str, list[Any]]) -> str:
    shapes = (shape for regions in regions_of.values() for shape in regions)
    names = {
        str(name): None
        for shape in shapes
        for name in as_dict(as_dict(shape).get("region_attributes"))
    }
    if len(names) > 1:
        raise ValueError(
            f"{path}: regions have the attributes {', '.join(names)}; say which names what is in a "
            "box with --phrase_attribute"
        )
    return next(iter(names), "")


def _captions(rows: list[Row]) -> list[Any]:
    captions = (as_dict(row.get("file_attributes")).get("caption") for row in rows)
    return list(dict.fromkeys(text for text in captions if isinstance(text, str) and text))


def _to_regions(
    shape: Any, item: str, frame: BoxFrame, attribute: str, drop_log: DropLog
) -> list[Region]:
    stated = as_dict(as_dict(shape).get("shape_attributes"))
    kind = stated.get("name")
    if kind in _NO_BOX:
        drop_log.add("region", item, "no_box", stated)
        return []
    corners = _corners(kind, stated)
    if corners is None:
        drop_log.add("region", item, "bad_row", shape)
        return []
    (box,) = frame.from_xyxy([corners])
    marks = as_dict(as_dict(shape).get("region_attributes")).get(attribute, "")
    if isinstance(marks, dict):  # of a checkbox
        marks = [name for name, is_marked in marks.items() if is_marked]
    names = marks if isinstance(marks, list) and marks else [marks or ""]
    return [Region(box, name, category=name, found=stated) for name in names]


def _corners(kind: Any, stated: Row) -> list[float] | None:
    """xyxy in pixels; None for a shape that VIA does not have."""
    centre = [stated.get("cx"), stated.get("cy")]
    if kind == "rect":
        x, y, w, h = (number(stated.get(key)) for key in ("x", "y", "width", "height"))
        return [x, y, x + w, y + h]
    if kind == "circle":
        return around_ellipse(centre, [stated.get("r")] * 2)
    if kind == "ellipse":
        degrees = math.degrees(number(stated.get("theta") or 0))  # VIA writes radians
        return around_ellipse(centre, [stated.get("rx"), stated.get("ry")], degrees)
    if kind == "polygon":
        xs, ys = (as_list(stated.get(f"all_points_{axis}")) for axis in "xy")
        points = [[x, y] for x, y in zip(xs, ys, strict=False)]
        enclosing = enclosing_corners(points) if len(xs) == len(ys) else None
        return enclosing or [math.nan] * 4
    return None


def looks_like_via(place: Place) -> Iterator[Reading]:
    """A project, or annotations by image; one reading per attribute that may name the regions."""
    stated = as_dict(place.table.get("_via_img_metadata", place.table))
    images = [row for row in stated.values() if "filename" in as_dict(row) and "regions" in row]
    cells = [{key.lstrip("#"): value for key, value in row.items() if key} for row in place.rows]
    if all("region_shape_attributes" in row for row in cells):
        images += [_image_of_cells(row, place.path.name) for row in cells]
    if not images:
        return
    shapes = [as_dict(shape) for row in images for shape in _regions(row)]
    attributes = dict.fromkeys(
        name for shape in shapes for name in as_dict(shape.get("region_attributes"))
    )
    why = f"{place.path.name} has VIA's images with regions"
    options = {"annotations": place.path}
    if len(attributes) < 2:
        yield Reading(why, options, "pixels")
        return
    for name in attributes:
        named = {**options, "phrase_attribute": name}
        yield Reading(f"{why}, named by their attribute {name}", named, "pixels")
