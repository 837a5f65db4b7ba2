"""Shikra's JSON lines (Chen et al. 2023).

A line is a referring expression `{"img_path", "expression", "bbox", "height", "width"}` or a
caption with marked phrases `{"image_id", "boxes", "sentence": "<ph_st>A woman<ph_ed> walks past
<ph_st>two cars<ph_ed>", "boxes_seq": [[0], [1, 2]]}`; `boxes_seq` names the boxes of each phrase.

Frame: xyxy in pixels of the original photo. A line may state the photo's size; else it is that of
the image file, which must then not be resized.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.box import Box
from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    group_by_photo,
    open_photos,
    regions_of_expressions,
    single,
)
from cloc_mllm.data.readers.chat_layouts import chat_readings
from cloc_mllm.data.readers.names import ids_of_names
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_rows
from cloc_mllm.data.values import id_key

SOURCE = "shikra"
_PHRASE = re.compile(r"<ph_st>(.*?)<ph_ed>", re.DOTALL)
_MARKS = re.compile(r"<ph_st>|<ph_ed>")
Row = dict[str, Any]


def read_shikra(
    rows: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per photo. A phrase of several boxes makes a region of each, in one
    `group`.

    Args:
        rows: JSON lines, or a JSON list of such objects.
        images: folder, tar or zip of the photos.
        drop_log: beside the reasons of `validate_record`: rows get `bad_row` (no object,
            or without a photo), regions `unknown_annotation` (`boxes_seq` names no box) and
            `box_without_phrase`.
    """
    rows_of = group_by_photo(_named_rows(rows, options, drop_log))
    ids = ids_of_names(rows_of)
    with open_photos(images, drop_log, options, single(rows_of)) as photos:
        for name, photo_rows in rows_of.items():
            photo = photos.find(name)
            captions, regions = _parts(photo_rows, photo, drop_log)
            num_rows = len(photo_rows)
            yield from deliver(ids[name], photo, SOURCE, captions, regions, drop_log, num_rows)


def _named_rows(
    path: str | Path, options: ReadOptions, drop_log: DropLog
) -> Iterator[tuple[str, Row]]:
    for item, row in read_rows(path, options.encoding):
        name = as_dict(row).get("img_path") or as_dict(row).get("image_id")
        if id_key(name) is None:
            drop_log.add("row", item, "bad_row", f"no img_path or image_id: {shown(row)}")
        else:
            yield str(name), row


def _parts(rows: list[Row], photo: Photo, drop_log: DropLog) -> tuple[list[Any], list[Region]]:
    captions: list[Any] = []
    regions: list[Region] = []
    referring: list[tuple[Any, Box, Any]] = []
    for index, row in enumerate(rows):
        frame = photo.frame(row.get("width"), row.get("height"))
        if "sentence" in row:
            sentence = row["sentence"]
            marked = isinstance(sentence, str)
            captions.append(_MARKS.sub("", sentence) if marked else sentence)
            stated = as_list(row.get("boxes"))
            boxes = list(zip(stated, frame.from_xyxy(stated), strict=True))
            phrases = _PHRASE.findall(sentence) if marked else []
            item = f"{photo.name}/caption {index}"
            regions += _phrase_regions(phrases, row.get("boxes_seq"), boxes, item, drop_log)
        else:
            (box,) = frame.from_xyxy([row.get("bbox")])
            referring.append((row.get("bbox"), box, row.get("expression")))
    return captions, regions_of_expressions(referring) + regions


def _phrase_regions(
    phrases: list[str],
    boxes_seq: Any,
    boxes: list[tuple[Any, Box]],
    item: str,
    drop_log: DropLog,
) -> list[Region]:
    """Makes a region for each box of each phrase; what `boxes_seq` leaves out is counted."""
    regions = []
    used = set()
    for number, indices in enumerate(as_list(boxes_seq)):
        for index in as_list(indices):
            if type(index) is not int or not 0 <= index < len(boxes):
                found = f"box {index!r} of {len(boxes)}"
                drop_log.add("region", item, "unknown_annotation", found)
                continue
            used.add(index)
            stated, box = boxes[index]
            group = f"{item}/{number}" if len(indices) > 1 else ""
            phrase = phrases[number] if number < len(phrases) else ""
            regions.append(Region(box=box, phrase=phrase, group=group, found=stated))
    for index in set(range(len(boxes))) - used:
        drop_log.add("region", item, "box_without_phrase", boxes[index][0])
    return regions


def looks_like_shikra(place: Place) -> Iterator[Reading]:
    for keys in (("img_path", "expression", "bbox"), ("boxes", "boxes_seq", "sentence")):
        if place.has_rows_with(*keys):
            why = f"the rows of {place.path.name} have Shikra's {', '.join(keys)}"
            yield Reading(why, {"rows": place.path}, "pixels")
    yield from chat_readings(place, SOURCE)
