"""GRIT (Kosmos-2, Peng et al. 2023): WebDataset tars of img2dataset, Parquet tables, JSON lines.

`cloc-mllm data export webdataset` writes the same tars, with the whole record in the JSON
(`captions`, `regions`), which then counts instead of `noun_chunks`.

A row is `{"id", "key", "caption", "url", "width", "height", "noun_chunks", "ref_exps"}`; a chunk
and an expression are `[start, end, x1, y1, x2, y2, score]`: a span of the caption and its box. A
tar holds `KEY.jpg`, `KEY.json` (the row) and perhaps `KEY.txt` (the caption).

Frame: xyxy, 0..1 of the original image.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    open_photos,
)
from cloc_mllm.data.readers.boxes import BoxFrame
from cloc_mllm.data.readers.files import Names
from cloc_mllm.data.readers.names import IMAGE_SUFFIXES
from cloc_mllm.data.readers.photos import names_of
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.readers.tar_stream import Sample, read_samples
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import decode, read_rows
from cloc_mllm.data.values import id_key, number

SOURCE = "grit"
_IMAGE_COLUMNS = (*(suffix[1:] for suffix in IMAGE_SUFFIXES), "image")
_ROWS_AT_ONCE = 64
Row = dict[str, Any]


def read_grit(
    rows: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per row, its id the row's key.

    Args:
        rows: the rows as JSON lines.
        images: folder, tar or zip of `KEY.jpg`.
        drop_log: beside the reasons of `validate_record`, records get `bad_row` (no JSON object
            with `key` and the text `caption`), regions `bad_row` (no seven numbers).
    """

    def all_names() -> Iterator[Names]:
        return (names_of(as_dict(row).get("key")) for _, row in read_rows(rows, options.encoding))

    with open_photos(images, drop_log, options, all_names) as photos:
        for item, row in read_rows(rows, options.encoding):
            key = id_key(as_dict(row).get("key"))
            if key is None or not isinstance(row.get("caption"), str):
                drop_log.add("record", item, "bad_row", row)
            else:
                yield from _to_record({**row, "key": key}, photos.find(key), drop_log)


def read_grit_tars(
    tars: Sequence[str | Path], *, options: ReadOptions = DEFAULTS, drop_log: DropLog
) -> Iterator[Record]:
    """Yields one record per sample, read forwards: a set of any size passes through.

    Args:
        tars: files, in the order they are read.
        drop_log: beside the reasons of `validate_record`, records get `bad_row` (its JSON is no
            object).
    """
    for path in tars:
        for key, sample in read_samples(path, drop_log):
            row = _row_of(key, sample, options)
            if isinstance(row, str):
                drop_log.add("record", key, "bad_row", row)
                continue
            data = next((sample[name] for name in _IMAGE_COLUMNS if name in sample), b"")
            photo = Photo(key, data, drop_log=drop_log, options=options)
            yield from _to_record(row, photo, drop_log)


def read_grit_parquet(
    tables: Sequence[str | Path],
    images: str | Path | None = None,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per row, a few rows in memory at a time.

    Args:
        tables: files, in the order they are read.
        images: folder, tar or zip of `KEY.jpg` or `ID.jpg`; without it the rows hold the images
            in a column `jpg`, `png`, `webp` (or another suffix) or `image`.
    """

    def all_rows() -> Iterator[Row]:
        return itertools.chain.from_iterable(map(_parquet_rows, tables))

    if images is None:
        for row in all_rows():
            data = _embedded_image(row)
            photo = Photo(str(row.get("key")), data, drop_log=drop_log, options=options)
            yield from _to_record(row, photo, drop_log)
        return

    def all_names() -> Iterator[Names]:
        return (names_of(row.get("key"), row.get("id")) for row in all_rows())

    with open_photos(images, drop_log, options, all_names) as photos:
        for row in all_rows():
            photo = photos.find(row.get("key"), row.get("id"))
            yield from _to_record(row, photo, drop_log)


def _row_of(key: str, sample: Sample, options: ReadOptions) -> Row | str:
    """The JSON of a sample over its caption file, or why its JSON is no row."""
    row: Row = {"key": key}
    if "txt" in sample:  # `validate_record` counts what is in another encoding
        row["caption"] = decode(sample["txt"], key, options.encoding, "surrogateescape")
    if "json" not in sample:
        return row
    try:
        stated = json.loads(decode(sample["json"], f"{key}.json", options.encoding))
    except (ValueError, RecursionError) as error:
        return str(error)
    return {**row, **stated} if isinstance(stated, dict) else "no JSON object"


def _parquet_rows(path: str | Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no whole Parquet file: {error}; fetch it again") from error


def _embedded_image(row: Row) -> bytes:
    for name in _IMAGE_COLUMNS:
        value = row.get(name)
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            return data
    return b""


def _to_record(row: Row, photo: Photo, drop_log: DropLog) -> Iterator[Record]:
    if isinstance(row.get("regions"), list) and isinstance(row.get("captions"), list):
        upright = replace(photo.options, boxes_of="upright")  # as records always are
        frame = replace(photo, options=upright).share_frame()
        regions = [_exported_region(region, frame) for region in row["regions"]]
        yield from deliver(row.get("id"), photo, SOURCE, row["captions"], regions, drop_log)
        return
    frame = photo.share_frame()
    record_id = id_key(row.get("key")) or id_key(row.get("id"))
    caption = row.get("caption")
    captions = [] if caption is None else [caption]
    regions = _to_regions(caption, row, frame, drop_log)
    yield from deliver(record_id, photo, SOURCE, captions, regions, drop_log)


def _exported_region(row: Any, frame: BoxFrame) -> Region:
    row = as_dict(row)
    (box,) = frame.from_xyxy([row.get("box")])
    return Region(
        box=box,
        phrase=row.get("phrase", ""),
        score=row.get("score", 1.0),
        expressions=as_list(row.get("expressions")),
        category=row.get("category", ""),
        group=row.get("group", ""),
        found=row.get("box"),
    )


def _to_regions(caption: Any, row: Row, frame: BoxFrame, drop_log: DropLog) -> list[Region]:
    """Makes a region per distinct box: its first text is the phrase, others are `expressions`."""
    regions: dict[str, Region] = {}  # by the box as text, because NaN is not equal to itself
    for span in [*_spans(row, "noun_chunks"), *_spans(row, "ref_exps")]:
        if not _is_span(span) or not isinstance(caption, str):
            drop_log.add("region", str(row.get("key")), "bad_row", span)
            continue
        text = caption[int(span[0]) : int(span[1])]
        (box,) = frame.from_xyxy([span[2:6]])
        new = Region(box=box, phrase=text, score=number(span[6]), found=span)
        region = regions.setdefault(str(span[2:6]), new)
        if text != region.phrase and text not in region.expressions:
            region.expressions.append(text)
    return list(regions.values())


def _spans(row: Row, key: str) -> list[Any]:
    """img2dataset may have written the lists as text."""
    value = row.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [value]  # one item, which is no span
    return as_list(value)


def _is_span(span: Any) -> bool:
    """Whether it is a list of seven, of which the first two part a text."""
    return isinstance(span, list) and len(span) == 7 and 0 <= number(span[0]) < number(span[1])


def looks_like_grit(place: Place) -> Iterator[Reading]:
    """Rows with `noun_chunks`, Parquet tables with them, or tars of `KEY.json` beside `KEY.jpg`."""
    if place.has_rows_with("key", "caption") and place.mentions("noun_chunks"):
        why = f"the rows of {place.path.name} have key, caption and noun_chunks"
        yield Reading(why, {"rows": place.path}, "0..1")
    inside = [place.path / name for name in place.names]
    if tars := [path for path in [place.path, *inside] if _is_grit_tar(path, place.encoding)]:
        why = f"{tars[0].name} holds KEY.json with a caption beside each image"
        yield Reading(why, {"tars": tars}, "0..1", needs_images=False)
    tables = [path for path in [place.path, *inside] if path.suffix == ".parquet"]
    columns = {path: set(pq.read_schema(path).names) for path in tables if path.is_file()}
    if tables := [path for path, names in columns.items() if "noun_chunks" in names]:
        holds_images = any(columns[path] & set(_IMAGE_COLUMNS) for path in tables)
        why = f"{tables[0].name} has the column noun_chunks"
        yield Reading(why, {"tables": tables}, "0..1", needs_images=not holds_images)


def _is_grit_tar(path: Path, encoding: str) -> bool:
    if path.suffix != ".tar" or not path.is_file():
        return False
    with closing(read_samples(path, DropLog())) as samples:
        key, sample = next(samples, ("", {}))
    row = _row_of(key, sample, ReadOptions(encoding)) if "json" in sample else ""
    return isinstance(row, dict) and ("caption" in row or "captions" in row)
