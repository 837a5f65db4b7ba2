"""GBC1M and GBC10M (Hsieh et al. 2024, graph-based captions of CC12M): rows, or tars with images.

A row is `{"img_url", "img_path", "original_caption", "short_caption", "detail_caption",
"vertices": [{"vertex_id", "label", "bbox": {"left", "top", "right", "bottom", "confidence"},
"descs": [{"text", "label"}], "in_edges": [{"source", "text", "target"}]}]}`, in JSON lines. The
published rows have addresses in the place of images; img2dataset fetches them into tars of
`KEY.jpg` and `KEY.json`, which keeps the columns that `--save_additional_columns` names.

Layout: the data card of huggingface.co/datasets/graph-based-captions/GBC10M and `data/gbc/wiki` of
github.com/apple/ml-gbc.

Frame: 0..1 of the image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    open_photos,
)
from cloc_mllm.data.readers.files import Names
from cloc_mllm.data.readers.photos import names_of
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.readers.tar_stream import read_samples
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import decode, read_rows
from cloc_mllm.data.values import id_key

SOURCE = "gbc"
_CAPTIONS = ("detail_caption", "short_caption", "original_caption")
_SIDES = ("left", "top", "right", "bottom")
_NUMBERED = re.compile(r" \d+$")  # the members of a composition: "tree 1", "tree 2"
_IMAGES = ("jpg", "jpeg", "png", "webp")
Row = dict[str, Any]


def read_gbc(
    rows: str | Path,
    images: str | Path,
    *,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per row.

    An entity's phrase is what the edge that leads to it calls it; its descriptions are
    expressions. A composition (all of a kind) and a relation are regions, too.

    Args:
        rows: JSON lines.
        images: folder, tar or zip of what `img_path` names.
        drop_log: beside the reasons of `validate_record`, records and regions get `bad_row`.
    """

    def all_names() -> Iterator[Names]:
        return (names_of(_name(row)) for _, row in read_rows(rows, options.encoding))

    with open_photos(images, drop_log, options, all_names) as photos:
        for item, row in read_rows(rows, options.encoding):
            name = _name(row)
            if name is None:
                drop_log.add("record", item, "bad_row", row)
            else:
                yield from _to_record(name, row, photos.find(name), drop_log)


def read_gbc_tars(
    tars: Sequence[str | Path], *, options: ReadOptions = DEFAULTS, drop_log: DropLog
) -> Iterator[Record]:
    """Yields one record per sample of img2dataset's tars, read forwards."""
    for path in tars:
        for key, sample in read_samples(path, drop_log):
            row = _json_of(sample, key, options)
            if row is None:
                drop_log.add("record", key, "bad_row", "no JSON with vertices")
                continue
            data = next((sample[name] for name in _IMAGES if name in sample), b"")
            photo = Photo(key, data, drop_log=drop_log, options=options)
            yield from _to_record(key, row, photo, drop_log)


def _json_of(sample: dict[str, bytes], key: str, options: ReadOptions) -> Row | None:
    try:
        row = as_dict(json.loads(decode(sample.get("json", b""), key, options.encoding)))
        if isinstance(row.get("vertices"), str):  # as img2dataset may write a list
            row["vertices"] = json.loads(row["vertices"])
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row.get("vertices"), list) else None


def _name(row: Any) -> str | None:
    return id_key(as_dict(row).get("img_path")) or id_key(as_dict(row).get("img_url"))


def _to_record(name: str, row: Row, photo: Photo, drop_log: DropLog) -> Iterator[Record]:
    frame = photo.share_frame()
    captions = [row[key] for key in _CAPTIONS if row.get(key)]
    regions = []
    for vertex in as_list(row.get("vertices")):
        if not isinstance(vertex, dict):
            drop_log.add("region", name, "bad_row", vertex)
            continue
        if vertex.get("label") == "image":  # its descriptions are the captions
            continue
        found = as_dict(vertex.get("bbox"))
        (box,) = frame.from_xyxy([[found.get(side) for side in _SIDES]])
        phrase, *others = _texts(vertex) or [""]
        score = found.get("confidence")
        regions.append(
            Region(
                box=box,
                phrase=phrase,
                score=1.0 if score is None else score,
                expressions=others,
                found=found,
            )
        )
    yield from deliver(name, photo, SOURCE, captions, regions, drop_log)


def _texts(vertex: Row) -> list[Any]:
    """What names the vertex, the shortest name first, then what describes it."""
    edges = [as_dict(edge).get("text") for edge in as_list(vertex.get("in_edges"))]
    names = sorted({_NUMBERED.sub("", text) for text in edges if isinstance(text, str)}, key=len)
    descriptions = [as_dict(of) for of in as_list(vertex.get("descs"))]
    if vertex.get("label") == "relation":  # its edges name what it relates
        return [of.get("text") for of in descriptions if of.get("label") == "relation"]
    if vertex.get("label") == "composition":  # its texts tell of its members
        return names[:1]
    return names[:1] + [of.get("text") for of in descriptions if of.get("label") != "original"]


def looks_like_gbc(place: Place) -> Iterator[Reading]:
    """Rows with `vertices` that have boxes."""
    if place.has_rows_with("vertices") and place.mentions("in_edges"):
        why = f"the rows of {place.path.name} have vertices with edges"
        yield Reading(why, {"rows": place.path}, "0..1")
