"""CVAT's own format, "CVAT for images 1.1": one `annotations.xml`, in a folder or zip, with the
images beside it or elsewhere.

`<image name width height>` holds the shapes. A shape's `label` is its class; `<attribute
name="...">` inside it may hold a referring expression.

| shape | box |
|---|---|
| `box` | itself, in pixels; with a `rotation` in degrees, what encloses it |
| `polygon`, `ellipse`, `mask` | what encloses it |
| `polyline`, `points`, `cuboid`, `skeleton` | none: dropped (`no_box`) |

Frame: pixels of the stated width and height.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import DEFAULTS, Photo, ReadOptions, deliver, open_photos, single
from cloc_mllm.data.readers.boxes import around_ellipse, around_turned, enclosing_corners
from cloc_mllm.data.readers.files import open_files, read_annotation_file
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import parse_xml
from cloc_mllm.data.values import number

SOURCE = "cvat"
_NUM_BYTES = 4096  # at the start of the file, where its root is
_NO_BOX = ("polyline", "points", "cuboid", "skeleton")
_SHAPES = ("box", "polygon", "ellipse", "mask", *_NO_BOX)
TAGS = "labels of whole images, which are of no region"


def read_cvat(
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    expression_attribute: str = "",
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per `<image>`, with one region per shape.

    Phrase and category are the shape's label.

    Args:
        annotations: the XML, or a folder, tar or zip that holds it.
        images: folder, tar or zip; by default where the XML lies.
        expression_attribute: name of the attribute that holds a referring expression of a shape;
            an empty one is none.
        drop_log: beside the reasons of `validate_record`, regions get `no_box` and `bad_row`.

    Raises:
        ValueError: no XML, several, or one of a video (`<track>`).
    """
    root = _read_root(Path(annotations), options.encoding)
    rows = root.findall("image")
    names = [row.get("name") for row in rows]
    ids = ids_of_names(names)
    where = Path(annotations)
    with open_photos(
        images or (where.parent if where.suffix.lower() == ".xml" else where),
        drop_log,
        options,
        single(names),
        tell_unused=images is not None,
    ) as photos:
        for name, row in zip(names, rows, strict=True):
            photo = photos.find(name)
            regions = _to_regions(row, photo, expression_attribute, drop_log)
            yield from deliver(ids[name], photo, SOURCE, [], regions, drop_log)


def _read_root(path: Path, encoding: str) -> ET.Element:
    data, where = _xml_bytes(path)
    try:
        root = parse_xml(data, where, encoding)
    except ET.ParseError as error:
        raise ValueError(f"{where} is not valid XML: {error}") from error
    if root.find("track") is not None:
        raise ValueError(
            f'{where} is of a video ("CVAT for video"); export the task as "CVAT for images 1.1"'
        )
    if root.tag != "annotations" or root.find("image") is None:
        raise ValueError(
            f"{where}: expected <annotations> with <image> in it, CVAT for images 1.1, got "
            f"<{root.tag}>"
        )
    return root


def _xml_bytes(path: Path) -> tuple[bytes, str]:
    """The XML and its name for messages."""
    if path.suffix.lower() == ".xml":
        return read_annotation_file(path), str(path)
    with open_files(path) as files:
        found = [name for name in files.names() if name.lower().endswith(".xml")]
        if len(found) != 1:
            listed = ", ".join(found[:3]) or "none"
            raise ValueError(f"{path}: expected one annotations.xml, found {listed}; name it")
        return files.read(found[0]) or b"", f"{path}/{found[0]}"


def _to_regions(
    row: ET.Element, photo: Photo, expression_attribute: str, drop_log: DropLog
) -> list[Region]:
    frame = photo.frame(row.get("width"), row.get("height"))
    regions = []
    for index, shape in enumerate(row):
        item = f"{photo.name}, shape {index + 1}"
        found = {"shape": shape.tag, **shape.attrib}
        if shape.tag == "tag":
            drop_log.note(TAGS)
        elif shape.tag not in _SHAPES:
            drop_log.add("region", item, "bad_row", found)
        elif shape.tag in _NO_BOX:
            drop_log.add("region", item, "no_box", found)
        else:
            (box,) = frame.from_xyxy([_corners(shape)])
            label = shape.get("label", "")
            expressions = [
                attribute.text or ""
                for attribute in shape.findall("attribute")
                if expression_attribute
                and attribute.get("name") == expression_attribute
                and (attribute.text or "").strip()
            ]
            found.pop("rle", None)
            regions.append(Region(box, label, expressions=expressions, category=label, found=found))
    return regions


def _corners(shape: ET.Element) -> list[float]:
    """xyxy in pixels of the image; NaN for what states no numbers."""
    degrees = shape.get("rotation", "0")
    if shape.tag == "box":
        corners = [shape.get(name) for name in ("xtl", "ytl", "xbr", "ybr")]
        return around_turned(corners, degrees)
    if shape.tag == "ellipse":
        centre = [shape.get("cx"), shape.get("cy")]
        return around_ellipse(centre, [shape.get("rx"), shape.get("ry")], degrees)
    if shape.tag == "mask":
        left, top, width, height = (
            number(shape.get(name)) for name in ("left", "top", "width", "height")
        )
        return [left, top, left + width, top + height]
    points = [point.split(",") for point in (shape.get("points") or "").split(";")]
    return enclosing_corners(points) or [math.nan] * 4


def looks_like_cvat(place: Place) -> Iterator[Reading]:
    if place.path.suffix.lower() != ".xml":
        return
    data = read_annotation_file(place.path)
    if b"<annotations" in data[:_NUM_BYTES] and b"<image " in data:
        has_expressions = b'name="expression"' in data
        options: dict[str, Any] = {"annotations": place.path}
        if has_expressions:
            options["expression_attribute"] = "expression"
        why = f"{place.path.name} has <annotations> with <image>, CVAT for images 1.1"
        why += ", and an attribute `expression`" if has_expressions else ""
        yield Reading(why, options, "pixels")
