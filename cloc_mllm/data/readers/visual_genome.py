"""Visual Genome (Krishna et al. 2017): `region_descriptions.json` (or `region_graphs.json`) and
`objects.json`.

Each is a list of `{"image_id" (or "id"), "regions": [{"region_id", "phrase", "x", "y", "width",
"height"}], "objects": [{"object_id", "names" (or "name"), "x", "y", "w", "h"}]}`.

Frame: x, y, width, height in pixels of the original photo. Its size stands in `image_data.json`;
without that file it is the size of the image file, which must then not be resized.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import (
    DEFAULTS,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    open_photos,
    single,
)
from cloc_mllm.data.readers.boxes import BoxFrame
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_json
from cloc_mllm.data.values import id_key

SOURCE = "visual-genome"
Row = dict[str, Any]


def read_visual_genome(
    annotations: str | Path,
    images: str | Path,
    *,
    image_data: str | Path | None = None,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo, with one region per described region and per object.

    The phrase is the description or the name.

    Args:
        annotations: one of the files above; join two with `cloc-mllm data merge`.
        images: folder, tar or zip that holds `ID.jpg` at any depth (`VG_100K`, `VG_100K_2`).
        image_data: `image_data.json` with the sizes of the photos.
        drop_log: beside the reasons of `validate_record`, records get `bad_row`, regions too.
    """
    table = read_json(annotations, options.encoding)
    if not isinstance(table, list):
        raise ValueError(f"{annotations}: expected a JSON list of photos, Visual Genome's layout")
    sizes = _read_sizes(image_data, options) if image_data else {}
    names = single(map(_photo_id, table))
    with open_photos(images, drop_log, options, names) as photos:
        for index, row in enumerate(table):
            photo_id = _photo_id(row)
            if photo_id is None:
                drop_log.add("record", f"row {index}", "bad_row", row)
                continue
            photo = photos.find(photo_id)
            frame = photo.frame(*sizes.get(photo_id, ()))
            regions = _to_regions(row, photo_id, frame, drop_log)
            yield from deliver(photo_id, photo, SOURCE, [], regions, drop_log)


def _photo_id(row: Any) -> str | None:
    return id_key(as_dict(row).get("image_id", as_dict(row).get("id")))


def _read_sizes(path: str | Path, options: ReadOptions) -> dict[str | None, tuple[Any, Any]]:
    rows = [row for row in as_list(read_json(path, options.encoding)) if isinstance(row, dict)]
    return {_photo_id(row): (row.get("width"), row.get("height")) for row in rows}


def _to_regions(row: Row, photo_id: str, frame: BoxFrame, drop_log: DropLog) -> list[Region]:
    regions = []
    for item in [*as_list(row.get("regions")), *as_list(row.get("objects"))]:
        if not isinstance(item, dict):
            drop_log.add("region", photo_id, "bad_row", item)
            continue
        width, height = item.get("width", item.get("w")), item.get("height", item.get("h"))
        stated = [item.get("x"), item.get("y"), width, height]
        (box,) = frame.from_xywh([stated])
        name: Any = item.get("name") or next(iter(as_list(item.get("names"))), None)
        category: Any = "" if "phrase" in item else name
        found = {"x, y, width, height": stated}
        regions.append(Region(box, item.get("phrase", name), category=category, found=found))
    return regions


def looks_like_visual_genome(place: Place) -> Iterator[Reading]:
    things = [
        as_dict(thing)
        for row in place.rows
        for thing in [*as_list(row.get("regions")), *as_list(row.get("objects"))]
    ]
    has_ids = place.has_rows_with("image_id") or place.has_rows_with("id")
    if has_ids and any({"x", "y"} <= thing.keys() for thing in things):
        why = f"the rows of {place.path.name} have Visual Genome's regions or objects with x, y"
        options = {"annotations": place.path, "image_data": place.sibling("image_data.json")}
        yield Reading(why, options, "pixels", "xywh")
