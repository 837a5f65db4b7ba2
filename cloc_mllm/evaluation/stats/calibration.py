"""Does a model know when it is right? Confidence against correctness of its answers.

Letters: Q queries. Confidences are probabilities, 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cloc_mllm.evaluation.stats.bootstrap import (
    DEFAULT,
    Bootstrap,
    Interval,
    QueryScores,
    group_intervals,
)

NUM_BINS = 10
COVERAGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RULE = (
    "ece: expected calibration error, the mean over ten equal bins of confidence of |accuracy - "
    "mean confidence|, weighted by answers (Guo et al. 2017). Selective accuracy: accuracy of the "
    "most confident share of the answers; equal confidences count by their mean. Right is IoU >= "
    "0.5. Answers without a confidence are left out and counted."
)


@dataclass(frozen=True)
class Bin(Interval):
    """Accuracy of the answers with a confidence in `low` .. `high`, and their mean confidence."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Calibration:
    """The relation of confidence and correctness.

    Args:
        n: number of answers with a confidence; `without_confidence` is that of the others.
        outside_0_1: number of confidences outside 0..1. If there are any, there are no `bins` and
            no `ece`, but they still rank answers.
        ece: expected calibration error.
        selective: accuracy of the most confident share of the answers, for each of `COVERAGES`.
    """

    n: int
    without_confidence: int
    outside_0_1: int
    ece: float | None
    mean_confidence: float
    accuracy: float
    bins: list[Bin]
    selective: list[float]


def calibration(
    confidence: Sequence[float | None],
    right: np.ndarray,
    image_ids: Sequence[str],
    bootstrap: Bootstrap = DEFAULT,
) -> Calibration | None:
    """Compares confidences with correctness; None if no answer has a confidence.

    Args:
        confidence: Q numbers; None or not finite where the model gives none.
        right: float[Q], 1 where the answer is right.
    """
    values = np.array([np.nan if value is None else value for value in confidence], dtype=float)
    known = np.isfinite(values)
    if not known.any():
        return None
    values, right = values[known], right[known]
    outside = int(((values < 0) | (values > 1)).sum())
    images = np.asarray(image_ids)[known]
    bins = [] if outside else _reliability(values, right, images, bootstrap)
    gaps = [entry.n * abs(entry.value - entry.confidence) for entry in bins]
    return Calibration(
        n=len(values),
        without_confidence=int((~known).sum()),
        outside_0_1=outside,
        ece=sum(gaps) / len(values) if bins else None,
        mean_confidence=float(values.mean()),
        accuracy=float(right.mean()),
        bins=bins,
        selective=selective_accuracy(values, right),
    )


def _reliability(
    confidence: np.ndarray, right: np.ndarray, image_ids: np.ndarray, bootstrap: Bootstrap
) -> list[Bin]:
    """Lists the bins that hold an answer."""
    index = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    scores = QueryScores(right, image_ids.tolist(), [f"{i:02d}" for i in index])
    return [
        Bin(
            **asdict(accuracy),
            low=int(name) / NUM_BINS,
            high=(int(name) + 1) / NUM_BINS,
            confidence=float(confidence[index == int(name)].mean()),
        )
        for name, accuracy in group_intervals(scores, bootstrap).items()
    ]


def selective_accuracy(confidence: np.ndarray, right: np.ndarray) -> list[float]:
    """Accuracy of the most confident share of the answers, for each of `COVERAGES`.

    Among equal confidences any order is as good, so each counts as the mean of them.
    """
    levels, level = np.unique(-confidence, return_inverse=True)
    mean = np.bincount(level, weights=right) / np.bincount(level)
    ordered = np.repeat(mean, np.bincount(level, minlength=len(levels)))
    kept = [max(1, round(share * len(ordered))) for share in COVERAGES]
    return [float(ordered[:count].mean()) for count in kept]
