"""Names chosen from a fixed list of class names, for regions or whole images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.rows.rows import ReferenceRow, ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """`labels` of a prediction: class names, best first; of a reference: the one true class.

    If references have a kind (the band of the class), macro and micro of each kind too.
    """
    image_ids = [pair.reference.image_id for pair in pairs]
    classes = [pair.reference.labels[0] for pair in pairs]
    top1 = _hit(pairs, classes, 1)
    scores = {
        "macro_acc": QueryScores(top1, image_ids, classes),
        "micro_acc": QueryScores(top1, image_ids),
        "top5_acc": QueryScores(_hit(pairs, classes, 5), image_ids),
    }
    for kind in sorted({pair.reference.kind for pair in pairs} - {""}):
        chosen = [i for i, pair in enumerate(pairs) if pair.reference.kind == kind]
        values, images = top1[chosen], [image_ids[i] for i in chosen]
        scores[f"macro_acc/{kind}"] = QueryScores(values, images, [classes[i] for i in chosen])
        scores[f"micro_acc/{kind}"] = QueryScores(values, images)
    return scores


def _hit(pairs: Sequence[ScoredPair], classes: Sequence[str], k: int) -> np.ndarray:
    ranked = (pair.prediction.labels[:k] for pair in pairs)
    return np.array([name in best for name, best in zip(classes, ranked, strict=True)], dtype=float)


def chance(references: Sequence[ReferenceRow]) -> dict[str, float]:
    """Expected score of a uniformly random order of the class names; {} if their number is
    not stated."""
    candidates = np.array([row.num_candidates for row in references], dtype=float)
    if not candidates.all():
        return {}
    top1 = float(np.mean(1 / candidates))
    top5 = float(np.mean(np.minimum(5 / candidates, 1)))
    return {"macro_acc": top1, "micro_acc": top1, "top5_acc": top5}
