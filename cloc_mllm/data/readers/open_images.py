"""Open Images (Kuznetsova et al. 2020): a CSV of boxes, a CSV of class names, and the images.

`ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,...,IsGroupOf,...`; the class names are
`/m/011k07,Tortoise`, with a header (V7) or without one.

Frame: 0..1 of the original image.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cloc_mllm.data.readers import DEFAULTS, ReadOptions, deliver, open_photos, single
from cloc_mllm.data.readers.boxes import BoxFrame
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_rows
from cloc_mllm.data.values import id_key, number

SOURCE = "open-images"
_COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax")


class _Row(NamedTuple):
    """What is kept of a row; a set has millions."""

    item: str
    label: str
    xyxy: tuple[Any, ...]
    score: float
    is_group: bool


def read_open_images(  # noqa: PLR0913  what the source can be told
    boxes: str | Path,
    classes: str | Path,
    images: str | Path,
    *,
    keep_crowd: bool = False,
    ids: Collection[str] | None = None,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image, with one region per box; phrase and category are its class.

    Args:
        boxes: the CSV of boxes.
        classes: `class-descriptions-boxable.csv`: label, name.
        images: folder, tar or zip of `ImageID.jpg`.
        keep_crowd: keep boxes around groups (`IsGroupOf` 1); by default they are set aside.
        ids: image ids to read; by default all. The others are set aside.
        drop_log: beside the reasons of `validate_record`, regions get `unknown_category` and
            `bad_row` (no image id).

    Raises:
        ValueError: other columns.
    """
    names = _read_names(classes, options)
    rows_of = _read_boxes(boxes, options, drop_log)
    if ids is not None:
        for image_id in rows_of.keys() - {id_key(image_id) for image_id in ids}:
            drop_log.put_aside("record", "not_asked")
            drop_log.put_aside("region", "not_asked", len(rows_of.pop(image_id)))
    with open_photos(images, drop_log, options, single(rows_of), tell_unused=ids is None) as photos:
        for image_id, rows in rows_of.items():
            photo = photos.find(image_id)
            regions = _to_regions(rows, photo.share_frame(), names, keep_crowd, drop_log)
            yield from deliver(image_id, photo, SOURCE, [], regions, drop_log)


def _read_names(path: str | Path, options: ReadOptions) -> dict[str, str]:
    rows = list(read_rows(path, options.encoding, columns=("label", "name")))
    names = {row["label"]: row["name"] for _, row in rows if row.get("name")}
    if not names:
        raise ValueError(f"{path}: expected lines `/m/011k07,Tortoise`")
    return names


def _read_boxes(path: str | Path, options: ReadOptions, drop_log: DropLog) -> dict[str, list[_Row]]:
    rows_of: dict[str, list[_Row]] = {}
    for item, row in read_rows(path, options.encoding):
        if missing := [name for name in _COLUMNS if name not in row]:
            raise ValueError(
                f"{path}: expected Open Images' columns, {', '.join(missing)} are missing; "
                f"there are {', '.join(map(str, row))}"
            )
        image_id = id_key(row["ImageID"])
        if image_id is None:
            drop_log.add("region", item, "bad_row", row)
            continue
        xyxy = tuple(row[name] for name in ("XMin", "YMin", "XMax", "YMax"))
        score = 1.0 if row.get("Confidence") in (None, "") else number(row["Confidence"])
        is_group = row.get("IsGroupOf") == "1"
        rows_of.setdefault(image_id, []).append(
            _Row(item, row["LabelName"] or "", xyxy, score, is_group)
        )
    return rows_of


def _to_regions(
    rows: list[_Row], frame: BoxFrame, names: dict[str, str], keep_crowd: bool, drop_log: DropLog
) -> list[Region]:
    regions = []
    for row in rows:
        name = names.get(row.label)
        if row.is_group and not keep_crowd:
            drop_log.put_aside("region", "crowd")
        elif name is None:
            drop_log.add("region", row.item, "unknown_category", f"LabelName {row.label}")
        else:
            (box,) = frame.from_xyxy([row.xyxy])
            regions.append(Region(box, name, row.score, category=name, found=row.xyxy))
    return regions


def looks_like_open_images(place: Place) -> Iterator[Reading]:
    if not place.has_rows_with(*_COLUMNS):
        return
    why = f"{place.path.name} has Open Images' columns ImageID, LabelName, XMin"
    classes = [path for path in place.siblings(".csv") if "class" in path.name.lower()]
    options = {"boxes": place.path}
    if len(classes) == 1:
        yield Reading(why, {**options, "classes": classes[0]}, "0..1")
    else:
        lacks = "--classes, class-descriptions-boxable.csv"
        yield Reading(why, options, "0..1", lacks=lacks)
