"""Points, scribbles, masks and sets of boxes as masks: where they should be, and in the batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cloc_mllm.data.collate import ClocCollator
from cloc_mllm.data.records import Record
from cloc_mllm.data.shapes import MASK_SIZE, SHAPE_KINDS, ShapeKind, boxes_mask, sample_shape
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.geometry import CanvasTransform
from cloc_mllm.models.position import mask_boxes

BOX = (0.25, 0.5, 0.75, 0.9)


@pytest.mark.parametrize("kind", SHAPE_KINDS)
def test_a_shape_lies_in_its_box(kind: ShapeKind) -> None:
    areas = []
    for seed in range(50):
        mask = sample_shape(kind, BOX, np.random.default_rng(seed))
        x1, y1, x2, y2 = mask_boxes(mask[None])[0].tolist()
        pixel = 1 / MASK_SIZE
        assert x1 >= BOX[0] - pixel and y1 >= BOX[1] - pixel
        assert x2 <= BOX[2] + pixel and y2 <= BOX[3] + pixel
        areas.append(float(mask.mean()))
    box_area = 0.5 * 0.4
    low, high = {"point": (0, 0.01), "scribble": (0.01, 0.2), "mask": (0.3, 0.9)}[kind]
    assert low < np.mean(areas) / box_area < high


def test_several_boxes_are_one_mask() -> None:
    mask = boxes_mask([(0.0, 0.0, 0.25, 0.25), (0.5, 0.5, 1.0, 0.75)])
    assert mask_boxes(mask[None])[0].tolist() == [0, 0, 1, pytest.approx(0.75, abs=0.02)]
    assert mask[MASK_SIZE // 8, MASK_SIZE // 8] == 1 and mask[MASK_SIZE // 8, -1] == 0


def test_a_mask_moves_with_the_picture() -> None:
    """A point at the far corner of a wide picture stays where its box goes, mirrored too."""
    mask = torch.zeros(30, 60)
    mask[29, 59] = 1
    for flip in (False, True):
        transform = CanvasTransform(60, 30, 32, flip)
        rows, columns = transform.mask_to_canvas(mask).nonzero(as_tuple=True)
        assert rows.tolist() == [23] and columns.tolist() == [0 if flip else 31]


def test_a_share_of_the_regions_gets_a_mask_where_the_box_is(tiny_scenes: list[Record]) -> None:
    collate = ClocCollator(
        load_text_tokenizer("builtin", 24), Preprocessing(64), 4, free_form_share=0.5
    )
    batch = collate(list(enumerate(tiny_scenes)))
    assert 0.3 < len(batch.masked_regions) / len(batch.boxes) < 0.7
    assert len(batch.masked_regions) == len(batch.region_masks)
    inside = mask_boxes(batch.region_masks) - batch.boxes[batch.masked_regions]
    assert inside[:, :2].min() > -0.05 and inside[:, 2:].max() < 0.05
    assert batch.to("cpu").masked_regions.equal(batch.masked_regions)


def test_regions_of_one_phrase_are_prompted_together(tiny_scenes: list[Record]) -> None:
    record = next(record for record in tiny_scenes if len(record.regions) > 1)
    pair = [dataclasses.replace(region, group="both") for region in record.regions[:2]]
    collate = ClocCollator(
        load_text_tokenizer("builtin", 24), Preprocessing(64), 4, free_form_share=1.0
    )
    batch = collate([(0, dataclasses.replace(record, regions=pair))])
    joint = torch.cat([batch.boxes[:, :2].amin(0), batch.boxes[:, 2:].amax(0)])
    torch.testing.assert_close(
        mask_boxes(batch.region_masks), joint.expand(2, 4), atol=0.04, rtol=0
    )
