"""Each scorer against a naive oracle, on perfect answers, and on answers that cannot be read."""

import itertools

import numpy as np
import pytest

from cloc_mllm.evaluation import grounding, rec, referring, region_classification, retrieval
from cloc_mllm.evaluation.rows.rows import PredictionRow, ReferenceRow, ScoredPair

BOX, OTHER = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)


def pair(prediction=None, *, image_id="i1", task="t", **reference):
    return ScoredPair(
        PredictionRow(id="q", image_id=image_id, task=task, **(prediction or {})),
        ReferenceRow(id="q", image_id=image_id, task=task, **reference),
    )


def means(scores):
    return {name: metric.mean() for name, metric in scores.items()}


def test_macro_accuracy_weighs_classes_equally():
    pairs = [
        pair({"labels": ["crab", "dog"]}, labels=["crab"]),
        pair({"labels": ["crab", "dog"]}, labels=["crab"]),
        pair({"labels": ["dog", "crab"]}, labels=["crab"]),
        pair({"labels": ["crab", "dog"]}, labels=["dog"]),
        pair({"labels": [*"abcdef", "owl"]}, labels=["owl"]),
    ]
    # crab 2/3, dog 0/1, owl 0/1
    assert means(region_classification.score(pairs)) == pytest.approx(
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
    actual = means(region_classification.score(pairs))
    assert actual["macro_acc"] == pytest.approx(sum(share.values()) / 3)
    assert actual["macro_acc/frequent"] == pytest.approx((share["crab"] + share["dog"]) / 2)
    assert actual["micro_acc/frequent"] == pytest.approx(np.mean(right["crab"] + right["dog"]))
    assert actual["macro_acc/rare"] == actual["micro_acc/rare"] == pytest.approx(share["owl"])
    assert len(actual) == 3 + 2 * 2


def test_chance_of_classification_is_one_in_the_number_of_names():
    rows = [ReferenceRow("q", "i", "t", labels=["a"], num_candidates=n) for n in (3, 20)]
    assert region_classification.chance(rows) == pytest.approx(
        {"macro_acc": (1 / 3 + 1 / 20) / 2, "micro_acc": (1 / 3 + 1 / 20) / 2, "top5_acc": 0.625}
    )


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


def test_box_answer_counts_its_closest_true_box_and_only_its_first():
    pairs = [
        pair({"boxes": [OTHER]}, boxes=[BOX, OTHER]),
        pair({"boxes": [OTHER, BOX]}, boxes=[BOX]),
        pair({"boxes": [(0.1, 0.1, 0.5, 0.31)]}, boxes=[BOX]),
        pair({"boxes": [BOX]}, boxes=[BOX]),
    ]
    np.testing.assert_allclose(grounding.answer_iou(pairs), [1, 0, 0.525, 1])
    assert means(grounding.score(pairs)) == pytest.approx(
        {"acc_at_0_5": 0.75, "mean_iou": 2.525 / 4}
    )


def test_best_iou_equals_a_double_loop():
    rng = np.random.default_rng(0)

    def boxes(count):
        corners = np.sort(rng.random((count, 2, 2)), axis=1)
        return [tuple(map(float, corner.reshape(4))) for corner in corners]

    def iou(a, b):
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - width * height
        return width * height / union

    answers = boxes(40)
    truths = [boxes(int(rng.integers(1, 4))) for _ in answers]
    rows = [ReferenceRow("q", "i", "t", boxes=group) for group in truths]
    expected = [max(iou(a, b) for b in group) for a, group in zip(answers, truths, strict=True)]
    np.testing.assert_allclose(grounding.best_iou(answers, rows), expected)


@pytest.mark.parametrize(
    "prediction",
    [
        {"failure": "not_a_box", "raw_text": "a crab"},
        {"raw_text": ""},
        {"failure": "several", "boxes": [BOX]},
        {"boxes": [(0.5, 0.5, 0.1, 0.1)]},
        {"boxes": [(0.1, 0.1, 0.1, 0.5)]},
    ],
    ids=["unreadable", "no box", "failed with a box", "inverted", "zero area"],
)
def test_unusable_box_answers_are_wrong_not_left_out(prediction):
    pairs = [pair(prediction, boxes=[BOX], kind="size"), pair({"boxes": [BOX]}, boxes=[BOX])]
    for scores in (grounding.score(pairs), rec.score(pairs)):
        assert scores["acc_at_0_5"].mean() == scores["mean_iou"].mean() == 0.5
        assert len(scores["acc_at_0_5"].values) == 2
    assert rec.score(pairs)["acc_at_0_5/size"].mean() == 0


def test_free_answers_show_what_a_model_must_beat():
    half, same = (0.0, 0.0, 1.0, 0.5), (0.2, 0.2, 0.4, 0.4)
    rows = [
        ReferenceRow("a", "i1", "t", boxes=[half]),
        ReferenceRow("b", "i2", "t", boxes=[same]),
        ReferenceRow("c", "i3", "t", boxes=[same]),
    ]
    assert grounding.whole_image(rows) == pytest.approx(
        {"acc_at_0_5": 1 / 3, "mean_iou": (0.5 + 0.04 + 0.04) / 3}
    )
    # b and c get each other's box (IoU 1) or a's in half of the draws, a never gets a right one
    assert grounding.chance(rows)["acc_at_0_5"] == pytest.approx(1 / 3, abs=0.1)
    assert grounding.chance(rows[:1]) == {}


def test_rec_breaks_down_by_kind():
    pairs = [
        pair({"boxes": [BOX]}, boxes=[BOX], kind="size"),
        pair({"boxes": [OTHER]}, boxes=[BOX], kind="size"),
        pair({"boxes": [(0.1, 0.1, 0.5, 0.4)]}, boxes=[BOX], kind="unique", image_id="i2"),
    ]
    assert means(rec.score(pairs)) == pytest.approx(
        {
            "acc_at_0_5": 2 / 3,
            "acc_at_0_7": 2 / 3,
            "acc_at_0_9": 1 / 3,
            "mean_iou": 1.75 / 3,
            "acc_at_0_5/size": 1 / 2,
            "acc_at_0_5/unique": 1,
        }
    )
    assert rec.score(pairs)["acc_at_0_5/unique"].image_ids == ["i2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red crab.", "red crab"),
        ("  a   CRAB! ", "crab"),
        ("an", "an"),
        ("theatre", "theatre"),
        ("t-shirt", "t shirt"),
        ("...", ""),
    ],
)
def test_normalise(text, expected):
    assert referring.normalise(text) == expected


def test_referring_takes_any_phrase_and_no_substring():
    pairs = [
        pair({"raw_text": "A crab."}, labels=["lobster", "the crab"]),
        pair({"raw_text": "cat"}, labels=["catalog"]),
        pair({"raw_text": "red crab"}, labels=["crab"]),
        pair({"raw_text": "crab", "failure": "too_long"}, labels=["crab"]),
        pair({"raw_text": " . "}, labels=["crab"]),
    ]
    scores = referring.score(pairs)
    np.testing.assert_allclose(scores["exact_match"].values, [1, 0, 0, 0, 0])
    np.testing.assert_allclose(scores["word_f1"].values, [1, 0, 2 / 3, 0, 0])
    assert [referring.is_failure(item) for item in pairs] == [False] * 3 + [True] * 2
