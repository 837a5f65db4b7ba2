"""Scenes in words: the right name and box in each cell, and codes that can be read back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cloc_mllm.data.records import Record, Region
from cloc_mllm.mllm import ClocMllmProcessor, build_mllm
from cloc_mllm.mllm.scene_tokens import embed_boxes, embed_scene, scene_targets
from cloc_mllm.models.position import sinusoidal_code

TOP_LEFT, BOTTOM_RIGHT = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)


@pytest.fixture
def processor(mllm_config) -> ClocMllmProcessor:
    return build_mllm(mllm_config)[1]  # a canvas of 64 pixels, 4 x 4 tokens


def record(*regions: Region, width: int = 100, height: int = 100) -> Record:
    return Record("r", b"", width, height, [], list(regions), "test")


def names_of(targets, processor, row: torch.Tensor) -> list[str]:
    name_ids = [
        ids[weights > 0]
        for ids, weights in zip(targets.name_ids, targets.name_weights, strict=True)
    ]
    return [processor.tokenizer.decode(name_ids[index]).strip() for index in row.tolist()]


def test_cells_name_what_covers_them(processor) -> None:
    crab, clock = Region(TOP_LEFT, "red crab"), Region(BOTTOM_RIGHT, "clock")
    targets = scene_targets(processor, [record(crab, clock)], [[clock]])
    names = names_of(targets, processor, targets.cell_names[0])
    nothing = "nothing"
    assert names == [
        *("red crab", "red crab", nothing, nothing),
        *("red crab", "red crab", nothing, nothing),
        *(nothing, nothing, "clock", "clock"),
        *(nothing, nothing, "clock", "clock"),
    ]
    assert targets.cell_boxes[0, 0].tolist() == list(TOP_LEFT)
    assert targets.cell_boxes[0, 2].tolist() == [0.5, 0.0, 0.75, 0.25]  # the empty cell's own
    assert names_of(targets, processor, targets.region_names) == ["clock"]
    assert targets.region_boxes.tolist() == [list(BOTTOM_RIGHT)]


def test_boxes_are_of_the_original_image_not_of_the_canvas(processor) -> None:
    wide = record(Region((0.0, 0.0, 0.5, 1.0), "crab"), width=100, height=50)
    targets = scene_targets(processor, [wide], [[]])
    names = names_of(targets, processor, targets.cell_names[0])
    assert [index for index, name in enumerate(names) if name == "crab"] == [4, 5, 8, 9]
    assert targets.cell_boxes[0, 4].tolist() == [0.0, 0.0, 0.5, 1.0]


def test_the_later_of_two_things_is_on_top(processor) -> None:
    scene = record(Region((0, 0, 1, 1), "wall"), Region(TOP_LEFT, "crab"))
    targets = scene_targets(processor, [scene], [[]])
    assert names_of(targets, processor, targets.cell_names[0])[:3] == ["crab", "crab", "wall"]


def test_box_codes_tell_boxes_and_coordinates_apart() -> None:
    torch.manual_seed(0)
    location = sinusoidal_code(torch.linspace(0, 1, 100)[:, None], 128)
    boxes = torch.rand(300, 4)
    near = (boxes + 0.01 * torch.randn_like(boxes)).clamp(0, 1)
    swapped = boxes[:, [1, 0, 3, 2]]
    candidates = embed_boxes(torch.cat([boxes, swapped]), location)
    closest = torch.cdist(embed_boxes(near, location), candidates).argmin(1)
    # about one box in a hundred looks more like another one with its coordinates swapped
    assert (closest == torch.arange(300)).float().mean() > 0.95


def test_scene_tokens_are_names_plus_boxes(processor) -> None:
    crab = Region(TOP_LEFT, "red crab")
    targets = scene_targets(processor, [record(crab)], [[crab]])
    torch.manual_seed(0)
    embeddings = nn.Embedding(len(processor.tokenizer), 32)
    location_ids = torch.tensor(
        processor.tokenizer.convert_tokens_to_ids(processor.coordinates.tokens())
    )
    cells, regions = embed_scene(targets, embeddings, location_ids)
    expected = embeddings(torch.tensor(processor.tokenize("red crab"))).mean(0) + embed_boxes(
        torch.tensor(TOP_LEFT), embeddings(location_ids)
    )
    torch.testing.assert_close(regions, expected[None])
    torch.testing.assert_close(cells[0, 0], expected)
    assert not torch.allclose(cells[0, 3], expected)
