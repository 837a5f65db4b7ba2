import numpy as np
import pytest

from cloc_mllm.evaluation.rows.rows import ReferenceRow
from cloc_mllm.evaluation.scores import classification
from tests.evaluation.helpers import means, pair


def test_macro_accuracy_weighs_classes_equally():
    pairs = [
        pair({"labels": ["crab", "dog"]}, labels=["crab"]),
        pair({"labels": ["crab", "dog"]}, labels=["crab"]),
        pair({"labels": ["dog", "crab"]}, labels=["crab"]),
        pair({"labels": ["crab", "dog"]}, labels=["dog"]),
        pair({"labels": [*"abcdef", "owl"]}, labels=["owl"]),
    ]
    # crab 2/3, dog 0/1, owl 0/1
    assert means(classification.score(pairs)) == pytest.approx(
        {"macro_acc": 2 / 9, "micro_acc": 2 / 5, "top5_acc": 4 / 5}
    )


def test_bands_are_scored_alone_and_together():
    rng = np.random.default_rng(0)
    band_of = {"crab": "frequent", "dog": "frequent", "owl": "rare"}
    names = list(band_of)
    truths = [names[i] for i in rng.integers(3, size=60)]
    answers = [names[i] for i in rng.integers(3, size=60)]
    pairs = [
        pair({"labels": [answer]}, labels=[truth], kind=band_of[truth])
        for answer, truth in zip(answers, truths, strict=True)
    ]
    right = {name: [] for name in names}
    for answer, truth in zip(answers, truths, strict=True):
        right[truth].append(answer == truth)
    share = {name: sum(hits) / len(hits) for name, hits in right.items()}
    actual = means(classification.score(pairs))
    assert actual["macro_acc"] == pytest.approx(sum(share.values()) / 3)
    assert actual["macro_acc/frequent"] == pytest.approx((share["crab"] + share["dog"]) / 2)
    assert actual["micro_acc/frequent"] == pytest.approx(np.mean(right["crab"] + right["dog"]))
    assert actual["macro_acc/rare"] == actual["micro_acc/rare"] == pytest.approx(share["owl"])
    assert len(actual) == 3 + 2 * 2


def test_chance_of_classification_is_one_in_the_number_of_names():
    rows = [ReferenceRow("q", "i", "t", labels=["a"], num_candidates=n) for n in (3, 20)]
    assert classification.chance(rows) == pytest.approx(
        {"macro_acc": (1 / 3 + 1 / 20) / 2, "micro_acc": (1 / 3 + 1 / 20) / 2, "top5_acc": 0.625}
    )
