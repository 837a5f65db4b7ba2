"""Box answers against a naive oracle, on perfect answers, and on answers that cannot be read."""

import numpy as np
import pytest

from cloc_mllm.evaluation.rows.rows import ReferenceRow
from cloc_mllm.evaluation.scores import boxes
from cloc_mllm.evaluation.tasks import rec
from tests.evaluation.helpers import means, pair

BOX, OTHER = (0.1, 0.1, 0.5, 0.5), (0.6, 0.6, 0.9, 0.9)


def test_box_answer_counts_its_closest_true_box_and_only_its_first():
    pairs = [
        pair({"boxes": [OTHER]}, boxes=[BOX, OTHER]),
        pair({"boxes": [OTHER, BOX]}, boxes=[BOX]),
        pair({"boxes": [(0.1, 0.1, 0.5, 0.31)]}, boxes=[BOX]),
        pair({"boxes": [BOX]}, boxes=[BOX]),
    ]
    np.testing.assert_allclose(boxes.answer_iou(pairs), [1, 0, 0.525, 1])
    assert means(boxes.score(pairs)) == pytest.approx({"acc_at_0_5": 0.75, "mean_iou": 2.525 / 4})


def test_best_iou_equals_a_double_loop():
    rng = np.random.default_rng(0)

    def random_boxes(count):
        corners = np.sort(rng.random((count, 2, 2)), axis=1)
        return [tuple(map(float, corner.reshape(4))) for corner in corners]

    def iou(a, b):
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - width * height
        return width * height / union

    answers = random_boxes(40)
    truths = [random_boxes(int(rng.integers(1, 4))) for _ in answers]
    rows = [ReferenceRow("q", "i", "t", boxes=group) for group in truths]
    expected = [max(iou(a, b) for b in group) for a, group in zip(answers, truths, strict=True)]
    np.testing.assert_allclose(boxes.best_iou(answers, rows), expected)


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
    for scores in (boxes.score(pairs), rec.score(pairs)):
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
    assert boxes.whole_image(rows) == pytest.approx(
        {"acc_at_0_5": 1 / 3, "mean_iou": (0.5 + 0.04 + 0.04) / 3}
    )
    # b and c get each other's box (IoU 1) or a's in half of the draws, a never gets a right one
    assert boxes.chance(rows)["acc_at_0_5"] == pytest.approx(1 / 3, abs=0.1)
    assert boxes.chance(rows[:1]) == {}
