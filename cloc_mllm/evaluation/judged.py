"""Ferret-Bench (You et al. 2023): free answers, scored by a judge beside a reference answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.predictions import ScoredPair
from cloc_mllm.evaluation.statistics import QueryScores

RULE = (
    "A judge model gives the reference answer and the model's answer 1 to 10 each, seeing the "
    "annotations as text, not the image. relative_score: mean of the answers' scores over mean of "
    "the references', by category, then the mean of the categories (its interval takes the "
    "references' mean as fixed); answer_score and reference_score: out of 10, in percent. An "
    "answer the judge did not score is in none of these: they are then called ..._of_judged."
)
SCORED = ["answer", "reference"]  # `labels` of a judged row; `scores` are theirs, 1 to 10
MAX_SCORE = 10


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """Over rows that `benchmarks.judge.judged_rows` made; {} if the judge scored none."""
    judged = [pair for pair in pairs if pair.prediction.labels == SCORED]
    if not judged:
        return {}
    image_ids = np.array([pair.reference.image_id for pair in judged])
    kinds = np.array([pair.reference.kind for pair in judged])
    answer, reference = np.array([pair.prediction.scores for pair in judged]).T
    mean_of_kind = {kind: reference[kinds == kind].mean() for kind in np.unique(kinds)}
    relative = answer / np.array([mean_of_kind[kind] for kind in kinds])
    suffix = "" if len(judged) == len(pairs) else "_of_judged"
    images = list(image_ids)
    scores = {
        f"relative_score{suffix}": QueryScores(relative, images, list(kinds)),
        f"answer_score{suffix}": QueryScores(answer / MAX_SCORE, images),
        f"reference_score{suffix}": QueryScores(reference / MAX_SCORE, images),
    }
    for kind in mean_of_kind if len(mean_of_kind) > 1 else []:
        chosen = kinds == kind
        scores[f"relative_score{suffix}/{kind}"] = QueryScores(
            relative[chosen], list(image_ids[chosen])
        )
    return scores
