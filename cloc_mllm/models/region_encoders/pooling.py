"""Averages of token embeddings over a region, and the box around the tokens most like a text.

Letters: B images, N image tokens, E embedding width, R regions (packed).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cloc_mllm.models.position import at_least_float32, cell_coverage, token_cells
from cloc_mllm.models.vision_encoder import ImageFeatures


def pool_under_masks(token_embeddings: Tensor, shares: Tensor, image_index: Tensor) -> Tensor:
    """Averages `token_embeddings: float[B, N, E]` with the weights `shares: float[R, N]`, the
    share of each token's cell under each mask: float[R, E]."""
    weights = shares / shares.sum(1, keepdim=True).clamp(min=1e-6)
    return torch.einsum(
        "rn,rne->re", weights.to(token_embeddings.dtype), token_embeddings[image_index]
    )


def pool_under_boxes(
    token_embeddings: Tensor, image: ImageFeatures, boxes: Tensor, image_index: Tensor
) -> Tensor:
    """Averages `token_embeddings: float[B, N, E]`, weighted by the share of each cell in the box.

    `boxes: float[R, 4]` canvas frame -> float[R, E].
    """
    shares = cell_coverage(boxes, token_cells(image.grid_hw, boxes.device))
    return pool_under_masks(token_embeddings, shares, image_index)


def cosines(token_embeddings: Tensor, text_features: Tensor) -> Tensor:
    """Compares P texts with the tokens of one image: float[1, N, E], float[P, E] -> float[P, N]."""
    tokens = F.normalize(at_least_float32(token_embeddings[0]), dim=-1)
    return F.normalize(text_features.to(tokens), dim=-1) @ tokens.T


def box_of_similarity(
    token_embeddings: Tensor, image: ImageFeatures, text_features: Tensor, image_index: Tensor
) -> Tensor:
    """Draws a box around the tokens that are more similar to the text than midway between the
    least and the most similar token.

    Region encoders without a BoxHead locate a text by this rule. Returns float[R, 4] canvas frame.
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
