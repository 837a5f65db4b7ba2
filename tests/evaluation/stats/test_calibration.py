import numpy as np
import pytest

from cloc_mllm.evaluation.stats.bootstrap import Bootstrap
from cloc_mllm.evaluation.stats.calibration import COVERAGES, calibration, selective_accuracy


def simulated(num=4000, shift=0.0, seed=0):
    """Answers that are right as often as their confidence less `shift` says."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 1.0, num)
    right = (rng.random(num) < confidence - shift).astype(float)
    return confidence, right, [f"i{index // 3}" for index in range(num)]


def naive_ece(confidence, right):
    total = 0.0
    for low in range(10):
        inside = [
            (c, r)
            for c, r in zip(confidence, right, strict=True)
            if low <= min(9, int(c * 10)) < low + 1
        ]
        if inside:
            c, r = np.mean(inside, axis=0)
            total += len(inside) * abs(c - r) / len(confidence)
    return total


@pytest.mark.parametrize("shift", [0.0, 0.2], ids=["calibrated", "overconfident"])
def test_the_error_is_what_a_plain_loop_finds(shift):
    confidence, right, image_ids = simulated(shift=shift)
    found = calibration(confidence, right, image_ids, Bootstrap(200))
    assert found.ece == pytest.approx(naive_ece(confidence, right))
    assert found.ece == pytest.approx(shift, abs=0.02)  # sampling error of 4000 answers
    assert sum(entry.n for entry in found.bins) == found.n == 4000
    inside = [entry.ci_low <= entry.confidence <= entry.ci_high for entry in found.bins]
    assert sum(inside) >= 7 if shift == 0 else not any(inside)


def test_confidence_one_is_in_the_last_bin():
    found = calibration([1.0, 1.0, 0.0], np.array([1.0, 1.0, 0.0]), list("abc"), Bootstrap(20))
    assert [(entry.low, entry.n) for entry in found.bins] == [(0.0, 1), (0.9, 2)]
    assert found.ece == 0


def test_the_most_confident_answers_are_kept():
    confidence = np.linspace(0.0, 1.0, 100)
    right = (confidence > 0.5).astype(float)
    kept = dict(zip(COVERAGES, selective_accuracy(confidence, right), strict=True))
    assert kept[0.5] == 1.0 and kept[1.0] == 0.5 and kept[0.8] == pytest.approx(50 / 80)


def test_equal_confidences_count_alike_in_any_order():
    right = np.array([1.0, 1.0, 0.0, 0.0])
    for order in ([0, 1, 2, 3], [2, 3, 0, 1], [0, 2, 1, 3]):
        assert selective_accuracy(np.full(4, 0.7), right[order]) == [0.5] * len(COVERAGES)


def test_answers_without_a_confidence_are_counted():
    found = calibration([0.9, None, float("nan")], np.ones(3), list("abc"), Bootstrap(20))
    assert (found.n, found.without_confidence) == (1, 2)
    assert calibration([None, None], np.ones(2), list("ab")) is None


def test_scores_that_are_no_probabilities_only_rank():
    found = calibration([3.0, -1.0], np.array([1.0, 0.0]), list("ab"), Bootstrap(20))
    assert (found.ece, found.bins, found.outside_0_1) == (None, [], 2)
    assert found.selective[0] == 1.0
