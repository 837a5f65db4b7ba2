"""Retrieval in four directions: region to text, text to region, image to text, text to image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.predictions import ReferenceRow, ScoredPair
from cloc_mllm.evaluation.statistics import QueryScores

RECALL_AT = (1, 5, 10)
RULE = (
    "r_at_k: share of queries with a right candidate among the first k. Equal texts (after "
    "lower-casing) are one candidate, equal boxes of an image are one region. Whatever carries "
    "one of the query's texts counts as right: any region or image with that text, any text of "
    "that region or image. Text queries are asked once for each image they occur on."
)


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """`labels` of a prediction: candidates, best first; of a reference: all that are right."""
    image_ids = [pair.reference.image_id for pair in pairs]
    rank = np.array([_first_hit(pair) for pair in pairs])
    return {f"r_at_{k}": QueryScores((rank < k).astype(float), image_ids) for k in RECALL_AT}


def _first_hit(pair: ScoredPair) -> float:
    right = set(pair.reference.labels)
    hits = (rank for rank, label in enumerate(pair.prediction.labels) if label in right)
    return next(hits, np.inf)


def chance(references: Sequence[ReferenceRow]) -> dict[str, float]:
    """Expected score of a uniformly random order of the candidates."""
    total = np.array([row.num_candidates for row in references], dtype=float)
    right = np.array([len(row.labels) for row in references], dtype=float)
    return {f"r_at_{k}": float(np.mean(1 - _miss(total, right, k))) for k in RECALL_AT}


def _miss(total: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """Chance that k draws without replacement hold none of the right ones (hypergeometric)."""
    drawn = np.arange(k)[:, None]
    wrong_left = np.maximum(total - right - drawn, 0)
    return (wrong_left / np.maximum(total - drawn, 1)).prod(0)
