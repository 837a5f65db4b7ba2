"""Writes scenes in the language model's own words: per image token, what lies there and its box.

A scene token is the mean embedding of a thing's name plus a code of its box, made of the location
tokens' embeddings. The small language model is pre-trained on such scenes, without pictures; the
alignment before stage 2 then teaches the projectors to write them from a picture.

Letters: B scenes, N image tokens, R regions (packed), P distinct names, W tokens of a name,
H width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from cloc_mllm.data.records import Record, Region
from cloc_mllm.geometry import CANVAS, Boxes
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.models.position import cell_coverage, token_cells

NOTHING = "nothing"  # the name of what no region covers
_MIN_COVERAGE = 0.35  # share of an image token's cell that a thing must cover to be named there


@dataclass
class SceneTargets:
    """The targets of the tokens of a batch of scenes.

    Attributes:
        name_ids: int64[P, W] tokens of each distinct name; name_weights: float[P, W], 1 over the
            number of its tokens, 0 on padding.
        cell_names: int64[B, N], the row of `name_ids` of each cell.
        cell_boxes: float[B, N, 4], normalised to the original image: the thing's box, or the cell's
            own if nothing is there.
        region_names, region_boxes: the same for the asked regions, int64[R] and float[R, 4].
    """

    name_ids: Tensor
    name_weights: Tensor
    cell_names: Tensor
    cell_boxes: Tensor
    region_names: Tensor
    region_boxes: Tensor

    def to(self, device: torch.device | str) -> SceneTargets:
        return SceneTargets(*(getattr(self, field.name).to(device) for field in fields(self)))


def scene_targets(
    processor: ClocMllmProcessor, records: Sequence[Record], asked: Sequence[Sequence[Region]]
) -> SceneTargets:
    """Makes the targets of records, and of the regions that are asked about in each."""
    names: dict[str, int] = {NOTHING: 0}

    def row(name: str) -> int:
        return names.setdefault(name, len(names))

    cell_names, cell_boxes = [], []
    for record in records:
        owner, boxes = _owners(record, processor)
        region_rows = torch.tensor([row(region.phrase) for region in record.regions] + [0])
        cell_names.append(region_rows[owner])
        cell_boxes.append(boxes)
    regions = [region for row_regions in asked for region in row_regions]
    region_names = torch.tensor([row(region.phrase) for region in regions], dtype=torch.long)
    ids = [processor.tokenize(name) for name in names]
    width = max(map(len, ids))
    return SceneTargets(
        name_ids=torch.tensor([i + [0] * (width - len(i)) for i in ids]),
        name_weights=torch.tensor([[1 / len(i)] * len(i) + [0.0] * (width - len(i)) for i in ids]),
        cell_names=torch.stack(cell_names),
        cell_boxes=torch.stack(cell_boxes),
        region_names=region_names,
        region_boxes=torch.tensor([region.box for region in regions]).reshape(-1, 4),
    )


def _owners(record: Record, processor: ClocMllmProcessor) -> tuple[Tensor, Tensor]:
    """Finds the region that each cell shows (-1: none) and its box: int64[N], float[N, 4].

    Of several things in a cell the last one counts, because it is drawn over the others.
    """
    side = round(processor.num_image_tokens**0.5)
    transform = processor.image_processor.preprocessing.transform(record.width, record.height)
    cells = token_cells((side, side), torch.device("cpu"))
    boxes = transform.to_original(Boxes(cells, CANVAS)).xyxy.float()
    owner = torch.full((len(cells),), -1)
    xyxy = torch.tensor([region.box for region in record.regions]).reshape(-1, 4)
    coverage = cell_coverage(transform.to_canvas(Boxes.normalized(xyxy)).xyxy, cells)
    for index, covered in enumerate(coverage):
        shown = covered > _MIN_COVERAGE
        owner[shown] = index
        boxes[shown] = xyxy[index]
    return owner, boxes.clamp(0, 1)


def embed_names(targets: SceneTargets, embeddings: nn.Module) -> Tensor:
    """Averages the token embeddings of each distinct name: float[P, H]."""
    return (embeddings(targets.name_ids) * targets.name_weights[..., None]).sum(1)


def embed_boxes(boxes: Tensor, location_embeddings: Tensor) -> Tensor:
    """Makes the code of normalised boxes: float[..., 4] -> float[..., H].

    Args:
        location_embeddings: float[num_bins, H]. They are rolled by a quarter of the width from one
            coordinate to the next, so that the four stay apart in the sum.
    """
    num_bins, width = location_embeddings.shape
    bins = (boxes * (num_bins - 1)).round().long()
    parts = [location_embeddings[bins[..., k]].roll(k * width // 4, -1) for k in range(4)]
    return torch.stack(parts).sum(0) / 2  # four independent codes of size 1 sum to size 2


def embed_scene(
    targets: SceneTargets, embeddings: nn.Module, location_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Makes scene tokens float[B, N, H] and region tokens float[R, H]."""
    names = embed_names(targets, embeddings)
    location = embeddings(location_ids)
    cells = names[targets.cell_names] + embed_boxes(targets.cell_boxes, location)
    regions = names[targets.region_names] + embed_boxes(targets.region_boxes, location)
    return cells, regions
