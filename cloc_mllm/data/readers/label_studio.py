"""Label Studio's own exports: JSON, where a task holds its annotations, and JSON-MIN.

Results of one `id` are of one region: its shape, its labels, and the words of a text area per
region, which are its referring expressions. A text area of the whole image is its caption.

| result | box |
|---|---|
| rectangle | itself; turned about its corner by `rotation`, what encloses it |
| polygon, ellipse | what encloses it |
| keypoint, vector | none: dropped (`no_box`) |
| brush, bitmask | not read: dropped (`brush_mask`) |

Frame: percent of the stated `original_width` and `original_height`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cloc_mllm.data.drop_log import shown
from cloc_mllm.data.readers import (
    DEFAULTS,
    Photo,
    ReadOptions,
    as_dict,
    as_list,
    deliver,
    open_photos,
    single,
)
from cloc_mllm.data.readers.boxes import around_ellipse, around_turned, enclosing_corners
from cloc_mllm.data.readers.names import is_image_name, name_to_id, plain_path
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region, clean_text
from cloc_mllm.data.texts import read_json
from cloc_mllm.data.values import id_key, number, numbers

SOURCE = "label-studio"
PREDICTIONS = "predictions of a model, which are not read"
OTHER_RESULTS = "results that are of no region (choices, ratings, relations)"
_MASKS = ("rle", "imageDataURL", "image_data_url")
Row = dict[str, Any]


class _Shape(NamedTuple):
    """One region as annotated: its results' values laid over each other."""

    item: str
    value: Row
    size: tuple[Any, Any]
    is_turned_view: bool


class _Task(NamedTuple):
    """A task as annotated; `name` is that of its image."""

    name: Any
    shapes: list[_Shape]
    captions: list[Any]
    is_skipped: bool = False


def read_label_studio(
    annotations: str | Path,
    images: str | Path,
    *,
    image_key: str = "",
    all_annotations: bool = False,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per task, with one region per label of each shape.

    Phrase and category are the label; a shape without one has its first words as its phrase. What
    annotators skipped is set aside. Where a task was annotated several times, the ground truth,
    else the first, counts.

    Args:
        annotations: the JSON file.
        images: folder, tar or zip; names are found without the prefix of an upload, too.
        image_key: key of the task's `data` that names the image; by default `image`, or the only
            one whose text is an image's name.
        all_annotations: keep the shapes of all annotators.
        drop_log: beside the reasons of `validate_record`, records get `bad_row`, regions `no_box`,
            `brush_mask` and `turned_view`.

    Raises:
        ValueError: no list of tasks.
    """
    table = read_json(annotations, options.encoding)
    if not isinstance(table, list):
        raise ValueError(f"{annotations}: expected a JSON list of tasks, Label Studio's JSON")
    tasks = [_read_task(row, image_key, all_annotations, drop_log) for row in table]
    with open_photos(images, drop_log, options, single(task.name for task in tasks)) as photos:
        for index, (row, task) in enumerate(zip(table, tasks, strict=True)):
            if task.is_skipped:
                drop_log.put_aside("record", "skipped")
                continue
            if id_key(task.name) is None:
                drop_log.add("record", f"task {index}", "bad_row", f"no image: {shown(row)}")
                drop_log.add("region", f"task {index}", "bad_row", count=len(task.shapes))
                drop_log.add("caption", f"task {index}", "bad_row", count=len(task.captions))
                continue
            photo = photos.find(task.name)
            regions = [r for shape in task.shapes for r in _to_regions(shape, photo, drop_log)]
            task_id = id_key(row.get("id")) or name_to_id(task.name)
            yield from deliver(task_id, photo, SOURCE, task.captions, regions, drop_log)


def _read_task(row: Any, image_key: str, all_annotations: bool, drop_log: DropLog) -> _Task:
    row = as_dict(row)
    name = _image_name(as_dict(row.get("data", row)), image_key)
    if "data" not in row:  # JSON-MIN
        shapes = [_shape([value], name) for values in row.values() for value in _shapes_in(values)]
        return _Task(name, shapes, [])
    drop_log.note(PREDICTIONS, len(as_list(row.get("predictions"))))
    shapes, captions = [], []
    for annotation in _counting(row, all_annotations, drop_log):
        shapes_of, captions_of = _read_results(annotation, name, drop_log)
        shapes += shapes_of
        captions += captions_of
    stated = [as_dict(item) for item in _annotations(row)]
    is_skipped = bool(stated) and all(item.get("was_cancelled") for item in stated)
    return _Task(name, shapes, captions, is_skipped)


def _annotations(row: Row) -> list[Any]:
    # `completions` is what versions before 1.0 wrote
    return as_list(row.get("annotations", row.get("completions")))


def _image_name(data: Row, image_key: str) -> Any:
    if image_key or isinstance(data.get("image"), str):
        return data.get(image_key or "image")
    texts = [value for value in data.values() if isinstance(value, str)]
    names = [value for value in texts if is_image_name(plain_path(value))]
    return names[0] if len(names) == 1 else None


def _shapes_in(values: Any) -> list[Row]:
    return [value for value in as_list(values) if isinstance(value, dict) and _has_place(value)]


def _counting(row: Row, all_annotations: bool, drop_log: DropLog) -> list[Row]:
    """The annotations of a task that count."""
    found = [as_dict(item) for item in _annotations(row)]
    kept = [item for item in found if not item.get("was_cancelled")]
    kept.sort(key=lambda item: not item.get("ground_truth"))
    others = [] if all_annotations else kept[1:]
    for skipped in (item for item in found if item.get("was_cancelled")):
        shapes, captions = _read_results(skipped, "", DropLog())
        drop_log.put_aside("region", "skipped", len(shapes))
        drop_log.put_aside("caption", "skipped", len(captions))
    for other in others:
        shapes, captions = _read_results(other, "", DropLog())
        drop_log.put_aside("region", "other_annotation", len(shapes))
        drop_log.put_aside("caption", "other_annotation", len(captions))
    return kept[: len(kept) - len(others)]


def _read_results(annotation: Row, name: Any, drop_log: DropLog) -> tuple[list[_Shape], list[Any]]:
    """The shapes of an annotation, and the captions of its image."""
    by_region: dict[str, list[Row]] = {}
    captions: list[Any] = []
    results = as_list(annotation.get("result"))
    placed = {id_key(r.get("id")) for r in map(as_dict, results) if _has_place(r.get("value"))}
    for index, result in enumerate(map(as_dict, results)):
        value = as_dict(result.get("value"))
        key = id_key(result.get("id"))
        if _has_place(value) or _labels(value) or (key is not None and key in placed):
            by_region.setdefault(key or f"result {index}", []).append(result)
        elif result.get("type") == "textarea":
            captions += _texts(value)
        else:
            drop_log.note(OTHER_RESULTS)
    return [_shape(group, name) for group in by_region.values()], captions


def _shape(results: list[Row], name: Any) -> _Shape:
    """Lays the results of one region over each other; a shape of JSON-MIN is a value itself."""
    value: Row = {}
    size: tuple[Any, Any] = (None, None)
    is_turned_view = False
    for result in results:
        value |= as_dict(result.get("value", result))
        if result.get("original_width") is not None:
            size = result.get("original_width"), result.get("original_height")
        is_turned_view |= number(result.get("image_rotation")) % 360 > 0
    return _Shape(f"{name}, region {results[0].get('id', '')}", value, size, is_turned_view)


def _has_place(value: Any) -> bool:
    keys = ("x", "points", "vertices", *_MASKS)
    return isinstance(value, dict) and any(key in value for key in keys)


def _texts(value: Row) -> list[Any]:
    text = value.get("text")
    return text if isinstance(text, list) else [text]


def _labels(value: Row) -> list[Any]:
    """`rectanglelabels`, `polygonlabels`, `labels` and so on."""
    found = [value[key] for key in value if key.endswith("labels")]
    return [label for labels in found for label in as_list(labels)]


def _to_regions(shape: _Shape, photo: Photo, drop_log: DropLog) -> list[Region]:
    value = shape.value
    expressions = _texts(value) if "text" in value else []
    fault = _fault(shape)
    if fault:
        drop_log.add("region", shape.item, fault, value)
        drop_log.add("expression", shape.item, fault, count=len(expressions))
        return []
    frame = photo.frame(*shape.size)
    (box,) = frame.from_xyxy([_corners(value, frame.width, frame.height)])
    words = [text for text in expressions if clean_text(text)[0]]
    labels = _labels(value)
    return [
        Region(
            box,
            name,
            expressions=expressions if index == 0 else [],
            category=name if labels else "",
            found=value,
        )
        for index, name in enumerate(labels or words[:1] or [""])
    ]


def _fault(shape: _Shape) -> str:
    if any(key in shape.value for key in _MASKS):
        return "brush_mask"
    if shape.is_turned_view:
        return "turned_view"
    # a keypoint is an x and y, with a width for its dot
    is_point = "x" in shape.value and not shape.value.keys() & {"height", "radiusX"}
    return "no_box" if "vertices" in shape.value or is_point else ""


def _corners(value: Row, width: float, height: float) -> list[float]:
    """xyxy in pixels of the stated size: turns are of pixels, not of percent."""
    degrees = value.get("rotation") or 0
    if "points" in value:
        points = [numbers(point, 2) for point in as_list(value["points"])]
        scaled = [[x * width / 100, y * height / 100] for x, y in points]
        return enclosing_corners(scaled) or [math.nan] * 4
    x, y = number(value.get("x")) * width / 100, number(value.get("y")) * height / 100
    if "radiusX" in value:
        radius_x, radius_y = number(value["radiusX"]), number(value.get("radiusY"))
        radii = [radius_x * width / 100, radius_y * height / 100]
        return around_ellipse([x, y], radii, degrees)
    w, h = number(value.get("width")) * width / 100, number(value.get("height")) * height / 100
    return around_turned([x, y, x + w, y + h], degrees, about_corner=True)


def looks_like_label_studio(place: Place) -> Iterator[Reading]:
    """Tasks with `data` and `annotations`, or rows with lists of shapes with labels (JSON-MIN)."""
    name = place.path.name
    shapes = (shape for row in place.rows for value in row.values() for shape in _shapes_in(value))
    if place.has_rows_with("data", "annotations") or place.has_rows_with("data", "completions"):
        why = f"{name} has tasks with data and annotations, Label Studio's JSON"
    elif any(_labels(shape) for shape in shapes):
        why = f"{name} has rows with lists of labelled shapes, Label Studio's JSON-MIN"
    else:
        return
    yield Reading(why, {"annotations": place.path}, "0..100")
