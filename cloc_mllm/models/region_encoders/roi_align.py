"""RoI-Align instead of the Prompter, for the paper's ablation (table 2, row 4).

Letters: B images, N image tokens, D token width, E embedding width, R regions (packed).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from cloc_mllm.models.position import at_least_float32, mask_boxes, token_cells
from cloc_mllm.models.region_encoders import Nearness, RegionPrompts
from cloc_mllm.models.region_encoders.pooling import box_of_similarity, cosines
from cloc_mllm.models.vision_encoder import ImageFeatures

_BINS_PER_SIDE = 3


class RoIAlignEncoder(nn.Module):
    """RoI-Align on the token grid, averaged over its bins, and a linear projection.

    See `RegionEncoder` for the methods.
    """

    has_region_loss = True
    predicts_boxes = False
    takes_masks = False

    def __init__(self, token_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(token_dim, embed_dim, bias=False)

    def prepare(self, image: ImageFeatures) -> ImageFeatures:
        return image

    def embed_boxes(
        self, image: ImageFeatures, boxes: Tensor, image_index: Tensor, most: int | None = None
    ) -> Tensor:
        return self.projection(roi_align_tokens(image.tokens, image.grid_hw, boxes, image_index))

    def embed_masks(self, image: ImageFeatures, masks: Tensor, image_index: Tensor) -> Tensor:
        return self.embed_boxes(image, mask_boxes(masks), image_index)

    def read_tokens(self, image: ImageFeatures) -> tuple[Tensor, Tensor]:
        z = self.projection(image.tokens)
        return z, token_cells(image.grid_hw, z.device).expand(len(z), -1, -1)

    def similarity(self, image: ImageFeatures, text_features: Tensor) -> Tensor:
        return cosines(self.projection(image.tokens), text_features)

    def locate(
        self,
        image: ImageFeatures,
        text_features: Tensor,
        image_index: Tensor,
        most: int | None = None,
        near: Nearness | None = None,
    ) -> Tensor:
        z = self.projection(image.tokens)
        return box_of_similarity(z, image, text_features, image_index)[None]

    def forward(
        self, image: ImageFeatures, prompts: RegionPrompts, text_features: Tensor
    ) -> tuple[Tensor, None]:
        return self.embed_boxes(image, prompts.boxes, prompts.image_index), None


def roi_align_tokens(
    tokens: Tensor, grid_hw: tuple[int, int], boxes: Tensor, image_index: Tensor
) -> Tensor:
    """Averages RoI-Align's 3 x 3 bins of 2 x 2 samples each: float[R, D], at least float32.

    Args:
        tokens: float[B, N, D] on a grid of `grid_hw`.
        boxes: float[R, 4] canvas frame.
    """
    maps = tokens.transpose(1, 2).unflatten(-1, grid_hw)
    return sample_regions(maps, boxes, image_index, _BINS_PER_SIDE, 2).mean((2, 3))


def sample_regions(
    maps: Tensor, boxes: Tensor, map_index: Tensor, bins: int, samples: int
) -> Tensor:
    """RoI-Align with `samples` per side of a bin: float[R, C, bins, bins], at least float32.

    Args:
        maps: float[B, C, rows, columns], each over the whole canvas.
        boxes: float[R, 4] canvas frame.
        map_index: int64[R], the map of each box.
    """
    maps = at_least_float32(maps)
    height, width = maps.shape[2:]
    left, top, right, bottom = boxes.to(maps).unbind(-1)
    on_grid = torch.stack([left * width, top * height, right * width, bottom * height], -1)
    rois = torch.cat([map_index[:, None].to(on_grid.dtype), on_grid], 1)
    return roi_align(maps, rois, bins, sampling_ratio=samples, aligned=True)
