"""What all of these scorers are given and return. Letters: Q queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BoxAnswers:
    """Answers and the one true box of each.

    Args:
        answers: the models' texts.
        truths: float64[Q, 4] xyxy, 0..1 of the original image.
        sizes: float64[Q, 2], width and height of the original images in pixels.
    """

    answers: Sequence[str]
    truths: np.ndarray
    sizes: np.ndarray

    @property
    def truths_px(self) -> np.ndarray:
        """float64[Q, 4], in pixels."""
        return self.truths * np.tile(self.sizes, 2)


@dataclass(frozen=True)
class CompatScores:
    """The scorer's numbers under its own names; accuracies and IoU in 0..1.

    `num_raised`: answers on which the original ends with an exception; they count as wrong here.
    """

    metrics: dict[str, float]
    iou: np.ndarray
    num_raised: int = 0


def area(boxes: np.ndarray) -> np.ndarray:
    """Width times height; negative for a box that is inverted in one direction."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def mean(values: np.ndarray) -> float:
    """Summed one after another as Python's `sum`, so the last digit is theirs too."""
    return sum(values.tolist()) / len(values)


def share(hits: np.ndarray) -> float:
    return int(np.count_nonzero(hits)) / len(hits)
