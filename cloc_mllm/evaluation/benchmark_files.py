"""Files of published benchmarks: photos that may be missing, and rows as JSON lines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloc_mllm.box import Box
from cloc_mllm.evaluation.queries import Coverage, QueryPair, QuerySet
from cloc_mllm.evaluation.rows.files import json_lines

if TYPE_CHECKING:
    from cloc_mllm.data.records import Record


def photo_questions(
    task: str,
    benchmark: str,
    pairs: Iterable[QueryPair],
    images: str | Path,
    **settings: Any,
) -> QuerySet:
    """Questions to the MLLM about photos; those whose photo cannot be used are counted.

    Args:
        benchmark: its name, as its numbers are to be quoted.
        pairs: `image_id` is the photo's file name, with or without a suffix.
        images: folder, tar or zip of the photos.
        settings: further fields of `QuerySet`.
    """
    pairs = list(pairs)
    records, faults = _read_photos((query.image_id for query, _ in pairs), images, task)
    left_out = Counter(faults[query.image_id] for query, _ in pairs if query.image_id in faults)
    return QuerySet(
        task,
        "text",
        "mllm",
        list(records.values()),
        [pair for pair in pairs if pair[0].image_id in records],
        coverage=Coverage(benchmark, len(pairs), dict(left_out.most_common())),
        **settings,
    )


def _read_photos(
    names: Iterable[str], images: str | Path, source: str
) -> tuple[dict[str, Record], dict[str, str]]:
    """Makes a record without regions of each distinct photo, or says why not, by file name."""
    from cloc_mllm.data.drop_log import DropLog
    from cloc_mllm.data.readers.files import open_files, read_image
    from cloc_mllm.data.records import Record, validate_record

    drop_log = DropLog()
    records: dict[str, Record] = {}
    with open_files(images) as files:
        for name in dict.fromkeys(names):
            record = Record(name, read_image(files, name), 0, 0, [], [], source)
            valid = validate_record(record, drop_log)
            if valid is not None:
                records[name] = valid
    return records, {item: reason for kind, item, reason in drop_log.entries if kind == "record"}


def read_json_rows(path: str | Path, *keys: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields `(file and line, object)` of a file of JSON lines, whose objects hold all `keys`.

    Raises:
        ValueError: a line is something else; names file, line and key.
    """
    for where, row in json_lines(path):
        if missing := [key for key in keys if key not in row]:
            raise ValueError(
                f"{where}: expected an object with {', '.join(keys)}; {', '.join(missing)} missing"
            )
        yield where, row


def usable_box(
    annotation: dict[str, Any], image: dict[str, Any], min_side_px: float = 1.0
) -> tuple[Box | None, str]:
    """Normalises an annotation's `bbox` and cuts it to its image, both in COCO's layout; or None
    and the reason."""
    from cloc_mllm.box import clip_box
    from cloc_mllm.data.readers import boxes_from_xywh

    (box,) = boxes_from_xywh([annotation.get("bbox")], image.get("width"), image.get("height"))
    if not all(map(math.isfinite, box)):
        return None, "not_finite"
    width, height = float(image["width"]), float(image["height"])
    pixels = [value * side for value, side in zip(box, (width, height) * 2, strict=True)]
    cleaned, reason = clip_box(pixels, width, height, min_side_px)
    return cleaned, reason or ""
