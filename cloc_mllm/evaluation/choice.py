"""Two-way choice ("is it a A or a B?"), asked in both orders: scores of the words answered."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from cloc_mllm.evaluation.by_kind import with_kinds
from cloc_mllm.evaluation.predictions import ReferenceRow, ScoredPair
from cloc_mllm.evaluation.statistics import QueryScores

RULE = (
    "An answer chooses the one offered name that it holds as whole words, any case (`cat` is not "
    "in `catalog`; of `apple juice` only the longer name counts); with both names or neither it is "
    "unreadable: wrong and counted. acc: of all questions; pair_acc: things whose two orders are "
    "both right; first_rate: readable answers that name what was offered first (50 % is no "
    "position bias). After the slash, by how the region was shown, or by the true name's place."
)


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """The one of `choices` that the text names, None if it names none or several."""
    found = set()
    for choice in sorted(choices, key=len, reverse=True):
        words = re.split(r"[\s_-]+", choice.strip())
        pattern = r"(?<!\w)" + r"[\s_-]+".join(map(re.escape, words)) + r"(?!\w)"
        text, count = re.subn(pattern, "\0", text, flags=re.IGNORECASE)
        if count:
            found.add(choice)
    return found.pop() if len(found) == 1 else None


def is_failure(pair: ScoredPair) -> bool:
    return _answer(pair) is None


def chance(references: Sequence[ReferenceRow]) -> dict[str, float]:
    """Score of always naming what is offered first, or of a coin; no pair by the first."""
    return {"acc": 0.5, "pair_acc": 0.25}


def score(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    return with_kinds(pairs, _scores)


def _scores(pairs: Sequence[ScoredPair]) -> dict[str, QueryScores]:
    answers = [_answer(pair) for pair in pairs]
    image_ids = np.array([pair.reference.image_id for pair in pairs])
    right = np.array([a == p.reference.labels[0] for a, p in zip(answers, pairs, strict=True)])
    named_first = np.array(
        [a == p.reference.choices[0] for a, p in zip(answers, pairs, strict=True)]
    )
    true_first = np.array([p.reference.labels[0] == p.reference.choices[0] for p in pairs])
    readable = np.array([answer is not None for answer in answers])
    both_right, pair_images = _by_thing(pairs, right)
    chosen = {
        "acc": (right, image_ids),
        "pair_acc": (both_right, pair_images),
        "first_rate": (named_first[readable], image_ids[readable]),
        "acc/true_first": (right[true_first], image_ids[true_first]),
        "acc/true_second": (right[~true_first], image_ids[~true_first]),
    }
    return {
        name: QueryScores(np.asarray(values, dtype=float), list(images))
        for name, (values, images) in chosen.items()
        if len(values)
    }


def _by_thing(pairs: Sequence[ScoredPair], right: np.ndarray) -> tuple[list[bool], list[str]]:
    """Whether both orders of a thing are right, and its image; ids end in `/0` and `/1`."""
    orders: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        orders.setdefault(pair.reference.id.rpartition("/")[0], []).append(index)
    both = [indices for indices in orders.values() if len(indices) == 2]
    return (
        [bool(right[indices].all()) for indices in both],
        [pairs[indices[0]].reference.image_id for indices in both],
    )


def _answer(pair: ScoredPair) -> str | None:
    if pair.prediction.failure is not None:
        return None
    return read_choice(pair.prediction.raw_text, pair.reference.choices)
