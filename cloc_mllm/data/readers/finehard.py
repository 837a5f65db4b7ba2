"""FineHARD (Xie et al. 2025, FG-CLIP): photos of COYO with two captions each and described boxes.

A file of `jsonfiles/` is a list of `{"f_path", "caption", "short_caption", "bbox_info": [{"bbox":
[x1, y1, x2, y2, score], "short_expr", "long_expr", "flag_short_neg", "short_expr_negs"}]}`. Photos
lie where FG-CLIP's `data/convert_image_name.py` puts them: below `coyo_image_*`, without the first
two folders of `f_path`.

Layout: `fgclip/train/train_fgclip.py` and `data/data.md` of github.com/360CVGroup/FG-CLIP.

Frame: xyxy, 0..1 of the image (FG-CLIP multiplies it by the sides of the resized photo).
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
)
from cloc_mllm.data.readers.boxes import BoxFrame
from cloc_mllm.data.readers.files import Names
from cloc_mllm.data.readers.photos import names_of
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_rows
from cloc_mllm.data.values import id_key, number

SOURCE = "finehard"
_PREFIX = "grit-20m/data-12m/"  # of f_path; FG-CLIP's loader takes it off, too
_NEGATIVES = "hard negatives (short_expr_negs), which no record holds"


def read_finehard(
    rows: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per row. A region's phrase is its short description, the long one is an
    expression.

    Args:
        rows: the folder `jsonfiles`, or one of its files.
        images: folder, tar or zip of the photos.
        drop_log: beside the reasons of `validate_record`, records and regions get `bad_row`.
    """
    files = rows_files(rows)

    def all_names() -> Iterator[Names]:
        rows_of = (read_rows(path, options.encoding) for path in files)
        return (names_of(_name(row)) for rows in rows_of for _, row in rows)

    with open_photos(images, drop_log, options, all_names) as photos:
        for path in files:
            for item, row in read_rows(path, options.encoding):
                name = _name(row)
                if name is None:
                    drop_log.add("record", f"{path.name}, {item}", "bad_row", row)
                    continue
                photo = photos.find(name)
                captions = [row[key] for key in ("caption", "short_caption") if row.get(key)]
                regions = _to_regions(row, photo.share_frame(), name, drop_log)
                yield from deliver(name, photo, SOURCE, captions, regions, drop_log)


def rows_files(rows: str | Path) -> list[Path]:
    """Lists the JSON files of a folder in order, or the one file.

    Raises:
        FileNotFoundError: the folder has none.
    """
    rows = Path(rows)
    if not rows.is_dir():
        return [rows]
    files = sorted(path for path in rows.iterdir() if path.suffix in (".json", ".jsonl"))
    if not files:
        raise FileNotFoundError(f"{rows} holds no .json or .jsonl file; name the folder of rows")
    return files


def _name(row: Any) -> str | None:
    name = id_key(as_dict(row).get("f_path"))
    return None if name is None else name.removeprefix(_PREFIX)


def _to_regions(row: dict[str, Any], frame: BoxFrame, name: str, drop_log: DropLog) -> list[Region]:
    regions = []
    for thing in as_list(row.get("bbox_info")):
        if not isinstance(thing, dict):
            drop_log.add("region", name, "bad_row", thing)
            continue
        if thing.get("short_expr_negs"):
            drop_log.note(_NEGATIVES, example=name)
        numbers = as_list(thing.get("bbox"))
        (box,) = frame.from_xyxy([numbers[:4]])
        short, long = thing.get("short_expr") or "", thing.get("long_expr") or ""
        regions.append(
            Region(
                box=box,
                phrase=short or long,
                score=number(numbers[4]) if len(numbers) > 4 else 1.0,
                expressions=[long] if long and short else [],
                found=numbers,
            )
        )
    return regions


def looks_like_finehard(place: Place) -> Iterator[Reading]:
    """Rows with `f_path` and `bbox_info`."""
    if place.has_rows_with("f_path", "bbox_info"):
        why = f"the rows of {place.path.name} have f_path and bbox_info"
        yield Reading(why, {"rows": place.path}, "0..1")
