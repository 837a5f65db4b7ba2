"""Box answers: their IoU with the true boxes, and what answers without a model would score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.box import Box
from cloc_mllm.evaluation.rows.rows import ReferenceRow, ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.stats.overlap import paired_iou

RANDOM_DRAWS = 50


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    image_ids = [pair.reference.image_id for pair in pairs]
    iou = answer_iou(pairs)
    return {
        "acc_at_0_5": QueryScores((iou >= 0.5).astype(float), image_ids),
        "mean_iou": QueryScores(iou, image_ids),
    }


def answer_iou(pairs: Sequence[ScoredPair]) -> np.ndarray:
    """float[Q]: IoU of the *first* box of each answer with its best true box; 0 if it failed.

    Only the first box counts: taking the best of several would reward guessing.
    """
    answers = [_first_box(pair) for pair in pairs]
    return best_iou(answers, [pair.reference for pair in pairs])


def _first_box(pair: ScoredPair) -> Box:
    return (0.0, 0.0, 0.0, 0.0) if is_failure(pair) else pair.prediction.boxes[0]


def is_failure(pair: ScoredPair) -> bool:
    """Whether a box answer says that it failed, or holds no box."""
    return pair.prediction.failure is not None or not pair.prediction.boxes


def best_iou(answers: Sequence[Box], references: Sequence[ReferenceRow]) -> np.ndarray:
    """float[Q]: IoU of `answers[q]` with the closest true box of query q."""
    query = np.repeat(np.arange(len(references)), [len(row.boxes) for row in references])
    truths = np.array([box for row in references for box in row.boxes], dtype=np.float64)
    iou = np.zeros(len(references))
    np.maximum.at(iou, query, paired_iou(np.array(answers, dtype=np.float64)[query], truths))
    return iou


def chance(references: Sequence[ReferenceRow], seed: int = 0) -> dict[str, float]:
    """Score of answering with a true box of a random other image, averaged over draws: likely
    sizes and places without looking at the image. Empty when there is only one image."""
    rng = np.random.default_rng(seed)
    image_ids = np.array([row.image_id for row in references])
    drawn = rng.integers(len(references), size=(RANDOM_DRAWS, len(references)))
    other_image = image_ids[drawn] != image_ids
    if not other_image.any():
        return {}
    iou = np.stack(
        [best_iou([references[index].boxes[0] for index in row], references) for row in drawn]
    )
    return _means(iou[other_image])


def whole_image(references: Sequence[ReferenceRow]) -> dict[str, float]:
    """Score of always answering with the whole image."""
    return _means(best_iou([(0.0, 0.0, 1.0, 1.0)] * len(references), references))


def _means(iou: np.ndarray) -> dict[str, float]:
    return {"acc_at_0_5": float((iou >= 0.5).mean()), "mean_iou": float(iou.mean())}
