"""Answers of any number of boxes against the true ones, as gRefCOCO scores them.

He et al. 2023 (GREC, arXiv 2308.16182), section 4: boxes are paired one to one, the pair of the
largest overlap first; a pair of IoU >= 0.5 is a true positive (TP), a box left over a false
positive (FP), a true one left over a false negative (FN); F1 = 2 TP / (2 TP + FP + FN). Where there
is no target, F1 is 1 without a box and 0 with one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.rows.rows import Box
from cloc_mllm.evaluation.stats.overlap import paired_giou, paired_iou

THRESHOLD = 0.5


def f1(answered: Sequence[Box], true: Sequence[Box], *, giou: bool = False) -> float:
    """F1 of one answer; 1 where neither side has a box.

    Args:
        giou: pairs boxes by their generalised IoU, as the authors' script does. It is never larger
            than the IoU that their paper states, so scores are lower.
    """
    if not answered and not true:
        return 1.0
    hits = _num_pairs(_overlaps(answered, true, giou))
    return 2 * hits / (len(answered) + len(true))


def _overlaps(answered: Sequence[Box], true: Sequence[Box], giou: bool) -> np.ndarray:
    """float[A, T]."""
    a = np.repeat(np.array(answered, dtype=np.float64).reshape(-1, 4), len(true), axis=0)
    b = np.tile(np.array(true, dtype=np.float64).reshape(-1, 4), (len(answered), 1))
    overlap = paired_giou(a, b) if giou else paired_iou(a, b)
    return overlap.reshape(len(answered), len(true))


def _num_pairs(overlaps: np.ndarray) -> int:
    """Pairs rows and columns, the largest overlap first, as long as it reaches the threshold."""
    left = overlaps.copy()
    for count in range(min(left.shape)):
        row, column = np.unravel_index(left.argmax(), left.shape)
        if left[row, column] < THRESHOLD:
            return count
        left[row, :] = left[:, column] = -np.inf
    return min(left.shape)
