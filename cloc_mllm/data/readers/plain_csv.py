"""Tables of any tool: CSV, TSV, JSON lines or a JSON list, a row per box, by a mapping of columns.

Roles of columns: `image`, four for the box, which the order names (`x1 y1 x2 y2`, `x y w h`,
`cx cy w h`), or one `box` that holds all four; `phrase`; and, where there are any, `category`,
`expression`, `caption`, `score`, and `image_width` and `image_height`, which pixels are of.

Frame: what the user says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    deliver,
    group_by_photo,
    open_photos,
    single,
)
from cloc_mllm.data.readers.boxes import FRAME_NAMES, BoxOrder, Units
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region, clean_text
from cloc_mllm.data.texts import read_rows
from cloc_mllm.data.values import id_key, number

SOURCE = "csv"
BOX_ROLES: dict[BoxOrder, tuple[str, ...]] = {
    "xyxy": ("x1", "y1", "x2", "y2"),
    "xywh": ("x", "y", "w", "h"),
    "cxcywh": ("cx", "cy", "w", "h"),
    "yxyx": ("y1", "x1", "y2", "x2"),
}
_TEXT_ROLES = ("phrase", "category", "expression")
_KNOWN_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
_MORE_ROLES = ("caption", "score", "image_width", "image_height")
# how tools call the columns; a role's own name comes first
_USUAL_IMAGES = ("image", "filename", "file_name", "file", "image_path", "img_path", "path", "img")
_USUAL_TEXTS = ("phrase", "label", "class", "class_name", "category", "name", "text", "expression")
_USUAL_BOXES: tuple[tuple[BoxOrder, tuple[str, ...]], ...] = (
    ("xyxy", ("x1", "y1", "x2", "y2")),
    ("xyxy", ("xmin", "ymin", "xmax", "ymax")),
    ("xyxy", ("x_min", "y_min", "x_max", "y_max")),
    ("xyxy", ("left", "top", "right", "bottom")),
    ("cxcywh", ("cx", "cy", "w", "h")),
    ("cxcywh", ("x_center", "y_center", "width", "height")),
    ("xywh", ("x", "y", "w", "h")),
    ("xywh", ("x", "y", "width", "height")),
    ("xywh", ("bbox_x", "bbox_y", "bbox_width", "bbox_height")),
)
_USUAL_SIZES = (("image_width", "image_height"), ("img_width", "img_height"), ("width", "height"))
Row = dict[str, Any]
Columns = Mapping[str, str]


def read_csv(  # noqa: PLR0913  what the source can be told
    rows: str | Path,
    images: str | Path,
    *,
    frame: Units,
    box_order: BoxOrder = "xyxy",
    columns: Columns | None = None,
    header: bool = True,
    delimiter: str = "",
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image, in the order of the rows.

    A row is a region. Rows that give expressions of one box, with the same phrase and category,
    are one region. A row with an image and nothing else is an image without a region.

    Args:
        rows: the table; `.json`, `.jsonl` and `.ndjson` hold JSON rows, other files cells.
        images: folder, tar or zip.
        frame: what the numbers are measured in.
        box_order: what the four numbers are.
        columns: role -> column; by default a column has the name of its role. Without a header,
            columns are numbered from 1, and by default image, the box and the phrase come first.
        delimiter: between the cells; "" is a comma, and a tab in `.tsv`.
        drop_log: beside the reasons of `validate_record`, regions get `bad_row` (no image,
            or more cells than columns: a comma in a text that is not quoted).

    Raises:
        ValueError: a column is missing, or a role unknown.
    """
    wanted = _columns_by_role(columns or {}, box_order, header)
    if not delimiter and Path(rows).suffix.lower() not in _KNOWN_SUFFIXES:
        delimiter = ","
    table = list(read_rows(rows, options.encoding, delimiter, () if header else None))
    there = dict.fromkeys(key for _, row in table for key in as_dict(row) if key is not None)
    column_of = _present(wanted, there, columns or {}, box_order, str(rows)) if there else {}
    named: list[tuple[Any, Row]] = []
    for item, row in table:
        values = {role: as_dict(row).get(column) for role, column in column_of.items()}
        if id_key(values.get("image")) is None or None in row:
            drop_log.add("region", item, "bad_row", row)
        else:
            named.append((values["image"], {**values, "item": item}))
    rows_of = group_by_photo(named)
    ids = ids_of_names(rows_of)
    with open_photos(images, drop_log, options, single(rows_of)) as photos:
        for name, group in rows_of.items():
            photo = photos.find(name)
            captions: list[Any] = []
            for row in group:
                if row.get("caption") not in (None, "", *captions):
                    captions.append(row["caption"])
            regions = _to_regions(group, photo, frame, box_order)
            yield from deliver(ids[name], photo, SOURCE, captions, regions, drop_log)


def _columns_by_role(columns: Columns, box_order: BoxOrder, header: bool) -> dict[str, str]:
    """The column of each role that may be there."""
    box = BOX_ROLES[box_order]
    roles = ("image", *box, "box", *_TEXT_ROLES, *_MORE_ROLES)
    if unknown := [role for role in columns if role not in roles]:
        raise ValueError(
            f"--columns names {', '.join(unknown)}; the roles of box order {box_order} are "
            f"{', '.join(roles)}"
        )
    if header:
        return {role: columns.get(role, role) for role in roles}
    if columns:
        return dict(columns)
    return {role: str(number) for number, role in enumerate(("image", *box, "phrase"), 1)}


def _present(
    column_of: dict[str, str],
    columns_there: Iterable[str],
    columns: Columns,
    box_order: BoxOrder,
    path: str,
) -> dict[str, str]:
    """Leaves out roles that the table does not have; those that it must have are an error."""
    there = {role: column for role, column in column_of.items() if column in columns_there}
    needed = ["image", *columns, *(() if "box" in there else BOX_ROLES[box_order])]
    if not any(role in there for role in _TEXT_ROLES):
        needed.append("phrase")
    missing = [column_of.get(role, role) for role in needed if role not in there]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(dict.fromkeys(missing))}, there are "
            f"{', '.join(map(str, columns_there))}; name yours with --columns, such as "
            "image=file,phrase=label, and the cells' separator with --delimiter"
        )
    return there


def _to_regions(rows: list[Row], photo: Photo, frame: Units, box_order: BoxOrder) -> list[Region]:
    regions: dict[Any, Region] = {}
    for row in rows:
        stated = _numbers_of(row, box_order)
        texts = [row.get(role) for role in _TEXT_ROLES]
        if all(value in (None, "") for value in [*stated, *texts]):
            continue
        place = photo.frame_in(frame, row.get("image_width"), row.get("image_height"))
        (box,) = place.from_order([stated], box_order)
        phrase, category, expression = texts
        stated_texts: list[Any] = expression if isinstance(expression, list) else [expression]
        expressions = [text for text in stated_texts if text not in (None, "")]
        key = (repr(stated), repr(phrase), repr(category)) if expressions else row["item"]
        if key in regions:
            regions[key].expressions += expressions
            continue
        words = [text for text in (phrase, category, *expressions) if clean_text(text)[0]]
        score = 1.0 if row.get("score") in (None, "") else number(row["score"])
        regions[key] = Region(
            box,
            words[0] if words else phrase or "",
            score,
            expressions,
            category or "",
            found=stated,
        )
    return list(regions.values())


def _numbers_of(row: Row, box_order: BoxOrder) -> list[Any]:
    if "box" not in row:
        return [row[role] for role in BOX_ROLES[box_order]]
    stated = row["box"]
    if isinstance(stated, str):
        try:
            stated = json.loads(stated)
        except (ValueError, RecursionError):
            stated = [part for part in re.split(r"[\s,;()\[\]]+", stated) if part]
    return stated if isinstance(stated, list) else [stated]


def looks_like_csv(place: Place) -> Iterator[Reading]:
    """Rows with an image, a box and a text under usual names; what the numbers are measured in is
    not stated, and their order only by four columns."""
    there = {str(key).lower(): str(key) for key in (place.rows[0] if place.rows else ())}
    texts = _first(there, _USUAL_TEXTS)
    image = _first(there, _USUAL_IMAGES)
    if not (texts and image):
        return
    for order, names in _USUAL_BOXES:
        if set(names) <= there.keys():
            columns = dict(zip(BOX_ROLES[order], names, strict=True))
            orders: tuple[BoxOrder, ...] = (order,)
            break
    else:
        box = _first(there, ("bbox", "box"))
        if not box:
            return
        columns, orders = {"box": box}, ("xyxy", "xywh", "cxcywh")
    columns = {"image": image, **columns, "phrase": texts}
    for across, down in _USUAL_SIZES:
        if {across, down} <= there.keys() - set(columns.values()):
            columns |= {"image_width": across, "image_height": down}
            break
    columns = {role: there[name] for role, name in columns.items()}
    why = f"the rows of {place.path.name} have {', '.join(columns.values())}"
    renamed = ",".join(f"{role}={name}" for role, name in columns.items() if role != name)
    for frame, stated in FRAME_NAMES.items():
        for order in orders:
            options = {"rows": place.path, "frame": frame, "box_order": order, "columns": renamed}
            yield Reading(why, options, stated, order, is_general=True, is_declared=False)


def _first(there: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in there), "")
