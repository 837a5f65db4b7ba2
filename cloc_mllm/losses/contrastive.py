"""Symmetric InfoNCE over the global batch (equations 1 and 2), with same-text filtering.

Letters: R rows of this rank, G rows of all ranks, E embedding width, W ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cloc_mllm.distributed import all_gather_with_grad, world_size
from cloc_mllm.models.position import at_least_float32


def contrastive_loss(
    features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    same_text_threshold: float = 1.0,
) -> Tensor:
    """Mean over the global batch of the two cross-entropies features->texts and texts->features.

    `L = 1/(2 G) sum_i [ -log softmax_j(s f_i . t_j)_i - log softmax_j(s t_i . f_j)_i ]`, where a
    pair (i, j != i) is left out of both denominators when `cos(t_i, t_j) > same_text_threshold`
    (section 3.3, text filtering; computed without gradient).

    The value on a rank is W times its own rows' share of the sum over the global batch: the mean
    over ranks of value and gradient, which data parallelism takes, is then the single-process
    loss, for any number of rows a rank (also none).

    Args:
        features, text_features: float[R, E], paired row by row, not normalised.
        logit_scale: float[1], logarithm of the inverse temperature; at most 100 is used.
        same_text_threshold: 1.0 or more turns the filter off.

    Returns:
        scalar, at least float32; 0 (with a gradient of 0) when the global batch has no rows.
    """
    features = F.normalize(at_least_float32(features), dim=-1)
    text_features = F.normalize(at_least_float32(text_features), dim=-1)
    all_features, start = all_gather_with_grad(features)
    all_texts, _ = all_gather_with_grad(text_features)
    num_global = all_texts.shape[0]
    scale = logit_scale.exp().clamp(max=100.0)
    anchor = (all_features.sum() + all_texts.sum() + scale.sum()) * 0.0
    if num_global == 0 or features.shape[0] == 0:
        return anchor
    targets = torch.arange(start, start + features.shape[0], device=features.device)
    ignored = _same_text_pairs(text_features, all_texts, targets, same_text_threshold)
    to_texts = (scale * features @ all_texts.T).masked_fill(ignored, float("-inf"))
    to_features = (scale * text_features @ all_features.T).masked_fill(ignored, float("-inf"))
    summed = F.cross_entropy(to_texts, targets, reduction="sum") + F.cross_entropy(
        to_features, targets, reduction="sum"
    )
    return anchor + summed * (world_size() / (2 * num_global))


@torch.no_grad()
def _same_text_pairs(texts: Tensor, all_texts: Tensor, targets: Tensor, threshold: float) -> Tensor:
    """bool[R, G]: pairs with nearly the same text, the true pair excepted."""
    if threshold >= 1.0:
        return torch.zeros(len(texts), len(all_texts), dtype=torch.bool, device=texts.device)
    same = texts @ all_texts.T > threshold
    same[torch.arange(len(texts), device=texts.device), targets] = False
    return same
