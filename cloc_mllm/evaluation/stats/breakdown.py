"""Breaks the accuracy of box answers down by properties of the true box and the expression.

The groups of a breakdown depend on the references alone, so two models have the same ones, and
their sizes add up to all queries. Boxes: xyxy, normalised to the original image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.evaluation.rows.rows import ReferenceRow
from cloc_mllm.evaluation.stats.bootstrap import (
    DEFAULT,
    Bootstrap,
    Interval,
    QueryScores,
    group_intervals,
)

SMALL_PX, LARGE_PX = 32**2, 96**2  # areas of COCO
_COCO_PX = 640 * 480  # the usual COCO photo: what an area share stands for without known pixels
# fmt: off
SPATIAL_WORDS = frozenset([
    "left", "right", "leftmost", "rightmost", "above", "below", "under", "over", "top", "bottom",
    "upper", "lower", "middle", "center", "centre", "corner", "front", "back", "behind", "between",
    "beside", "next", "near", "nearest", "closest", "far", "farthest", "furthest", "first",
    "second", "third", "fourth", "last",
])
# fmt: on
RULES = {
    "kind": "kind of the query, as its reference says.",
    "box size": (
        "area of the largest true box: small < 32², medium < 96², large >= 96² pixels of the "
        "original image; where the size of an image of the task is not known, shares of 640 x 480 "
        "(0.33 % and 3 %) for all of them."
    ),
    "position": "the third of height and width in which the centre of the largest true box lies.",
    "expression length": "words of the expression.",
    "spatial words": f"whether the expression holds any of: {', '.join(sorted(SPATIAL_WORDS))}.",
    "distractors": "other annotated things of the same kind in the image.",
}
UNKNOWN = "unknown"

Groups = dict[str, list[str]]  # breakdown -> the group of each query


@dataclass(frozen=True)
class GroupShare(Interval):
    """Share of right answers in one group of queries.

    Args:
        noun_only: what a model is expected to score that finds the kind of thing and picks any of
            them; known for the groups of `kind` where the number of distractors is.
    """

    noun_only: float | None = None


def breakdowns(
    references: Sequence[ReferenceRow],
    right: np.ndarray,
    bootstrap: Bootstrap = DEFAULT,
) -> dict[str, dict[str, GroupShare]]:
    """Breakdown -> group -> share of right answers.

    A breakdown with fewer than two groups says nothing and is left out.

    Args:
        right: float[Q], 1 where the answer of the query is right.
    """
    image_ids = [row.image_id for row in references]
    found = {}
    for name, groups in groups_of(references).items():
        if len(set(groups)) < 2:
            continue
        intervals = group_intervals(QueryScores(right, image_ids, groups), bootstrap)
        found[name] = {
            group: GroupShare(
                **asdict(intervals[group]),
                noun_only=_noun_only(references, group) if name == "kind" else None,
            )
            for group in sorted(intervals, key=group_rank)
        }
    return found


def groups_of(references: Sequence[ReferenceRow]) -> Groups:
    """The group of each query in every breakdown."""
    in_pixels = all(row.width > 0 and row.height > 0 for row in references)
    by: dict[str, Callable[[ReferenceRow], str]] = {
        "kind": lambda row: row.kind or UNKNOWN,
        "box size": lambda row: _size(row, in_pixels),
        "position": _position,
        "expression length": _length,
        "spatial words": _has_spatial_word,
        "distractors": _distractors,
    }
    return {name: [group(row) for row in references] for name, group in by.items()}


_ORDER = (
    *("small", "medium", "large"),
    *(f"{y} {x}" for y in ("top", "middle", "bottom") for x in ("left", "centre", "right")),
    *("1-2 words", "3-4 words", "5-7 words", "8+ words", "without", "with"),
    *("0", "1", "2", "3+"),
)


def group_rank(group: str) -> tuple[int, str]:
    """Groups in the order of their meaning, then kinds by name, the unknown last."""
    if group == UNKNOWN:
        return len(_ORDER) + 1, group
    return (_ORDER.index(group) if group in _ORDER else len(_ORDER)), group


def _largest(row: ReferenceRow) -> Box:
    return max(row.boxes, key=_area)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _size(row: ReferenceRow, in_pixels: bool) -> str:
    area = _area(_largest(row)) * (row.width * row.height if in_pixels else _COCO_PX)
    return "small" if area < SMALL_PX else "medium" if area < LARGE_PX else "large"


def _position(row: ReferenceRow) -> str:
    x1, y1, x2, y2 = _largest(row)
    column = ("left", "centre", "right")[min(2, int(1.5 * (x1 + x2)))]
    return ("top", "middle", "bottom")[min(2, int(1.5 * (y1 + y2)))] + " " + column


def _length(row: ReferenceRow) -> str:
    if not row.labels:
        return UNKNOWN
    count = len(row.labels[0].split())
    return next(name for least, name in _LENGTHS if count >= least)


_LENGTHS = ((8, "8+ words"), (5, "5-7 words"), (3, "3-4 words"), (0, "1-2 words"))


def _has_spatial_word(row: ReferenceRow) -> str:
    if not row.labels:
        return UNKNOWN
    words = re.findall(r"[a-z]+", row.labels[0].lower())
    return "with" if SPATIAL_WORDS.intersection(words) else "without"


def _distractors(row: ReferenceRow) -> str:
    if row.num_distractors is None:
        return UNKNOWN
    return "3+" if row.num_distractors >= 3 else str(row.num_distractors)


def _noun_only(references: Sequence[ReferenceRow], kind: str) -> float | None:
    rows = [row for row in references if (row.kind or UNKNOWN) == kind]
    if any(row.num_distractors is None for row in rows):
        return None
    shares = [len(row.boxes) / (len(row.boxes) + (row.num_distractors or 0)) for row in rows]
    return float(np.mean(shares))
