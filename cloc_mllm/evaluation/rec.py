"""Referring expression comprehension: an expression in, one box out, as text of an MLLM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation import grounding
from cloc_mllm.evaluation.predictions import ScoredPair
from cloc_mllm.evaluation.statistics import QueryScores

RULE = (
    "One query an expression and region; where a phrase names several boxes together, any of them "
    "counts. Of built-in scenes one expression of each kind a region is asked. The first box of "
    "the answer counts, read in the model's declared format; an answer that does not parse is "
    "wrong and counted. acc_at_t: share of queries with IoU >= t; after the slash, by kind."
)
THRESHOLDS = {"acc_at_0_5": 0.5, "acc_at_0_7": 0.7, "acc_at_0_9": 0.9}


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """Acc at three thresholds, mean IoU, and if there are several kinds, `acc_at_0_5/KIND`."""
    image_ids = np.array([pair.reference.image_id for pair in pairs])
    iou = grounding.answer_iou(pairs)
    scores = {
        name: QueryScores((iou >= threshold).astype(float), list(image_ids))
        for name, threshold in THRESHOLDS.items()
    }
    scores["mean_iou"] = QueryScores(iou, list(image_ids))
    kinds = np.array([pair.reference.kind for pair in pairs])
    names = np.unique(kinds)
    for kind in names if len(names) > 1 else []:
        chosen = kinds == kind
        right = (iou[chosen] >= 0.5).astype(float)
        scores[f"acc_at_0_5/{kind}"] = QueryScores(right, list(image_ids[chosen]))
    return scores
