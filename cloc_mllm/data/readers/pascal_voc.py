"""Pascal VOC folders (Everingham et al. 2010): `Annotations/NAME.xml` and `JPEGImages/NAME.jpg`.

Frame: `bndbox` is xmin, ymin, xmax, ymax in pixels of the `size` the XML states, or of the image
file where it states none. Pascal's own files count pixels from 1 and include the last, so a box
covers xmin - 1 .. xmax; many tools count from 0 and write corners (`zero_based`).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from cloc_mllm.data.readers import DEFAULTS, Photo, ReadOptions, deliver, open_photos
from cloc_mllm.data.readers.files import Files, open_files
from cloc_mllm.data.readers.photos import names_of
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import parse_xml
from cloc_mllm.data.values import number

SOURCE = "pascal-voc"
_NUM_SAMPLED = 1000  # files that are looked at to tell from what pixels count
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_pascal_voc(
    annotations: str | Path,
    images: str | Path,
    *,
    zero_based: bool = False,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per XML, with one region per `bndbox`; phrase and category are its name.

    Several boxes of one object share a `group`.

    Args:
        annotations: folder, tar or zip of the XML files, at any depth.
        images: folder, tar or zip. An image has the name of its XML, or the XML's `filename`.
        zero_based: pixels count from 0, and the last corner is not included.
        drop_log: beside the reasons of `validate_record`, records get `bad_annotation`; an object
            without a box is a region `not_finite`.
    """
    with open_files(annotations) as xml_files:
        stems = [name[:-4] for name in xml_files.names() if name.lower().endswith(".xml")]
        num_others = len(xml_files.names()) - len(stems)
        drop_log.note("files among the annotations that are no XML by their name", num_others)
        paths = {name[:-4]: name for name in xml_files.names() if name.lower().endswith(".xml")}

        def all_names() -> Iterator[tuple[str, ...]]:
            for stem, path in paths.items():
                root = _parsed(xml_files, path, options.encoding)
                yield _image_names(stem, root if isinstance(root, ET.Element) else None)

        with open_photos(images, drop_log, options, all_names) as photos:
            for stem, path in paths.items():
                root = _parsed(xml_files, path, options.encoding)
                if isinstance(root, str):
                    drop_log.add("record", stem, "bad_annotation", root)
                    continue
                photo = photos.find(*_image_names(stem, root))
                regions = _to_regions(root, photo, stem, 0 if zero_based else 1)
                yield from deliver(stem, photo, SOURCE, [], regions, drop_log)


def _parsed(files: Files, path: str, encoding: str) -> ET.Element | str:
    """The root of an XML file, or why it cannot be parsed."""
    try:
        return parse_xml(files.read(path) or b"", path, encoding)
    except ET.ParseError as error:
        return f"{path}: {error}"


def _image_names(stem: str, root: ET.Element | None) -> tuple[str, ...]:
    """The XML's own name first: tools that copy files forget `filename`."""
    return names_of(stem, None if root is None else root.findtext("filename"))


def _to_regions(root: ET.Element, photo: Photo, stem: str, first_pixel: int) -> list[Region]:
    frame = photo.frame(root.findtext("size/width"), root.findtext("size/height"))
    regions = []
    for index, thing in enumerate(root.findall("object")):
        name = thing.findtext("name") or ""
        stated = [[box.findtext(corner) for corner in CORNERS] for box in thing.findall("bndbox")]
        rows = stated or [[None] * 4]
        group = f"{stem}/{index}" if len(rows) > 1 else ""
        boxes = frame.from_xyxy([_from_zero(row, first_pixel) for row in rows])
        for row, box in zip(rows, boxes, strict=True):
            found = row if stated else "no bndbox"
            regions.append(Region(box, name, category=name, group=group, found=found))
    return regions


def _from_zero(row: list[str | None], first_pixel: int) -> list[float]:
    x1, y1, x2, y2 = (number(value) for value in row)
    return [x1 - first_pixel, y1 - first_pixel, x2, y2]


def looks_like_pascal_voc(place: Place) -> Iterator[Reading]:
    """A folder of XML files of `object` with `bndbox`; corners of 0 or of parts of a pixel tell
    that pixels do not count from 1."""
    names = [name for name in place.names if name.lower().endswith(".xml")][:_NUM_SAMPLED]
    if not names or any(
        name.lower().endswith(".txt") and "Sentences/" in name for name in place.names
    ):
        return
    roots = [_root(data) for data in place.read(names)]
    boxes = [box for root in roots if root is not None for box in root.iterfind("object/bndbox")]
    if not boxes or sum(root is not None for root in roots) * 2 < len(roots):
        return
    corners = [[number(box.findtext(corner)) for corner in CORNERS] for box in boxes]
    num_zeros = sum(min(row[:2]) < 1 for row in corners)
    num_parts = sum(any(value % 1 for value in row) for row in corners)
    is_zero_based = num_zeros > 0 or 2 * num_parts > len(corners)
    counted = f"{num_zeros} of {len(corners)} boxes start before pixel 1, "
    counted += f"{num_parts} have parts of pixels"
    why = f"{len(names)} XML files of objects with bndbox; {counted}: pixels count from "
    why += "0 (--zero_based)" if is_zero_based else "1, as Pascal's own (--zero_based if not)"
    folders = {name.rpartition("/")[0] for name in names}
    folder = place.path / folders.pop() if len(folders) == 1 else place.path
    yield Reading(why, {"annotations": folder, "zero_based": is_zero_based}, "pixels")


def _root(data: bytes) -> ET.Element | None:
    """The root of a VOC file, whatever its encoding: only tags and numbers are looked at."""
    try:
        root = parse_xml(data, "", "" if data.startswith(b"\xef\xbb\xbf") else "latin-1")
    except ET.ParseError:
        return None
    return root if root.tag == "annotation" else None
