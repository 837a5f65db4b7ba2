"""Localized Narratives (Pont-Tuset et al. 2020): spoken captions with the mouse's trace.

A row of the JSON lines is `{"dataset_id", "image_id", "annotator_id", "caption", "timed_caption":
[{"utterance", "start_time", "end_time"}], "traces": [[{"x", "y", "t"}]]}`: what was said when, and
where the mouse was when. A box is drawn around the trace of the time of an utterance. Annotators
hover over things, they do not outline them, so these boxes are loose.

Layout: `localized_narratives.py` of github.com/google/localized-narratives.

Frame: x and y in 0..1 of the image; the mouse may leave it a little.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.readers import DEFAULTS, ReadOptions, as_dict, as_list, deliver, open_photos
from cloc_mllm.data.readers.boxes import BoxFrame
from cloc_mllm.data.readers.files import Names
from cloc_mllm.data.readers.photos import names_of
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_rows
from cloc_mllm.data.values import id_key, number

SOURCE = "localized-narratives"
_MIN_POINTS = 3  # a box around fewer says little of what was meant
_COCO_DIGITS = 12
# what is said between things; an utterance of nothing else names none
_STOP_WORDS = """a about above after also an and any are around as at back background be behind
    below beside bottom by can center corner due etc few for foreground from front fully has have
    having he her
    here his holding i image in inside into is it its kept left look looking looks lot many middle
    my near next no not observe of off on one onto or other our outside over photo picture placed
    present right seems seen she side sitting so some something standing such that the their them
    there these they this those through to top towards two under up various view visible was we
    wearing were where which while who with you""".split()  # noqa: SIM905  a list of words is read as text
_WORD = re.compile(r"[^\W\d_][\w'-]*")


def read_localized_narratives(
    rows: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per narrative; an image has as many as annotators told of it.

    Each utterance with a content word is a region, if the mouse moved meanwhile; others are set
    aside.

    Args:
        rows: JSON lines.
        images: folder, tar or zip of the images that were told of (COCO's file names are found by
            their number).
        drop_log: beside the reasons of `validate_record`, records get `bad_row`.
    """

    def all_names() -> Iterator[Names]:
        return (_names(row) for _, row in read_rows(rows, options.encoding))

    with open_photos(images, drop_log, options, all_names) as photos:
        for item, row in read_rows(rows, options.encoding):
            names = _names(row)
            if not names or not isinstance(row.get("caption"), str):
                drop_log.add("record", item, "bad_row", shown(row))
                continue
            annotator = id_key(row.get("annotator_id")) or "0"
            photo = photos.find(*names)
            regions = _to_regions(row, photo.share_frame(), drop_log)
            record_id = f"{row['image_id']}-{annotator}"
            yield from deliver(record_id, photo, SOURCE, [row["caption"]], regions, drop_log)


def _names(row: Any) -> Names:
    """The names that a photo may have: the id, and COCO's file name of it."""
    image_id = id_key(as_dict(row).get("image_id"))
    if image_id is None:
        return ()
    if "coco" in str(row.get("dataset_id")) and image_id.isdecimal():
        return names_of(image_id.zfill(_COCO_DIGITS))
    return names_of(image_id)


def _to_regions(row: dict[str, Any], frame: BoxFrame, drop_log: DropLog) -> list[Region]:
    points = [
        (number(point.get("t")), number(point.get("x")), number(point.get("y")))
        for trace in as_list(row.get("traces"))
        for point in map(as_dict, as_list(trace))
    ]
    regions = []
    for said in map(as_dict, as_list(row.get("timed_caption"))):
        start, end = number(said.get("start_time")), number(said.get("end_time"))
        places = [(x, y) for t, x, y in points if start <= t <= end]
        phrase = _phrase(said.get("utterance"))
        if not phrase:
            drop_log.put_aside("region", "unsaid")
            continue
        if len(places) < _MIN_POINTS:
            drop_log.put_aside("region", "unheard")
            continue
        xs, ys = zip(*places, strict=True)
        found = [max(min(xs), 0), max(min(ys), 0), min(max(xs), 1), min(max(ys), 1)]
        (box,) = frame.from_xyxy([found])
        regions.append(Region(box=box, phrase=phrase, found=found))
    return regions


def _phrase(utterance: Any) -> str:
    """The words of an utterance without stop words at its ends; "" if there are no others."""
    words = _WORD.findall(utterance.lower()) if isinstance(utterance, str) else []
    while words and words[0] in _STOP_WORDS:
        del words[0]
    while words and words[-1] in _STOP_WORDS:
        del words[-1]
    return " ".join(words)


def looks_like_localized_narratives(place: Place) -> Iterator[Reading]:
    """Rows with `timed_caption` and `traces`."""
    if place.has_rows_with("timed_caption", "traces"):
        why = f"the rows of {place.path.name} have timed_caption and traces"
        yield Reading(why, {"rows": place.path}, "0..1")
