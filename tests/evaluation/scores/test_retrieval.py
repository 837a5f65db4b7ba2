import itertools

import numpy as np
import pytest

from cloc_mllm.evaluation.rows.rows import ReferenceRow
from cloc_mllm.evaluation.scores import retrieval
from tests.evaluation.helpers import pair


def test_retrieval_counts_any_right_candidate():
    rng = np.random.default_rng(0)
    names = [f"c{index}" for index in range(30)]
    rankings = [list(rng.permutation(names)[:10]) for _ in range(50)]
    right = [list(rng.permutation(names)[: rng.integers(1, 5)]) for _ in range(50)]
    pairs = [
        pair({"labels": ranking}, labels=labels)
        for ranking, labels in zip(rankings, right, strict=True)
    ]
    for k, name in ((1, "r_at_1"), (5, "r_at_5"), (10, "r_at_10")):
        hits = 0
        for ranking, labels in zip(rankings, right, strict=True):
            hits += any(candidate in labels for candidate in ranking[:k])
        assert retrieval.score(pairs)[name].mean() == pytest.approx(hits / 50)


@pytest.mark.parametrize(("total", "right"), [(6, 1), (6, 2), (5, 5), (3, 1)])
def test_chance_of_retrieval_equals_enumeration(total, right):
    row = ReferenceRow("q", "i", "t", labels=[str(i) for i in range(right)], num_candidates=total)
    orders = list(itertools.permutations(range(total)))
    for k in (1, 5):
        expected = np.mean([any(item < right for item in order[:k]) for order in orders])
        assert retrieval.chance([row])[f"r_at_{k}"] == pytest.approx(expected)
