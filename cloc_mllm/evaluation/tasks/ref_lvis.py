"""Is the object in this region a A or a B? (RefLVIS, You et al. 2023, Ferret) Each thing is asked
in both orders. An answer chooses the one offered name that it holds as whole words, any case (`cat`
is not in `catalog`; of `apple juice` only the longer name counts); with both names or neither it is
unreadable: wrong and counted. acc: of all questions; pair_acc: things whose two orders are both
right; first_rate: readable answers that name what was offered first (50 % is no position bias).
After the slash, by how the region was shown, or by the true name's place."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.data.values import id_key
from cloc_mllm.evaluation.benchmark_files import photo_questions, usable_box
from cloc_mllm.evaluation.queries import REGION, Query, QueryPair, QuerySet, pair
from cloc_mllm.evaluation.rows.rows import ReferenceRow, ScoredPair
from cloc_mllm.evaluation.scores.by_kind import with_kinds
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task

if TYPE_CHECKING:
    from torch import Tensor

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


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """The one of `choices` that the text names, None if it names none or several."""
    found = set()
    for choice in sorted(choices, key=len, reverse=True):
        words = re.split(r"[\s_-]+", choice.strip())
        pattern = r"(?<!\w)" + r"[\s_-]+".join(map(re.escape, words)) + r"(?!\w)"
        text, count = re.subn(pattern, "\0", text, flags=re.IGNORECASE)
        if count:
            found.add(choice)
    return found.pop() if len(found) == 1 else None


def is_failure(pair: ScoredPair) -> bool:
    return _answer(pair) is None


def chance(references: Sequence[ReferenceRow]) -> dict[str, float]:
    """The score of always naming the first choice, or of tossing a coin."""
    return {"acc": 0.5, "pair_acc": 0.25}


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    return with_kinds(pairs, _scores)


def _scores(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    answers = [_answer(pair) for pair in pairs]
    image_ids = np.array([pair.reference.image_id for pair in pairs])
    right = np.array([a == p.reference.labels[0] for a, p in zip(answers, pairs, strict=True)])
    named_first = np.array(
        [a == p.reference.choices[0] for a, p in zip(answers, pairs, strict=True)]
    )
    true_first = np.array([p.reference.labels[0] == p.reference.choices[0] for p in pairs])
    readable = np.array([answer is not None for answer in answers])
    both_right, pair_images = _by_thing(pairs, right)
    chosen = {
        "acc": (right, image_ids),
        "pair_acc": (both_right, pair_images),
        "first_rate": (named_first[readable], image_ids[readable]),
        "acc/true_first": (right[true_first], image_ids[true_first]),
        "acc/true_second": (right[~true_first], image_ids[~true_first]),
    }
    return {
        name: QueryScores(np.asarray(values, dtype=float), list(images))
        for name, (values, images) in chosen.items()
        if len(values)
    }


def _by_thing(pairs: Sequence[ScoredPair], right: np.ndarray) -> tuple[list[bool], list[str]]:
    """Whether both orders of a thing are right, and its image; ids end in `/0` and `/1`."""
    orders: dict[str, list[int]] = {}
    for index, scored in enumerate(pairs):
        orders.setdefault(scored.reference.id.rpartition("/")[0], []).append(index)
    both = [indices for indices in orders.values() if len(indices) == 2]
    return (
        [bool(right[indices].all()) for indices in both],
        [pairs[indices[0]].reference.image_id for indices in both],
    )


def _answer(pair: ScoredPair) -> str | None:
    if pair.prediction.failure is not None:
        return None
    return read_choice(pair.prediction.raw_text, pair.reference.choices)


SCORERS = {
    TASK: Scorer(
        "RefLVIS: a A or a B (MLLM)", __doc__, "acc", score, chance=chance, is_failure=is_failure
    )
}


@dataclass(frozen=True)
class Thing:
    """An annotation that can be asked about; `others` are the names of its image's other things."""

    annotation: dict[str, Any]
    image: dict[str, Any]
    name: str
    box: Box
    others: Counter[str]


@dataclass
class RefLvis(Task):
    """RefLVIS: is the object in this region a A or a B.

    Built from any annotations in COCO's layout, LVIS v1 above all. The distractor B is the class of
    another thing of the same image, or of the whole set where there is none; which one is drawn by
    a hash of seed and annotation.

    Args:
        annotations: LVIS v1 JSON, or COCO's: `images`, `annotations` (`bbox`, `segmentation`),
            `categories`.
        images: folder, tar or zip of the photos.
        kinds: how a region is shown.
        num_things: drawn from all usable things by `draw_seed`, whether their photo is there or
            not, so everyone's draw is the same; 0 takes all.
        draw_seed: draws things, distractors and shapes.
    """

    annotations: Path
    images: Path
    kinds: list[Kind] = field(default_factory=lambda: list(KINDS))
    num_things: int = 1000
    draw_seed: int = 0

    reads_records = False

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        """
        Raises:
            ValueError: no such file, or fewer than two classes in it.
        """
        not_asked: Counter[str] = Counter()
        things, names = self._drawn_things(not_asked)
        photos = _photo_names(things, self.images)
        pairs = [
            pair
            for thing in things
            for kind in self.kinds
            for pair in _both_orders(
                thing, photos[str(id_key(thing.image["id"]))], kind, names, self.draw_seed
            )
        ]
        name = f"RefLVIS of {self.annotations.name}, {len(things):,} things, seed {self.draw_seed}"
        notes = {"not_asked_by_protocol": dict(not_asked)}
        return [photo_questions(TASK, name, pairs, self.images, notes=notes)]

    def _drawn_things(self, not_asked: Counter[str]) -> tuple[list[Thing], list[str]]:
        """The things to ask about, and the names of all usable ones."""
        from cloc_mllm.data.readers.coco import read_table

        table = read_table(self.annotations, "images", "annotations", "categories")
        things = _things(table, not_asked)
        names = sorted({thing.name for thing in things})
        if len(names) < 2:
            raise ValueError(
                f"{self.annotations}: expected things of two classes or more, got {names}"
            )
        if self.num_things and self.num_things < len(things):
            rng = np.random.default_rng(self.draw_seed)
            drawn = rng.permutation(len(things))[: self.num_things]
            things = [things[index] for index in sorted(drawn)]
        return things, names


def class_name(name: str) -> str:
    """`bat_(animal)` -> `bat`: as a person would say it."""
    return " ".join(re.sub(r"\(.*?\)", " ", name.replace("_", " ")).split()) or name


def _things(table: dict[str, list[dict[str, Any]]], not_asked: Counter[str]) -> list[Thing]:
    """Annotations with a usable box; the others are counted in `not_asked` by reason."""
    images = {str(id_key(row.get("id"))): row for row in table["images"]}
    class_names = {
        str(id_key(row.get("id"))): class_name(str(row.get("name"))) for row in table["categories"]
    }
    usable = []
    names_by_image: dict[str, Counter[str]] = defaultdict(Counter)
    for row in table["annotations"]:
        image, category = str(id_key(row.get("image_id"))), str(id_key(row.get("category_id")))
        if image not in images or category not in class_names:
            not_asked["unknown_image" if image not in images else "unknown_category"] += 1
            continue
        names_by_image[image][class_names[category]] += 1
        box, reason = usable_box(row, images[image])
        if box is None or row.get("iscrowd"):
            not_asked["crowd" if row.get("iscrowd") else reason] += 1
        else:
            usable.append((row, image, class_names[category], box))
    return [
        Thing(row, images[image], name, box, names_by_image[image] - Counter([name]))
        for row, image, name, box in usable
    ]


def _photo_names(things: Sequence[Thing], images: str | Path) -> dict[str, str]:
    """Image id -> its file there: `file_name`, else the last part of `coco_url` (LVIS's own)."""
    from cloc_mllm.data.readers.files import open_files

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
) -> list[QueryPair]:
    rng = np.random.default_rng([seed, zlib.crc32(repr(thing.annotation.get("id")).encode())])
    others = sorted(set(thing.others) - {thing.name}) or [n for n in names if n != thing.name]
    distractor = others[rng.integers(len(others))]
    box = thing.box if kind == "box" else enclosing_box(_drawn(thing, kind, rng))
    rows = []
    for order, choices in enumerate(([thing.name, distractor], [distractor, thing.name])):
        row_id = f"{TASK}/{thing.annotation.get('id')}/{kind}/{order}"
        first, second = (f"{'an' if c[0].lower() in 'aeiou' else 'a'} {c}" for c in choices)
        text = f"Is the object {REGION} {first} or {second}?"
        rows.append(
            pair(
                Query(row_id, photo, TASK, text, (box,), region_prompt=_PROMPTS[kind]),
                boxes=[thing.box],
                labels=[thing.name],
                kind=kind,
                choices=choices,
                width=thing.image["width"],
                height=thing.image["height"],
                num_distractors=thing.others[thing.name],
            )
        )
    return rows


def _drawn(thing: Thing, kind: Kind, rng: np.random.Generator) -> Tensor:
    """A point or scribble on the thing's own outline; in its box where it has no polygons."""
    import torch

    from cloc_mllm.data import shapes

    polygons = thing.annotation.get("segmentation")
    shape: Literal["point", "scribble"] = "point" if kind == "point" else "scribble"
    if not isinstance(polygons, list) or not polygons:
        return shapes.sample_shape(shape, thing.box, rng)
    width, height = thing.image["width"], thing.image["height"]
    outlines = [  # flat lists x, y, x, y in pixels
        [(x / width, y / height) for x, y in zip(flat[::2], flat[1::2], strict=False)]
        for flat in polygons
    ]
    mask = torch.stack([shapes.polygon_mask(outline) for outline in outlines]).sum(0)
    cells = mask.nonzero()[:, [1, 0]].numpy()  # x, y
    count = 1 if shape == "point" else _SCRIBBLE_POINTS
    at = (cells[rng.integers(len(cells), size=count)] + 0.5) / shapes.MASK_SIZE
    points = [(float(x), float(y)) for x, y in at]
    return shapes.points_mask(points) if shape == "point" else shapes.line_mask(points)


def enclosing_box(mask: Tensor) -> Box:
    """Normalised box around the cells that are on; mask float[S, S] over the whole image."""
    side = mask.shape[0]
    y, x = mask.nonzero(as_tuple=True)
    low_x, low_y, high_x, high_y = (
        v.item() / side for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)
    )
    return (low_x, low_y, high_x, high_y)
