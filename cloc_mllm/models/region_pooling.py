"""Region encoders without a Prompter, for the paper's ablations: RoI-Align and plain CLIP.

Letters: B images, N tokens, D token width, E embedding width, R regions (packed).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from cloc_mllm.models.position import at_least_float32, cell_coverage, token_cells
from cloc_mllm.models.vision_encoder import ImageFeatures

_ROI_BINS = 3  # a side


class RoIAlignEncoder(nn.Module):
    """RoI-Align on the token grid, average over its bins, linear projection (table 2, row 4)."""

    def __init__(self, token_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(token_dim, embed_dim, bias=False)

    def embed_boxes(self, image: ImageFeatures, boxes: Tensor, image_index: Tensor) -> Tensor:
        return self.projection(roi_align_tokens(image.tokens, image.grid_hw, boxes, image_index))

    def embed_tokens(self, image: ImageFeatures) -> Tensor:
        return self.projection(image.tokens)


def roi_align_tokens(
    tokens: Tensor, grid_hw: tuple[int, int], boxes: Tensor, image_index: Tensor
) -> Tensor:
    """RoI-Align of 3 x 3 bins (two samples a side each), averaged: float[R, D], at least float32.

    Args:
        tokens: float[B, N, D] on a grid of `grid_hw`.
        boxes: float[R, 4] canvas frame.
    """
    height, width = grid_hw
    grid = at_least_float32(tokens.transpose(1, 2).unflatten(-1, (height, width)))
    on_grid = boxes.to(grid) * grid.new_tensor([width, height, width, height])
    rois = torch.cat([image_index[:, None].to(on_grid.dtype), on_grid], 1)
    return roi_align(grid, rois, _ROI_BINS, sampling_ratio=2, aligned=True).mean((2, 3))


def pool_under_masks(token_embeddings: Tensor, shares: Tensor, image_index: Tensor) -> Tensor:
    """Mean of `token_embeddings: float[B, N, E]` weighted by `shares: float[R, N]`, the share of
    each token's cell under each mask: float[R, E]."""
    weights = shares / shares.sum(1, keepdim=True).clamp(min=1e-6)
    return torch.einsum(
        "rn,rne->re", weights.to(token_embeddings.dtype), token_embeddings[image_index]
    )


def pool_under_boxes(
    token_embeddings: Tensor, image: ImageFeatures, boxes: Tensor, image_index: Tensor
) -> Tensor:
    """Mean of `token_embeddings: float[B, N, E]` weighted by the share of each cell in the box."""
    shares = cell_coverage(boxes, token_cells(image.grid_hw, boxes.device))
    return pool_under_masks(token_embeddings, shares, image_index)


def box_of_similarity(
    token_embeddings: Tensor, image: ImageFeatures, text_features: Tensor, image_index: Tensor
) -> Tensor:
    """The box around tokens more similar to the text than midway between least and most similar.

    The rule by which encoders without a box head locate a text. Returns float[R, 4] canvas frame.
    """
    tokens = F.normalize(at_least_float32(token_embeddings[image_index]), dim=-1)
    text = F.normalize(text_features.to(tokens), dim=-1)
    similarity = torch.einsum("rne,re->rn", tokens, text)
    middle = (similarity.amax(1, keepdim=True) + similarity.amin(1, keepdim=True)) / 2
    chosen = (similarity >= middle).unsqueeze(-1)
    cells = token_cells(image.grid_hw, tokens.device)
    top_left = torch.where(chosen, cells[:, :2], 2.0).amin(1)
    bottom_right = torch.where(chosen, cells[:, 2:], -1.0).amax(1)
    return torch.cat([top_left, bottom_right], 1)
