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

from cloc_mllm.data.images import upright_size
from cloc_mllm.data.readers import as_dict, as_list, boxes_from_xywh, deliver
from cloc_mllm.data.readers.files import open_files, read_image, read_json
from cloc_mllm.data.records import DropLog, Record, Region

SOURCE = "visual-genome"
Row = dict[str, Any]


def read_visual_genome(
    annotations: str | Path,
    images: str | Path,
    *,
    image_data: str | Path | None = None,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo, with one region per described region and per object.

    The phrase is the description or the name.

    Args:
        annotations: one of the files above; join two with `cloc-mllm data merge`.
        images: folder, tar or zip of `ID.jpg`.
        image_data: `image_data.json` with the sizes of the photos.
        drop_log: beside the reasons of `validate_record`, records get `bad_row`, regions too.
    """
    table = read_json(annotations)
    if not isinstance(table, list):
        raise ValueError(f"{annotations}: expected a JSON list of photos, Visual Genome's layout")
    sizes = _read_sizes(image_data) if image_data else {}
    with open_files(images) as image_files:
        for index, row in enumerate(table):
            photo_id = _photo_id(row)
            if photo_id is None:
                drop_log.add("record", f"row {index}", "bad_row")
                continue
            image = read_image(image_files, photo_id)
            size = sizes.get(photo_id) or upright_size(image) or (None, None)
            regions = _to_regions(row, photo_id, size, image, drop_log)
            yield from deliver(photo_id, image, SOURCE, [], regions, drop_log)


def _photo_id(row: Any) -> str | None:
    found = as_dict(row).get("image_id", as_dict(row).get("id"))
    return None if found is None else str(found)


def _read_sizes(path: str | Path) -> dict[str, tuple[Any, Any]]:
    rows = [row for row in as_list(read_json(path)) if isinstance(row, dict)]
    return {str(_photo_id(row)): (row.get("width"), row.get("height")) for row in rows}


def _to_regions(
    row: Row, photo_id: str, size: tuple[Any, Any], image: bytes, drop_log: DropLog
) -> list[Region]:
    boxes: list[list[Any]] = []
    phrases: list[Any] = []
    categories: list[Any] = []
    for item in [*as_list(row.get("regions")), *as_list(row.get("objects"))]:
        if not isinstance(item, dict):
            drop_log.add("region", photo_id, "bad_row")
            continue
        width, height = item.get("width", item.get("w")), item.get("height", item.get("h"))
        boxes.append([item.get("x"), item.get("y"), width, height])
        name = item.get("name") or next(iter(as_list(item.get("names"))), None)
        phrases.append(item.get("phrase", name))
        categories.append("" if "phrase" in item else name)
    return [
        Region(box=box, phrase=phrase, category=category)
        for box, phrase, category in zip(
            boxes_from_xywh(boxes, *size, image), phrases, categories, strict=True
        )
    ]
