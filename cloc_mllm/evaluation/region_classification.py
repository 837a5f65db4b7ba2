"""Region classification: name a given box from a fixed list of class names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.predictions import ReferenceRow, ScoredPair
from cloc_mllm.evaluation.statistics import QueryScores

RULE = (
    "Every true box is classified against all class names. macro_acc: mean over the classes that "
    "occur of the share of their boxes named right (mAcc of the paper); micro_acc and top5_acc: "
    "share of all boxes."
)


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """`labels` of a prediction: class names, best first; of a reference: the one true class."""
    image_ids = [pair.reference.image_id for pair in pairs]
    classes = [pair.reference.labels[0] for pair in pairs]
    top1 = _hit(pairs, classes, 1)
    return {
        "macro_acc": QueryScores(top1, image_ids, classes),
        "micro_acc": QueryScores(top1, image_ids),
        "top5_acc": QueryScores(_hit(pairs, classes, 5), image_ids),
    }


def _hit(pairs: Sequence[ScoredPair], classes: Sequence[str], k: int) -> np.ndarray:
    ranked = (pair.prediction.labels[:k] for pair in pairs)
    return np.array([name in best for name, best in zip(classes, ranked, strict=True)], dtype=float)


def chance(references: Sequence[ReferenceRow]) -> dict[str, float]:
    """Expected score of a uniformly random order of the class names."""
    candidates = np.array([row.num_candidates for row in references], dtype=float)
    top1 = float(np.mean(1 / candidates))
    top5 = float(np.mean(np.minimum(5 / candidates, 1)))
    return {"macro_acc": top1, "micro_acc": top1, "top5_acc": top5}
