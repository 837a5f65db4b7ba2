"""Not in the image: does a model refuse to place what is not there?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation import grounding
from cloc_mllm.evaluation.binary import auroc, binary_scores
from cloc_mllm.evaluation.by_kind import with_kinds
from cloc_mllm.evaluation.predictions import ScoredPair
from cloc_mllm.evaluation.statistics import QueryScores
from cloc_mllm.evaluation.yes_no import words_of

PRESENT, ABSENT = "present", "absent"
RULE = (
    "Half of the phrases name a thing of the image, half one that is not there. A model refuses by "
    "its label (CLOC: confidence under a threshold) or in words (a text without a box that holds "
    "no, not, none, nothing, n't, cannot, absent or missing); a box is no refusal; any other text "
    "is wrong and counted. precision, recall, f1: of refusing. right: refused what is absent, or "
    "placed what is present with IoU >= 0.5. auroc: how well the confidence alone tells present "
    "from absent (50 % is chance). After the slash, by kind of phrase."
)
_DENIALS = frozenset(("no", "not", "none", "nothing", "cannot", "absent", "missing"))


def refuses(text: str) -> bool:
    """Whether a text without a box says that the thing is not there, by the declared words."""
    return not _DENIALS.isdisjoint(words_of(text))


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    return with_kinds(pairs, _scores)


def is_failure(pair: ScoredPair) -> bool:
    """Neither a box nor a refusal."""
    return _decision(pair) is None


def _decision(pair: ScoredPair) -> str | None:
    prediction = pair.prediction
    if prediction.labels:
        return prediction.labels[0]
    if prediction.boxes and prediction.failure is None:
        return PRESENT
    return ABSENT if refuses(prediction.raw_text) else None


def _scores(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    image_ids = [pair.reference.image_id for pair in pairs]
    decisions = np.array([_decision(pair) or "" for pair in pairs])
    absent = np.array([pair.reference.labels[0] == ABSENT for pair in pairs])
    placed = np.zeros(len(pairs), dtype=bool)
    if not absent.all():
        present = [pair for pair in pairs if pair.reference.labels[0] == PRESENT]
        placed[~absent] = grounding.answer_iou(present) >= 0.5
    right = np.where(absent, decisions == ABSENT, (decisions == PRESENT) & placed)
    confidences = np.array(
        [-np.inf if p.prediction.confidence is None else p.prediction.confidence for p in pairs]
    )
    area = auroc(confidences, ~absent, image_ids)
    return {
        **binary_scores(decisions == ABSENT, absent, image_ids),
        "right": QueryScores(right.astype(float), image_ids),
        "refusal_rate": QueryScores((decisions == ABSENT).astype(float), image_ids),
        **({"auroc": area} if area else {}),
    }
