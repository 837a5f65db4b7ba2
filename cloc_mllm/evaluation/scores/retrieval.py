"""Ranked candidates of which some are right: recall among the first k."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.rows.rows import ReferenceRow, ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores

RECALL_AT = (1, 5, 10)


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
