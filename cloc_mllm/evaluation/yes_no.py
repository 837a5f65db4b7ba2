"""POPE (Li et al. 2023): is there a THING in the image? Scores of yes / no answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.binary import binary_scores
from cloc_mllm.evaluation.by_kind import with_kinds
from cloc_mllm.evaluation.predictions import ScoredPair
from cloc_mllm.evaluation.statistics import QueryScores

RULE = (
    "An answer that starts with yes or no is that; else one with a `yes` and no word of denial is "
    "yes, one with a `no`, `not` or `n't` and no `yes` is no (whole words, any case). Any other "
    "answer is unparseable: wrong, counted, and neither a yes nor a no. precision: of the yes "
    "answers; recall: of the true yes; f1 of the two; yes_rate: yes answers of all questions. "
    "After the slash, by split."
)


def read_yes_no(text: str) -> str | None:
    """`yes`, `no`, or None if the declared rule reads neither."""
    words = words_of(text)
    if words and words[0] in ("yes", "no"):
        return words[0]
    says_yes = "yes" in words
    denies = any(word in ("no", "not") for word in words)
    if says_yes == denies:
        return None
    return "yes" if says_yes else "no"


def words_of(text: str) -> list[str]:
    """English words in lower case, `n't` as `not`."""
    return re.findall(r"[a-z]+", re.sub(r"n['’]t\b", " not", text.lower()))


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """Of all questions, then by `kind` (the split) if there are several."""
    return with_kinds(pairs, _scores)


def is_failure(pair: ScoredPair) -> bool:
    return _answer(pair) is None


def _answer(pair: ScoredPair) -> str | None:
    return read_yes_no(pair.prediction.raw_text) if pair.prediction.failure is None else None


def _scores(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    answers = [
        None if is_failure(pair) else read_yes_no(pair.prediction.raw_text) for pair in pairs
    ]
    said_yes = np.array([answer == "yes" for answer in answers])
    is_yes = np.array([pair.reference.labels[0] == "yes" for pair in pairs])
    right = np.array([a == p.reference.labels[0] for a, p in zip(answers, pairs, strict=True)])
    image_ids = [pair.reference.image_id for pair in pairs]
    return {
        "accuracy": QueryScores(right.astype(float), image_ids),
        **binary_scores(said_yes, is_yes, image_ids),
        "yes_rate": QueryScores(said_yes.astype(float), image_ids),
    }
