"""What is in this box? Answer and phrase are lower-cased, punctuation becomes spaces, one leading a
/ an / the is cut. exact_match: the answer equals one of the box's phrases; word_f1: overlap in
words with the closest of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cloc_mllm.evaluation.queries import QuerySet
from cloc_mllm.evaluation.rows.rows import ScoredPair
from cloc_mllm.evaluation.stats.bootstrap import QueryScores
from cloc_mllm.evaluation.tasks import EvalData, Scorer, Task

TASK = "referring"


def normalise(text: str) -> str:
    """The declared rule: `" The red crab. "` -> `"red crab"`."""
    words = re.sub(r"[^\w\s]|_", " ", text.lower()).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def word_f1(answer: str, phrase: str) -> float:
    """Harmonic mean of precision and recall over words, counted with repetition."""
    a, b = answer.split(), phrase.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def is_failure(pair: ScoredPair) -> bool:
    """An answer that says it failed, or holds no word."""
    return pair.prediction.failure is not None or not normalise(pair.prediction.raw_text)


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    """`raw_text` of a prediction against the phrases of its box; a failed answer scores 0."""
    exact, overlap = np.zeros(len(pairs)), np.zeros(len(pairs))
    for i, pair in enumerate(pairs):
        if not is_failure(pair):
            answer = normalise(pair.prediction.raw_text)
            phrases = [normalise(label) for label in pair.reference.labels]
            exact[i] = answer in phrases
            overlap[i] = max(word_f1(answer, phrase) for phrase in phrases)
    image_ids = [pair.reference.image_id for pair in pairs]
    return {
        "exact_match": QueryScores(exact, image_ids),
        "word_f1": QueryScores(overlap, image_ids),
    }


SCORERS = {
    TASK: Scorer(
        "Referring: what is in this box (MLLM)",
        __doc__,
        "exact_match",
        score,
        truth=("labels",),
        is_failure=is_failure,
        example_metric="word_f1",
        drawn="asked",
    )
}


@dataclass
class Referring(Task):
    """The MLLM says what is in each region of the records."""

    def query_sets(self, data: EvalData) -> list[QuerySet]:
        pairs = data.index.region_pairs(TASK, lambda region: region.phrases)
        return [data.index.query_set(TASK, "text", "mllm", pairs)]
