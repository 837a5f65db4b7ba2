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
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cloc_mllm.data.readers import as_dict, as_list, boxes_from_scaled, deliver
from cloc_mllm.data.readers.files import IMAGE_SUFFIXES, open_files, read_image, read_rows
from cloc_mllm.data.readers.tar_stream import Sample, read_samples
from cloc_mllm.data.records import DropLog, Record, Region

SOURCE = "grit"
_IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image")
_ROWS_AT_ONCE = 64
Row = dict[str, Any]


def read_grit(rows: str | Path, images: str | Path, *, drop_log: DropLog) -> Iterator[Record]:
    """One record a row, its id the row's key.

    Args:
        rows: the rows as JSON lines.
        images: folder, tar or zip of `KEY.jpg`.
        drop_log: beside the reasons of `validate_record`, records get `bad_row` (no JSON object
            with the texts `key` and `caption`), regions `bad_row` (no seven numbers).
    """
    with open_files(images) as image_files:
        for item, row in read_rows(rows):
            texts = [as_dict(row).get("key"), as_dict(row).get("caption")]
            if all(isinstance(text, str) for text in texts):
                yield from _to_record(row, read_image(image_files, row["key"]), drop_log)
            else:
                drop_log.add("record", item, "bad_row")


def read_grit_tars(tars: Sequence[str | Path], *, drop_log: DropLog) -> Iterator[Record]:
    """One record a sample, read forwards: a set of any size passes through.

    Args:
        tars: files, in the order they are read.
        drop_log: beside the reasons of `validate_record`, records get `bad_row` (its JSON is no
            object).
    """
    for path in tars:
        for key, sample in read_samples(path, drop_log):
            row = _row_of(key, sample)
            if row is None:
                drop_log.add("record", key, "bad_row")
                continue
            image = next((sample[s[1:]] for s in IMAGE_SUFFIXES if s[1:] in sample), b"")
            yield from _to_record(row, image, drop_log)


def read_grit_parquet(
    tables: Sequence[str | Path], images: str | Path | None = None, *, drop_log: DropLog
) -> Iterator[Record]:
    """One record a row, a few rows in memory at a time.

    Args:
        tables: files, in the order they are read.
        images: folder, tar or zip of `KEY.jpg` or `ID.jpg`; without it the rows hold the images
            in a column `jpg`, `png`, `webp` or `image`.
    """
    rows = itertools.chain.from_iterable(map(_parquet_rows, tables))
    if images is None:
        for row in rows:
            yield from _to_record(row, _embedded_image(row), drop_log)
        return
    with open_files(images) as image_files:
        for row in rows:
            names = (str(row[name]) for name in ("key", "id") if row.get(name) is not None)
            found = (read_image(image_files, name) for name in names)
            yield from _to_record(row, next(filter(None, found), b""), drop_log)


def _row_of(key: str, sample: Sample) -> Row | None:
    """The JSON of a sample over its caption file; None where the JSON is no object."""
    row: Row = {"key": key}
    if "txt" in sample:
        row["caption"] = sample["txt"].decode("utf-8", errors="surrogateescape")
    if "json" not in sample:
        return row
    try:
        stated = json.loads(sample["json"])
    except (ValueError, RecursionError):
        return None
    return {**row, **stated} if isinstance(stated, dict) else None


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


def _to_record(row: Row, image: bytes, drop_log: DropLog) -> Iterator[Record]:
    if isinstance(row.get("regions"), list) and isinstance(row.get("captions"), list):
        regions = [_exported_region(region) for region in row["regions"]]
        yield from deliver(row.get("id"), image, SOURCE, row["captions"], regions, drop_log)
        return
    record_id = row.get("key") if row.get("key") is not None else row.get("id")
    caption = row.get("caption")
    captions = [] if caption is None else [caption]
    regions = _to_regions(caption, row, str(record_id), drop_log)
    yield from deliver(record_id, image, SOURCE, captions, regions, drop_log)


def _exported_region(row: Any) -> Region:
    row = as_dict(row)
    (box,) = boxes_from_scaled([row.get("box")])
    return Region(
        box=box,
        phrase=row.get("phrase", ""),
        score=row.get("score", 1.0),
        expressions=as_list(row.get("expressions")),
        category=row.get("category", ""),
        group=row.get("group", ""),
    )


def _to_regions(caption: Any, row: Row, record_id: str, drop_log: DropLog) -> list[Region]:
    """A region a distinct box: its first text is the phrase, the others are `expressions`."""
    regions: dict[str, Region] = {}  # by the box as text, because NaN is not equal to itself
    for span in [*_spans(row, "noun_chunks"), *_spans(row, "ref_exps")]:
        if not _is_span(span) or not isinstance(caption, str):
            drop_log.add("region", record_id, "bad_row")
            continue
        text = caption[int(span[0]) : int(span[1])]
        (box,) = boxes_from_scaled([span[2:6]])
        region = regions.setdefault(str(box), Region(box=box, phrase=text, score=float(span[6])))
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
    """Seven numbers, of which the first two part a text."""
    if not isinstance(span, list) or len(span) != 7:
        return False
    numbers = all(isinstance(v, (int, float)) and abs(v) <= sys.float_info.max for v in span[:2])
    return numbers and all(map(_is_number, span[2:])) and 0 <= span[0] < span[1]


def _is_number(value: Any) -> bool:
    """NaN, too: `validate_record` names what is wrong with it."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
