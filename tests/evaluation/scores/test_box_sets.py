"""F1 of answers of any number of boxes, against a plain count and against worked cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou

from cloc_mllm.evaluation.scores.box_sets import f1
from cloc_mllm.evaluation.stats.overlap import paired_giou, paired_iou

A, B, C = (0.0, 0.0, 0.2, 0.2), (0.4, 0.4, 0.6, 0.6), (0.8, 0.8, 1.0, 1.0)
NEAR_A = (0.0, 0.0, 0.2, 0.15)  # IoU 0.75 with A


@pytest.mark.parametrize(
    ("answered", "true", "expected"),
    [
        ([A], [A], 1),
        ([B, A], [A, B], 1),
        ([A], [A, B], 2 / 3),
        ([A, B, C], [A], 1 / 2),
        ([C], [A], 0),
        ([], [A], 0),
        ([A], [], 0),
        ([], [], 1),
        ([A, NEAR_A], [A], 2 / 3),  # a true box counts once
        ([NEAR_A, A], [A, NEAR_A], 1),
        ([(0.2, 0.2, 0.1, 0.1)], [A], 0),  # an inverted answer covers nothing
    ],
)
def test_worked_cases(answered: list, true: list, expected: float) -> None:
    assert f1(answered, true) == pytest.approx(expected)


def test_giou_asks_for_more_than_iou() -> None:
    shifted = (0.05, 0.05, 0.25, 0.25)
    half = (0.0, 0.0, 0.2, 0.1)  # IoU 0.5 and GIoU 0.5: all of the box around both is covered
    corner = (0.055, 0.0, 0.255, 0.2)
    for box in (shifted, half, corner):
        assert f1([box], [A], giou=True) <= f1([box], [A])
    wide = (0.02, 0.055, 0.24, 0.255)
    iou, giou = (
        overlap(np.array([wide]), np.array([A]))[0] for overlap in (paired_iou, paired_giou)
    )
    assert giou < 0.5 and (f1([wide], [A], giou=True), f1([wide], [A])) == (0, float(iou >= 0.5))


def test_pairs_are_taken_from_the_largest_overlap_down() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sets = []
        for size in rng.integers(1, 5, 2):
            corners = rng.uniform(0, 0.4, (size, 2))
            sets.append([tuple(box) for box in np.hstack([corners, corners + 0.5])])
        answered, true = sets
        pairs = sorted(
            itertools.product(range(len(answered)), range(len(true))),
            key=lambda p: -paired_iou(np.array([answered[p[0]]]), np.array([true[p[1]]]))[0],
        )
        used_a, used_t, hits = set(), set(), 0
        for a, t in pairs:
            overlap = paired_iou(np.array([answered[a]]), np.array([true[t]]))[0]
            if overlap >= 0.5 and a not in used_a and t not in used_t:
                used_a.add(a)
                used_t.add(t)
                hits += 1
        missed, invented = len(true) - hits, len(answered) - hits
        assert f1(answered, true) == pytest.approx(2 * hits / (2 * hits + missed + invented))


def test_giou_is_torchvisions() -> None:
    rng = np.random.default_rng(1)
    boxes = [np.hstack([c, c + rng.uniform(0.1, 0.5, (50, 2))]) for c in rng.random((2, 50, 2))]
    expected = generalized_box_iou(*map(torch.tensor, boxes)).diagonal().numpy()
    np.testing.assert_allclose(paired_giou(*boxes), expected, rtol=1e-12, atol=1e-12)
