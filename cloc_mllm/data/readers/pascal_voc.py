"""Pascal VOC folders (Everingham et al. 2010): `Annotations/NAME.xml` and `JPEGImages/NAME.jpg`.

Frame: `bndbox` is xmin, ymin, xmax, ymax in pixels of the `size` the XML states. Pascal's own files
count pixels from 1 and include the last, so a box covers xmin - 1 .. xmax; many tools count from
0 and write corners (`zero_based`).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cloc_mllm.data.readers import boxes_from_xyxy, deliver
from cloc_mllm.data.readers.files import open_files, parse_xml, read_image
from cloc_mllm.data.records import DropLog, Record, Region

SOURCE = "pascal-voc"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_pascal_voc(
    annotations: str | Path,
    images: str | Path,
    *,
    zero_based: bool = False,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per XML, with one region per object; phrase and category are its name.

    Args:
        annotations: folder, tar or zip of the XML files.
        images: folder, tar or zip; an image has the name of its XML.
        zero_based: pixels count from 0, and the last corner is not included.
        drop_log: beside the reasons of `validate_record`, records get `bad_annotation`.
    """
    with open_files(annotations) as xml_files, open_files(images) as image_files:
        for name in [name for name in xml_files.names() if name.lower().endswith(".xml")]:
            stem = PurePosixPath(name).stem
            try:
                root = parse_xml(xml_files.read(name) or b"")
            except ET.ParseError:
                drop_log.add("record", stem, "bad_annotation")
                continue
            image = read_image(image_files, stem)
            regions = _to_regions(root, image, 0 if zero_based else 1)
            yield from deliver(stem, image, SOURCE, [], regions, drop_log)


def _to_regions(root: ET.Element, image: bytes, first_pixel: int) -> list[Region]:
    things = root.findall("object")
    rows = [[thing.findtext(f"bndbox/{corner}") for corner in _CORNERS] for thing in things]
    boxes = boxes_from_xyxy(
        [_from_zero(row, first_pixel) for row in rows],
        root.findtext("size/width"),
        root.findtext("size/height"),
        image,
    )
    regions = []
    for thing, box in zip(things, boxes, strict=True):
        name = thing.findtext("name") or ""
        regions.append(Region(box=box, phrase=name, category=name))
    return regions


def _from_zero(row: list[str | None], first_pixel: int) -> list[float] | None:
    try:
        x1, y1, x2, y2 = (float(value or "") for value in row)
    except ValueError:
        return None
    return [x1 - first_pixel, y1 - first_pixel, x2, y2]
