from __future__ import annotations

import numpy as np
import pytest

from cloc_mllm.evaluation.scores.binary import auroc, best_threshold, binary_scores
from cloc_mllm.evaluation.stats.bootstrap import Bootstrap, bootstrap_interval


def test_precision_recall_f1_equal_the_counts() -> None:
    rng = np.random.default_rng(0)
    said, true = rng.random(200) < 0.4, rng.random(200) < 0.5
    tp, fp, fn = (said & true).sum(), (said & ~true).sum(), (~said & true).sum()
    actual = {k: v.mean() for k, v in binary_scores(said, true, list("ab" * 100)).items()}
    expected = {"precision": tp / (tp + fp), "recall": tp / (tp + fn), "f1": 2 * tp}
    expected["f1"] /= 2 * tp + fp + fn
    assert actual == pytest.approx(expected)


def test_what_no_query_counts_in_is_left_out() -> None:
    nothing, all_true = np.zeros(2, bool), np.ones(2, bool)
    assert set(binary_scores(nothing, all_true, ["a", "b"])) == {"recall", "f1"}
    assert set(binary_scores(nothing, nothing, ["a", "b"])) == set()


def test_auroc_counts_won_pairs() -> None:
    rng = np.random.default_rng(0)
    positive = rng.random(60) < 0.4
    confidences = np.round(rng.normal(positive, 1.0), 1)  # with ties
    confidences[7] = -np.inf
    pairs = [(p, n) for p in confidences[positive] for n in confidences[~positive]]
    expected = np.mean([(p > n) + 0.5 * (p == n) for p, n in pairs])
    actual = auroc(confidences, positive, [str(i) for i in range(60)])
    assert actual is not None and actual.mean() == pytest.approx(expected)
    assert auroc(confidences, np.ones(60, bool), ["i"] * 60) is None


def test_interval_of_the_auroc_is_delongs() -> None:
    rng = np.random.default_rng(1)
    positive = np.arange(400) < 150
    confidences = rng.normal(positive * 1.0, 1.0)
    scores = auroc(confidences, positive, [str(i) for i in range(400)])
    assert scores is not None
    interval = bootstrap_interval(scores, Bootstrap(1000))
    areas = []
    for _ in range(500):  # the plain way: resample queries, count again
        drawn = rng.integers(400, size=400)
        again = auroc(confidences[drawn], positive[drawn], ["i"] * 400)
        areas.append(again.mean() if again else np.nan)
    low, high = np.nanquantile(areas, [0.025, 0.975])
    # both are estimates from some hundred draws; without the stretch the interval is half as wide
    assert interval.ci_high - interval.ci_low == pytest.approx(high - low, rel=0.15)


@pytest.mark.parametrize(
    ("confidences", "positive", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 0.5),
        ([0.1, 0.5, 0.3, 0.9], [0, 0, 1, 1], 0.2),
        ([0.1, 0.2, 0.3, 0.4], [1, 1, 0, 0], 0.1),
    ],
)
def test_the_threshold_has_the_best_balanced_accuracy(confidences, positive, expected) -> None:
    actual = best_threshold(np.array(confidences), np.array(positive, bool))
    assert actual == pytest.approx(expected)


def test_no_other_threshold_is_better() -> None:
    rng = np.random.default_rng(2)
    positive = rng.random(80) < 0.3
    confidences = np.round(rng.normal(positive * 0.7, 1.0), 1)

    def balanced(threshold: float) -> float:
        called = confidences >= threshold
        return float(called[positive].mean() + (~called[~positive]).mean())

    actual = balanced(best_threshold(confidences, positive))
    assert actual == pytest.approx(max(map(balanced, np.arange(-5, 5, 0.01))))
    with pytest.raises(ValueError, match="needs positive and negative examples"):
        best_threshold(confidences, np.ones(80, bool))
