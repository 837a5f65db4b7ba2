"""Noisy labels: as wrong as asked, always in the same way, and nothing else touched."""

from __future__ import annotations

import numpy as np
import pytest

from cloc_mllm.data.noise import NoisyLabels
from cloc_mllm.data.records import Record
from cloc_mllm.geometry import Boxes, elementwise_iou


def _iou(noisy: NoisyLabels, clean: list[Record]) -> float:
    pairs = [
        (spoilt.box, region.box)
        for index, record in enumerate(clean)
        for spoilt, region in zip(noisy[index].regions, record.regions, strict=True)
    ]
    a, b = zip(*pairs, strict=True)
    return float(elementwise_iou(Boxes.normalized(a).xyxy, Boxes.normalized(b).xyxy).mean())


def test_boxes_and_phrases_are_wrong_to_the_chosen_degree(tiny_scenes: list[Record]) -> None:
    iou = [_iou(NoisyLabels(tiny_scenes, noise, seed=0), tiny_scenes) for noise in (0, 0.2, 0.4)]
    assert iou[0] == pytest.approx(1.0)
    assert iou[0] > iou[1] + 0.15 > iou[2] + 0.25
    noisy = NoisyLabels(tiny_scenes, 0.4, seed=0)
    changed = [
        spoilt.phrase != region.phrase
        for index, record in enumerate(tiny_scenes)
        for spoilt, region in zip(noisy[index].regions, record.regions, strict=True)
    ]
    assert np.mean(changed) == pytest.approx(0.4, abs=0.15)  # a drawn phrase may be the true one


def test_a_record_is_wrong_in_the_same_way_each_time(tiny_scenes: list[Record]) -> None:
    first, again, other = (NoisyLabels(tiny_scenes, 0.4, seed=seed) for seed in (3, 3, 4))
    assert first[5] == again[5]
    assert first[5] != other[5]
    assert first[5].captions == tiny_scenes[5].captions
    assert first[5].image == tiny_scenes[5].image
    boxes = np.array([region.box for i in range(len(first)) for region in first[i].regions])
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_an_impossible_degree_is_refused(tiny_scenes: list[Record]) -> None:
    with pytest.raises(ValueError, match=r"0\.\.1, got 1\.5"):
        NoisyLabels(tiny_scenes, 1.5, seed=0)
