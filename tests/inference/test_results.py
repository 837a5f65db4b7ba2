"""Conversions of the results of the predictors."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cloc_mllm.geometry import Boxes
from cloc_mllm.inference.results import GroundingResult


@pytest.fixture
def result() -> GroundingResult:
    """Two crabs, no zeppelin, a clock."""
    return GroundingResult(
        Image.new("RGB", (100, 50), "teal"),
        Boxes.normalized([[0.1, 0.2, 0.5, 0.6], [0, 0, 0.2, 0.2], [0.5, 0.5, 1, 1]], (100, 50)),
        torch.tensor([0.9, 0.8, 0.7]),
        ["crab", "crab", "clock"],
        ["two boxes", "not in the image", "a box"],
        torch.tensor([0, 0, 2]),
        [None, "not_there", None],
    )


def test_queries_are_counted_indexed_and_iterated(result: GroundingResult) -> None:
    crabs, zeppelin, clock = result
    assert len(result) == 3 and (len(crabs), len(crabs.boxes)) == (1, 2)
    assert crabs.labels == ["crab", "crab"] and crabs.text == ["two boxes"]
    assert torch.equal(crabs.scores, torch.tensor([0.9, 0.8]))
    assert len(zeppelin.boxes) == 0 and zeppelin.failures == ["not_there"]
    assert clock.query_index.tolist() == [0]
    assert clock.boxes.to_pixels().xyxy.tolist() == [[50, 25, 100, 50]]
    assert result[-1].labels == ["clock"]
    with pytest.raises(IndexError):
        result[3]


def test_drawing_is_no_smaller_than_a_label_needs(result: GroundingResult) -> None:
    drawn = result.draw()
    assert drawn.size == (640, 320)
    assert (214, 39, 40) in {drawn.getpixel((x, 100)) for x in range(60, 70)}  # left edge, 10 px
    assert result.draw(long_side=200).size == (200, 100)
    large = GroundingResult(
        Image.new("RGB", (3000, 30)), Boxes.normalized([], (3000, 30)), *_nothing()
    )
    assert large.draw().size == (1600, 16)


def test_coco_rows(result: GroundingResult) -> None:
    rows = result.to_coco(image_id=7)
    assert rows[0] == {
        "image_id": 7,
        "category_name": "crab",
        "bbox": pytest.approx([10, 10, 40, 20]),
        "score": pytest.approx(0.9),
    }
    assert [row["category_name"] for row in rows] == ["crab", "crab", "clock"]


def check_detections(detections: Any) -> None:
    expected = [[10, 10, 50, 30], [0, 0, 20, 10], [50, 25, 100, 50]]
    np.testing.assert_allclose(detections.xyxy, expected, rtol=1e-6)
    np.testing.assert_allclose(detections.confidence, [0.9, 0.8, 0.7], rtol=1e-6)
    assert detections.xyxy.dtype == detections.confidence.dtype == np.float32
    assert detections.class_id.tolist() == [0, 0, 1]
    assert detections.data["class_name"].tolist() == ["crab", "crab", "clock"]
    assert detections.data["query_index"].tolist() == [0, 0, 2]


def test_supervision_takes_it(result: GroundingResult) -> None:
    supervision = pytest.importorskip("supervision")
    detections = result.to_supervision()
    assert isinstance(detections, supervision.Detections)
    check_detections(detections)
    assert detections[detections.class_id == 1].data["class_name"].tolist() == ["clock"]
    empty = GroundingResult(result.image, Boxes.normalized([], (100, 50)), *_nothing())
    assert len(empty.to_supervision()) == 0
    supervision.BoxAnnotator().annotate(np.asarray(result.image).copy(), detections)


def test_the_fields_of_supervision(
    result: GroundingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for supervision, whose `Detections` is a dataclass with these fields (0.31)."""
    module = ModuleType("supervision")
    module.Detections = lambda **fields: type("Detections", (), fields)
    monkeypatch.setitem(sys.modules, "supervision", module)
    check_detections(result.to_supervision())


def test_without_supervision_one_line_says_what_to_do(
    result: GroundingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match=r"run: pip install supervision$"):
        result.to_supervision()


def _nothing() -> tuple[Any, ...]:
    return torch.zeros(0), [], [], torch.zeros(0, dtype=torch.long), []
