"""Flickr30k Entities phrase grounding: scores of ranked boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation import grounding
from cloc_mllm.evaluation.overlap import paired_iou
from cloc_mllm.evaluation.predictions import Box, ReferenceRow, ScoredPair
from cloc_mllm.evaluation.statistics import QueryScores

RULE = (
    "One query a marked phrase of a caption whose chain has a box, so a phrase that stands twice "
    "is asked twice, each time against the boxes of its own chain. r_at_k: share of phrases for "
    "which one of the first k boxes has IoU >= 0.5 with any box of the chain; merged_r_at_k: with "
    "the box around all boxes of the chain. After the slash: phrases of that type; a phrase of "
    "two types counts in both. r_at_5 and r_at_10 are left out where no answer has two boxes."
)
RECALL_AT = (1, 5, 10)


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """`boxes` of a prediction: best first; of a reference: all of the chain."""
    image_ids = [pair.reference.image_id for pair in pairs]
    types = [pair.reference.kind.split("/") for pair in pairs]
    several = any(len(pair.prediction.boxes) > 1 for pair in pairs)
    hits: dict[str, np.ndarray] = {}
    for prefix, truths in (("", _own_boxes), ("merged_", _merged_box)):
        rank = np.array([_first_hit(pair, truths(pair.reference)) for pair in pairs])
        for k in RECALL_AT if several else RECALL_AT[:1]:
            hits[f"{prefix}r_at_{k}"] = (rank < k).astype(float)
    scores = {name: QueryScores(values, image_ids) for name, values in hits.items()}
    for kind in sorted({kind for kinds in types for kind in kinds} - {""}):
        chosen = [i for i, kinds in enumerate(types) if kind in kinds]
        images = [image_ids[i] for i in chosen]
        for name in ("r_at_1", "merged_r_at_1"):
            scores[f"{name}/{kind}"] = QueryScores(hits[name][chosen], images)
    return scores


def _own_boxes(reference: ReferenceRow) -> list[Box]:
    return reference.boxes


def _merged_box(reference: ReferenceRow) -> list[Box]:
    """The box around all of them."""
    left, top, right, bottom = zip(*reference.boxes, strict=True)
    return [(min(left), min(top), max(right), max(bottom))]


def _first_hit(pair: ScoredPair, truths: Sequence[Box]) -> float:
    """Rank (from 0) of the first box that hits; infinite if none does."""
    if grounding.is_failure(pair):
        return np.inf
    answers = pair.prediction.boxes[: RECALL_AT[-1]]
    iou = paired_iou(np.repeat(answers, len(truths), 0), np.tile(truths, (len(answers), 1)))
    best = iou.reshape(len(answers), len(truths)).max(1)
    return next((rank for rank, value in enumerate(best) if value >= 0.5), np.inf)


def chance(references: Sequence[ReferenceRow]) -> dict[str, float]:
    """A true box of a random other image, see `grounding.chance`."""
    values = grounding.chance(references)
    return {"r_at_1": values["acc_at_0_5"]} if values else {}


def whole_image(references: Sequence[ReferenceRow]) -> dict[str, float]:
    return {"r_at_1": grounding.whole_image(references)["acc_at_0_5"]}
