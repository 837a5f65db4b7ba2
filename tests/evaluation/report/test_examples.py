import numpy as np
import pytest

from cloc_mllm.evaluation.report.examples import choose_examples


@pytest.mark.parametrize("count", [1, 2, 4, 30])
def test_examples_are_best_worst_and_others_without_repetition(count):
    scores = np.random.default_rng(0).permutation(np.linspace(0, 1, count))
    groups = choose_examples(scores, 6, seed=0)
    chosen = [index for group in groups.values() for index in group]
    assert len(chosen) == len(set(chosen)) == min(count, 18)
    if count == 30:
        order = np.argsort(-scores)
        assert groups["Best"] == order[:6].tolist()
        assert groups["Worst"] == order[::-1][:6].tolist()
        assert len(groups["Random others"]) == 6


def test_surprising_are_confident_errors_and_unsure_hits():
    rng = np.random.default_rng(0)
    scores, confidence = (rng.random(60) < 0.5).astype(float), rng.random(60)
    confidence[:5] = np.nan
    groups = choose_examples(scores, 4, seed=0, confidence=confidence)
    wrong = [i for i in np.argsort(-confidence[5:]) + 5 if scores[i] == 0]
    right = [i for i in np.argsort(confidence[5:]) + 5 if scores[i] == 1]
    assert groups["Surprising: confident and wrong"] == wrong[:4]
    assert groups["Surprising: unsure and right"] == right[:4]
    chosen = [index for group in groups.values() for index in group]
    assert len(chosen) == len(set(chosen)) == 5 * 4
    assert "Surprising: unsure and right" not in choose_examples(scores, 4, 0, np.full(60, np.nan))


def test_a_task_with_one_score_shows_different_examples_by_seed():
    scores = np.ones(50)
    assert choose_examples(scores, 6, seed=0) != choose_examples(scores, 6, seed=1)
