"""From a detector's boxes and scores to regions: what is kept, and why the rest is not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cloc_mllm.vesl.detector import Detections
from cloc_mllm.vesl.pipeline import Selected, Selection, select_regions

QUERIES = ["a crab", "a clock", "a key"]
LEFT = [0.1, 0.1, 0.4, 0.5]
LEFT_MOVED = [0.12, 0.1, 0.42, 0.5]  # IoU with LEFT 0.875
RIGHT = [0.6, 0.2, 0.9, 0.8]


def _select(
    *found: tuple[list[float], list[float]], threshold: float = 0.1, nms_iou: float = 0.5
) -> Selected:
    boxes, scores = zip(*found, strict=True)
    detections = Detections(torch.tensor(boxes), torch.tensor(scores))
    return select_regions(QUERIES, detections, Selection(threshold, nms_iou), (200, 100))


def test_a_box_takes_its_most_confident_phrase() -> None:
    selected = _select((LEFT, [0.2, 0.7, 0.3]), (RIGHT, [0.9, 0.1, 0.8]))
    assert [(r.phrase, round(r.score, 4)) for r in selected.regions] == [
        ("a crab", 0.9),
        ("a clock", 0.7),
    ]
    assert selected.regions[0].box == pytest.approx(RIGHT)
    assert selected.dropped == [("a key", "outscored")]
    assert +selected.boxes == Counter(kept=2)


@pytest.mark.parametrize(
    ("score", "num_kept"), [(0.0999, 0), (0.1, 1), (0.5, 1), (float("nan"), 0)], ids=str
)
def test_the_threshold_is_the_smallest_confidence(score: float, num_kept: int) -> None:
    detections = Detections(
        torch.tensor([LEFT], dtype=torch.float64), torch.tensor([[score]], dtype=torch.float64)
    )
    selected = select_regions(["a crab"], detections, Selection(), (200, 100))
    assert len(selected.regions) == num_kept
    assert selected.dropped == ([] if num_kept else [("a crab", "below_threshold")])
    assert selected.boxes["below_threshold"] == 1 - num_kept


def test_overlapping_boxes_of_one_phrase_become_the_best_one() -> None:
    selected = _select((LEFT, [0.5, 0, 0]), (LEFT_MOVED, [0.8, 0, 0]), (RIGHT, [0.6, 0, 0]))
    assert [round(r.score, 4) for r in selected.regions] == [0.8, 0.6]
    assert +selected.boxes == Counter(kept=2, suppressed=1)


def test_overlapping_boxes_of_two_phrases_both_stay() -> None:
    selected = _select((LEFT, [0.5, 0, 0]), (LEFT_MOVED, [0, 0.8, 0]))
    assert [r.phrase for r in selected.regions] == ["a clock", "a crab"]


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([1.1, 0.1, 1.4, 0.5], "outside"),  # OWLv2's grey padding
        ([0.8, 0.1, 1.4, 0.5], "mostly_outside"),
        ([0.5, 0.1, 0.504, 0.5], "too_small"),  # 0.8 of 200 px
        ([0.5, 0.1, 0.5, 0.5], "zero_area"),
        ([0.5, 0.1, 0.4, 0.5], "inverted"),
        ([float("nan"), 0.1, 0.4, 0.5], "not_finite"),
    ],
)
def test_a_box_that_no_record_may_hold(box: list[float], reason: str) -> None:
    selected = _select((box, [0.9, 0, 0]), (LEFT, [0.05, 0.5, 0]))
    assert [r.phrase for r in selected.regions] == ["a clock"]
    assert +selected.boxes == Counter({"kept": 1, reason: 1})
    assert ("a crab", "unusable_box") in selected.dropped


def test_a_box_that_sticks_out_a_little_is_clipped() -> None:
    (region,) = _select(([-0.1, 0.2, 0.5, 1.05], [0.9, 0, 0])).regions
    assert region.box == pytest.approx((0.0, 0.2, 0.5, 1.0))


def test_every_box_and_every_phrase_is_accounted_for() -> None:
    torch.manual_seed(0)
    corners = torch.rand(300, 2)
    detections = Detections(
        torch.cat([corners, corners + 0.6 * torch.rand(300, 2)], dim=1), torch.rand(300, 40) ** 40
    )
    queries = [f"phrase {index}" for index in range(40)]
    selected = select_regions(queries, detections, Selection(0.6), (640, 480))
    assert selected.boxes.total() == 300
    assert selected.boxes["kept"] == len(selected.regions)
    carried = {region.phrase for region in selected.regions}
    dropped = [item.phrase for item in selected.dropped]
    assert sorted([*carried, *dropped]) == sorted(queries)
    assert len({item.reason for item in selected.dropped}) > 1


def test_no_box_at_all() -> None:
    nothing = Detections(torch.empty(0, 4), torch.empty(0, 3))
    selected = select_regions(QUERIES, nothing, Selection(), (200, 100))
    assert selected.regions == []
    assert {item.reason for item in selected.dropped} == {"below_threshold"}


@pytest.mark.parametrize(("threshold", "nms_iou"), [(-0.1, 0.5), (1.1, 0.5), (0.1, 0), (0.1, 1.1)])
def test_settings_out_of_range(threshold: float, nms_iou: float) -> None:
    with pytest.raises(ValueError, match="threshold must lie in"):
        Selection(threshold, nms_iou)
