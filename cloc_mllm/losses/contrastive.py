"""Symmetric InfoNCE over the global batch (equations 1 and 2), with same-text filtering.

Letters: R rows of this rank, G rows of all ranks, E embedding width, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cloc_mllm.distributed import all_gather_with_grad, all_reduce_logsumexp, world_size
from cloc_mllm.models.position import at_least_float32

TILE_ROWS = 256  # rows of logits that exist at a time


def contrastive_loss(
    features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    same_text_threshold: float = 1.0,
    *,
    tile_rows: int = TILE_ROWS,
) -> Tensor:
    """Mean over the global batch of the two cross-entropies features->texts and texts->features.

    `L = 1/(2 G) sum_i [ -log softmax_j(s f_i . t_j)_i - log softmax_j(s t_i . f_j)_i ]`, where a
    pair (i, j != i) is left out of both denominators when `cos(t_i, t_j) > same_text_threshold`
    (section 3.3, text filtering; computed without gradient).

    The G x G logits never exist: each rank walks through its own rows, `tile_rows` at a time, and
    does so again for the gradient, so memory grows with G, not with its square.

    The value on a rank is W times its own rows' share of the sum over the global batch, and its
    gradient is W times what its own rows add: the mean over ranks of both, which data parallelism
    takes, is that of the single-process loss, for any number of rows a rank (also none). Every rank
    must weight the loss alike.

    Args:
        features, text_features: float[R, E], paired row by row, not normalised.
        logit_scale: float[1], logarithm of the inverse temperature; at most 100 is used.
        same_text_threshold: 1.0 or more turns the filter off.

    Returns:
        scalar, at least float32; 0 (with a gradient of 0) when the global batch has no rows.
    """
    features = F.normalize(at_least_float32(features), dim=-1)
    text_features = F.normalize(at_least_float32(text_features), dim=-1)
    all_texts, start = all_gather_with_grad(text_features)
    scale = logit_scale.exp().clamp(max=100.0)
    num_global = all_texts.shape[0]
    if num_global == 0:
        return (features.sum() + all_texts.sum() + scale.sum()) * 0.0
    how = _Tiling(start, same_text_threshold, tile_rows)
    summed = _TiledInfoNCE.apply(features, all_texts, scale, how)
    return summed * (world_size() / (2 * num_global))


class _Tiling(NamedTuple):
    start: int  # of this rank's rows in the global batch
    same_text_threshold: float
    tile_rows: int


class _TiledInfoNCE(torch.autograd.Function):
    """Sum of both cross-entropies of this rank's rows; see `contrastive_loss`."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, all_texts: Tensor, scale: Tensor, how: _Tiling
    ) -> Tensor:
        to_texts, true_pairs = features.new_empty(2, len(features))
        to_features = features.new_full((len(all_texts),), float("-inf"))
        for rows, logits in _tiles(features, all_texts, scale, how):
            to_texts[rows] = logits.logsumexp(1)
            to_features = torch.logaddexp(to_features, logits.logsumexp(0))
            true_pairs[rows] = _true_pairs(logits, rows, how)
        to_features = all_reduce_logsumexp(to_features)
        ctx.save_for_backward(features, all_texts, scale, to_texts, to_features)
        ctx.how = how
        own = slice(how.start, how.start + len(features))
        return (to_texts + to_features[own] - 2 * true_pairs).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, all_texts, scale, to_texts, to_features = ctx.saved_tensors
        grad_features, grad_texts = torch.empty_like(features), torch.zeros_like(all_texts)
        for rows, logits in _tiles(features, all_texts, scale, ctx.how):
            # d/d logits: both softmaxes, less one each at the true pair
            errors = (logits - to_texts[rows, None]).exp_() + (logits - to_features).exp_()
            _true_pairs(errors, rows, ctx.how).sub_(2.0)
            errors.mul_(grad)
            grad_features[rows] = errors @ all_texts
            grad_texts.addmm_(errors.T, features[rows])
        grad_scale = (grad_features * features).sum().reshape(scale.shape)
        return grad_features * scale, grad_texts * scale, grad_scale, None


def _tiles(
    features: Tensor, all_texts: Tensor, scale: Tensor, how: _Tiling
) -> Iterator[tuple[slice, Tensor]]:
    """This rank's rows against all texts, a few at a time: (rows, logits float[tile, G]), `-inf`
    where the filter leaves a pair out."""
    for first in range(0, len(features), how.tile_rows):
        rows = slice(first, min(first + how.tile_rows, len(features)))
        logits = scale * features[rows] @ all_texts.T
        if how.same_text_threshold < 1.0:
            texts = all_texts[how.start + rows.start : how.start + rows.stop]
            same_text = texts @ all_texts.T > how.same_text_threshold
            _true_pairs(same_text, rows, how).fill_(False)
            logits.masked_fill_(same_text, float("-inf"))
        yield rows, logits


def _true_pairs(tile: Tensor, rows: slice, how: _Tiling) -> Tensor:
    """A view of the entries of a tile where row and text belong together."""
    return tile.diagonal(how.start + rows.start)[: rows.stop - rows.start]
