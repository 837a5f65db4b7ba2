"""COCO (Lin et al. 2014) and LVIS (Gupta et al. 2019): an instances JSON, perhaps a captions JSON,
and the images. CVAT, Label Studio, Roboflow and FiftyOne export COCO's layout, too.

LVIS differs in three things: version 1 names a photo by `coco_url` alone, a category has a
`frequency` and a name with underscores (`aerosol_can`), and no annotation is a crowd.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from cloc_mllm.data.drop_log import Kind
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
from cloc_mllm.data.readers.boxes import xywh_of_annotation
from cloc_mllm.data.readers.places import Place, Reading
from cloc_mllm.data.records import DropLog, Record, Region
from cloc_mllm.data.texts import read_json
from cloc_mllm.data.values import by_id, id_key, number

SOURCE = "coco"
LVIS_SOURCE = "lvis"
_NUM_SAMPLED = 1000  # annotations that are looked at to tell what they hold
Annotation = dict[str, Any]


def read_coco(  # noqa: PLR0913  what the source can be told
    instances: str | Path,
    images: str | Path,
    *,
    captions: str | Path | None = None,
    keep_crowd: bool = False,
    ids: Collection[str] | None = None,
    options: ReadOptions = DEFAULTS,
    drop_log: DropLog,
) -> Iterator[Record]:
    """Yields one record per image of `instances`, with one region per annotation.

    The phrase of a region is the name of its category. Its box is `bbox`, or what encloses its
    `segmentation` where it has no `bbox`. Its score is `score`, if that is stated.

    Args:
        instances: JSON with `images`, `annotations` (`bbox` is xywh in pixels), `categories`.
        images: folder, tar or zip of the files that `images[].file_name` (LVIS: `coco_url`) names.
        captions: JSON whose `annotations` hold `image_id` and `caption`.
        keep_crowd: keep boxes around a crowd (`iscrowd` 1); by default they are set aside.
        ids: image ids to read, as text; by default all. The others are set aside.
        drop_log: beside the reasons of `validate_record`, regions get `unknown_category` and
            `unknown_image`, captions `unknown_image`.

    Raises:
        ValueError: another layout, or one id for two files or two class names.
    """
    listing = read_table(instances, "images", "annotations", "categories", options=options)
    categories = by_id(listing["categories"], "name", f"{instances}, categories")
    is_lvis = any("frequency" in row for row in listing["categories"])
    by_id(listing["images"], "coco_url" if is_lvis else "file_name", f"{instances}, images")
    annotations_of = group_by_image(listing["annotations"])
    captions_of = group_by_image(
        read_table(captions, "annotations", options=options)["annotations"] if captions else []
    )
    wanted = None if ids is None else {id_key(image_id) for image_id in ids}
    names = single(_file_name(image, is_lvis) for image in listing["images"])
    with open_photos(images, drop_log, options, names, tell_unused=ids is None) as photos:
        for image in listing["images"]:
            # taken out, so that an image listed twice cannot count its annotations twice
            key = id_key(image.get("id"))
            annotations, texts = annotations_of.pop(key, []), captions_of.pop(key, [])
            if wanted is not None and key not in wanted:
                drop_log.put_aside("record", "not_asked")
                drop_log.put_aside("region", "not_asked", len(annotations))
                drop_log.put_aside("caption", "not_asked", len(texts))
                continue
            photo = photos.find(_file_name(image, is_lvis))
            regions = _to_regions(image, photo, annotations, categories, keep_crowd, drop_log)
            found = [row.get("caption", "") for row in texts]
            source = LVIS_SOURCE if is_lvis else SOURCE
            yield from deliver(key, photo, source, found, regions, drop_log)
    _log_orphans("region", annotations_of, drop_log)
    _log_orphans("caption", captions_of, drop_log)


def class_name(name: Any) -> Any:
    """Turns `bow_(weapon)` into `bow (weapon)`; leaves what is no text to `validate_record`."""
    return name.replace("_", " ") if isinstance(name, str) else name


def _file_name(image: Annotation, is_lvis: bool) -> Any:
    """Finds the file name of a photo.

    LVIS 0.5 calls a photo `COCO_val2014_x.jpg`, but its URL ends in COCO 2017's `x.jpg`.
    """
    url, name = image.get("coco_url"), image.get("file_name")
    return url if (is_lvis and url) or not name else name


def _to_regions(
    image: Annotation,
    photo: Photo,
    annotations: list[Annotation],
    categories: dict[str, Annotation],
    keep_crowd: bool,
    drop_log: DropLog,
) -> list[Region]:
    usable, phrases = [], []
    for row in annotations:
        category = categories.get(id_key(row.get("category_id")) or "")
        if row.get("iscrowd") and not keep_crowd:
            drop_log.put_aside("region", "crowd")
        elif category is None:
            found = f"category_id {row.get('category_id')!r}"
            drop_log.add("region", f"annotation {row.get('id')}", "unknown_category", found)
        else:
            usable.append(row)
            phrases.append(class_name(category.get("name")))
    frame = photo.frame(image.get("width"), image.get("height"))
    boxes = frame.from_xywh([xywh_of_annotation(row) for row in usable])
    return [
        Region(box, phrase, _score(row), category=phrase, found=_found(row))
        for box, phrase, row in zip(boxes, phrases, usable, strict=True)
    ]


def _score(row: Annotation) -> float:
    return 1.0 if row.get("score") is None else number(row["score"])


def _found(row: Annotation) -> dict[str, Any]:
    """The facts that an annotation states about its box."""
    keys = ("id", "bbox", "segmentation", "keypoints")
    return {key: row[key] for key in keys if row.get(key) not in (None, [])}


def group_by_image(rows: list[Annotation]) -> dict[str | None, list[Annotation]]:
    """Groups rows by the `id_key` of their image."""
    grouped: dict[str | None, list[Annotation]] = defaultdict(list)
    for row in rows:
        grouped[id_key(row.get("image_id"))].append(row)
    return grouped


def _log_orphans(
    kind: Kind, rows_of: dict[str | None, list[Annotation]], drop_log: DropLog
) -> None:
    for rows in rows_of.values():
        for row in rows:
            found = f"image_id {row.get('image_id')!r}"
            drop_log.add(kind, f"annotation {row.get('id')}", "unknown_image", found)


def read_table(
    path: str | Path, *keys: str, options: ReadOptions = DEFAULTS
) -> dict[str, list[Annotation]]:
    """Reads a JSON object with a list of objects under each key; ValueError for any other."""
    table = read_json(path, options.encoding)
    for key in keys:
        rows = table.get(key) if isinstance(table, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: expected a COCO object with a list of objects {key!r}")
    return table


def looks_like_coco(place: Place) -> Iterator[Reading]:
    """An object of `images`, `annotations` (which may be none) and `categories`; captions are found
    by their name."""
    images, rows = (as_list(place.table.get(key)) for key in ("images", "annotations"))
    keys = {key for row in rows[:_NUM_SAMPLED] for key in as_dict(row)}
    if not images or "tokens_positive" in keys:
        return
    name = place.path.name
    is_empty = not rows and {"annotations", "categories"} <= place.table.keys()
    if is_empty or keys & {"bbox", "segmentation"}:
        classes = as_list(place.table.get("categories"))
        kind = "LVIS" if any("frequency" in as_dict(row) for row in classes) else "COCO"
        why = f"{name} has {kind}'s lists of images, annotations and categories"
        options: dict[str, Any] = {"instances": place.path}
        captions = place.sibling(name.replace("instances", "captions"))
        if captions is not None and captions != place.path:
            options["captions"] = captions
        yield Reading(why, options, "pixels", "xywh")
    elif "caption" in keys:
        instances = place.sibling(name.replace("captions", "instances"))
        why = f"{name} has COCO's captions"
        if instances is not None and instances != place.path:
            why += f", {instances.name} the boxes"
            options = {"instances": instances, "captions": place.path}
            yield Reading(why, options, "pixels", "xywh")
        else:
            lacks = "--instances, the file that lists the images and their boxes"
            yield Reading(why, {"captions": place.path}, lacks=lacks)
