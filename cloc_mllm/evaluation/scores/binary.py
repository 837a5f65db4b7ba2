"""Scores of a two-way decision about one class (yes, or absent), and of a confidence for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.stats.bootstrap import QueryScores


def binary_scores(
    said: np.ndarray, true: np.ndarray, image_ids: Sequence[str]
) -> dict[str, QueryScores]:
    """Precision, recall and F1 of saying that the class is there.

    Each is a mean over the queries that count in it, so precision is left out if it was never
    said, recall if it was never true, f1 if neither.

    Args:
        said, true: bool[Q].
    """
    images = np.asarray(image_ids)
    hits, in_f1 = said & true, said | true
    chosen = {
        "precision": (true[said], images[said]),
        "recall": (said[true], images[true]),
        # 2 TP / (2 TP + FP + FN): the mean over hits, each twice, and what was missed or invented
        "f1": (
            np.concatenate([hits[in_f1], hits[hits]]),
            np.concatenate([images[in_f1], images[hits]]),
        ),
    }
    return {
        name: QueryScores(values.astype(float), list(their_images))
        for name, (values, their_images) in chosen.items()
        if len(values)
    }


def auroc(
    confidences: np.ndarray, positive: np.ndarray, image_ids: Sequence[str]
) -> QueryScores | None:
    """Share of (positive, negative) pairs whose positive has the higher confidence, ties half.

    Each query's value is its share of won pairs, stretched to twice its distance from the AUROC:
    the mean over positives and over negatives stays the AUROC, and resampling both gives the
    variance of DeLong et al. 1988. None if one of the two kinds is missing.

    Args:
        confidences: float[Q]; positive: bool[Q].
    """
    if positive.all() or not positive.any():
        return None
    won = np.empty(len(confidences))
    won[positive] = _share_below(confidences[positive], confidences[~positive])
    won[~positive] = 1 - _share_below(confidences[~positive], confidences[positive])
    area = won[positive].mean()
    groups = np.where(positive, "positive", "negative")
    return QueryScores(area + 2 * (won - area), list(image_ids), list(groups))


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of `others` below each value; equal ones count half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, values, side="left")
    not_above = np.searchsorted(ordered, values, side="right")
    return (below + not_above) / 2 / len(ordered)


def best_threshold(confidences: np.ndarray, positive: np.ndarray) -> float:
    """The threshold at or above which calling a query positive has the best balanced accuracy.

    It lies midway between two confidences; of several the lowest.

    Raises:
        ValueError: one of the two kinds is missing.
    """
    if positive.all() or not positive.any():
        raise ValueError("a threshold needs positive and negative examples, got only one kind")
    ordered = np.unique(confidences)
    middles = (ordered[1:] + ordered[:-1]) / 2
    candidates = np.concatenate([[ordered[0]], middles, [ordered[-1] + 1e-6]])
    recall = 1 - np.searchsorted(np.sort(confidences[positive]), candidates) / positive.sum()
    rejected = np.searchsorted(np.sort(confidences[~positive]), candidates) / (~positive).sum()
    return float(candidates[np.argmax(recall + rejected)])
