"""RefLVIS (You et al. 2023, Ferret): is the object in this region a A or a B?

Built from any annotations in COCO's layout, LVIS v1 above all. The distractor B is the class of
another thing of the same image, or of the whole set where there is none; which one is drawn by a
hash of seed and annotation. Each thing is asked in both orders.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from torch import Tensor

from cloc_mllm.data.drop_log import DropLog
from cloc_mllm.data.readers import boxes_from_xywh
from cloc_mllm.data.readers.coco import read_table
from cloc_mllm.data.readers.files import open_files
from cloc_mllm.data.readers.values import id_key
from cloc_mllm.data.shapes import (
    MASK_SIZE,
    Point,
    line_mask,
    points_mask,
    polygon_mask,
    sample_shape,
)
from cloc_mllm.evaluation.benchmarks.questions import (
    REGION,
    Question,
    QuestionSet,
    photo_faults,
    photo_records,
)
from cloc_mllm.evaluation.predictions import Box, ReferenceRow
from cloc_mllm.geometry import clean_box

TASK = "ref_lvis"
Kind = Literal["box", "point", "free_form"]
KINDS: tuple[Kind, ...] = ("box", "point", "free_form")
_SCRIBBLE_POINTS = 4
# the model takes boxes: other prompts are drawn, then enclosed
_PROMPTS = {
    "box": "",
    "point": "point on the thing, as its enclosing box",
    "free_form": "scribble on the thing, as its enclosing box",
}


@dataclass(frozen=True)
class Thing:
    """An annotation that can be asked about; `others` are the names of its image's other things."""

    annotation: dict[str, Any]
    image: dict[str, Any]
    name: str
    box: Box
    others: Counter[str]


def ref_lvis_questions(
    annotations: str | Path,
    images: str | Path,
    *,
    kinds: Sequence[Kind] = KINDS,
    num_things: int = 1000,
    seed: int = 0,
) -> QuestionSet:
    """Two questions (orders) a thing and kind of region prompt.

    Args:
        annotations: JSON with `images`, `annotations` (`bbox`, `segmentation`), `categories`.
        images: folder, tar or zip of the photos.
        num_things: drawn from all usable things by `seed`, whether their photo is there or not,
            so everyone's draw is the same; 0 takes all.

    Raises:
        ValueError: not such a file, or fewer than two classes in it.
    """
    notes: Counter[str] = Counter()
    things = _things(read_table(annotations, "images", "annotations", "categories"), notes)
    names = sorted({thing.name for thing in things})
    if len(names) < 2:
        raise ValueError(f"{annotations}: expected things of two classes or more, got {names}")
    if num_things and num_things < len(things):
        drawn = np.random.default_rng(seed).permutation(len(things))[:num_things]
        things = [things[index] for index in sorted(drawn)]
    photo_of = _photo_names(things, images)
    drop_log = DropLog()
    records = photo_records(photo_of.values(), images, drop_log, source=TASK)
    faults = photo_faults(drop_log)
    questions: list[Question] = []
    references: list[ReferenceRow] = []
    left_out: Counter[str] = Counter()
    for thing in things:
        photo = photo_of[str(id_key(thing.image["id"]))]
        if photo in faults:
            left_out[faults[photo]] += 2 * len(kinds)
            continue
        for kind in kinds:
            for question, reference in _both_orders(thing, photo, kind, names, seed):
                questions.append(question)
                references.append(reference)
    return QuestionSet(
        f"RefLVIS of {Path(annotations).name}, {len(things):,} things, seed {seed}",
        list(records.values()),
        questions,
        references,
        2 * len(kinds) * len(things),
        dict(left_out),
        max_new_tokens=24,
        notes=dict(notes),
    )


def class_name(name: str) -> str:
    """`bat_(animal)` -> `bat`: as a person would say it."""
    return " ".join(re.sub(r"\(.*?\)", " ", name.replace("_", " ")).split()) or name


def _things(table: dict[str, list[dict[str, Any]]], notes: Counter[str]) -> list[Thing]:
    """Annotations of one thing with a usable box; the others go to `notes` by reason."""
    images = {str(id_key(row.get("id"))): row for row in table["images"]}
    class_of = {
        str(id_key(row.get("id"))): class_name(str(row.get("name"))) for row in table["categories"]
    }
    usable = []
    of_image: dict[str, Counter[str]] = defaultdict(Counter)
    for row in table["annotations"]:
        image, category = str(id_key(row.get("image_id"))), str(id_key(row.get("category_id")))
        if image not in images or category not in class_of:
            notes["unknown_image" if image not in images else "unknown_category"] += 1
            continue
        of_image[image][class_of[category]] += 1
        box, reason = _usable_box(row, images[image])
        if box is None:
            notes[reason] += 1
        else:
            usable.append((row, image, class_of[category], box))
    return [
        Thing(row, images[image], name, box, of_image[image] - Counter([name]))
        for row, image, name, box in usable
    ]


def _usable_box(row: dict[str, Any], image: dict[str, Any]) -> tuple[Box | None, str]:
    """Normalised and clipped to the image, or why there is none."""
    if row.get("iscrowd"):
        return None, "crowd"
    (box,) = boxes_from_xywh([row.get("bbox")], image.get("width"), image.get("height"))
    if not np.isfinite(box).all():
        return None, "not_finite"
    width, height = float(image["width"]), float(image["height"])
    pixels = [value * size for value, size in zip(box, (width, height) * 2, strict=True)]
    cleaned, reason = clean_box(pixels, width, height)
    return cleaned, str(reason)


def _photo_names(things: Sequence[Thing], images: str | Path) -> dict[str, str]:
    """Image id -> its file there: `file_name`, else the last part of `coco_url` (LVIS's own)."""
    with open_files(images) as files:
        there = {PurePosixPath(path).name for path in files.names()}
    found = {}
    for thing in things:
        image = thing.image
        file_name = str(image.get("file_name") or "")
        url = str(image.get("coco_url") or "")
        names = [PurePosixPath(name).name for name in (file_name, url) if name]
        names.append(f"{image['id']}.jpg")
        found[str(id_key(image["id"]))] = next((name for name in names if name in there), names[0])
    return found


def _both_orders(
    thing: Thing, photo: str, kind: Kind, names: Sequence[str], seed: int
) -> list[tuple[Question, ReferenceRow]]:
    rng = np.random.default_rng([seed, zlib.crc32(repr(thing.annotation.get("id")).encode())])
    others = sorted(set(thing.others) - {thing.name}) or [n for n in names if n != thing.name]
    distractor = others[rng.integers(len(others))]
    box = thing.box if kind == "box" else enclosing_box(_drawn(thing, kind, rng))
    rows = []
    for order, choices in enumerate(([thing.name, distractor], [distractor, thing.name])):
        row_id = f"{TASK}/{thing.annotation.get('id')}/{kind}/{order}"
        first, second = map(_with_article, choices)
        text = f"Is the object {REGION} {first} or {second}?"
        rows.append(
            (
                Question(row_id, photo, TASK, text, (box,), region_prompt=_PROMPTS[kind]),
                ReferenceRow(
                    row_id,
                    photo,
                    TASK,
                    boxes=[thing.box],
                    labels=[thing.name],
                    kind=kind,
                    choices=choices,
                    width=thing.image["width"],
                    height=thing.image["height"],
                    num_distractors=thing.others[thing.name],
                ),
            )
        )
    return rows


def _with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _drawn(thing: Thing, kind: Kind, rng: np.random.Generator) -> Tensor:
    """A point or scribble on the thing's own outline; in its box where it has no polygons."""
    polygons = thing.annotation.get("segmentation")
    shape: Literal["point", "scribble"] = "point" if kind == "point" else "scribble"
    if not isinstance(polygons, list) or not polygons:
        return sample_shape(shape, thing.box, rng)
    width, height = thing.image["width"], thing.image["height"]
    mask = sum(polygon_mask(_points(polygon, width, height)) for polygon in polygons)
    assert isinstance(mask, Tensor)
    cells = mask.nonzero()[:, [1, 0]].numpy()  # x, y
    count = 1 if shape == "point" else _SCRIBBLE_POINTS
    at = (cells[rng.integers(len(cells), size=count)] + 0.5) / MASK_SIZE
    points = [(float(x), float(y)) for x, y in at]
    return points_mask(points) if shape == "point" else line_mask(points)


def _points(polygon: Sequence[float], width: float, height: float) -> list[Point]:
    """A flat list x, y, x, y in pixels -> points of the normalised image."""
    pairs = zip(polygon[::2], polygon[1::2], strict=False)
    return [(x / width, y / height) for x, y in pairs]


def enclosing_box(mask: Tensor) -> Box:
    """Normalised box around the cells that are on; mask float[S, S] over the whole image."""
    side = mask.shape[0]
    y, x = mask.nonzero(as_tuple=True)
    low_x, low_y, high_x, high_y = (
        v.item() / side for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)
    )
    return (low_x, low_y, high_x, high_y)
