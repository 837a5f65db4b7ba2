"""Contrastive losses over the global batch, with same-text filtering: CLIP's softmax loss
(equations 1 and 2) and SigLIP's sigmoid loss (arXiv 2303.15343).

Letters: R rows of this rank, G rows of all ranks, E embedding width, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cloc_mllm.distributed import all_gather_with_grad, all_reduce_logsumexp, world_size
from cloc_mllm.models.position import at_least_float32

TILE_ROWS = 256  # rows of logits in memory at a time
_GPU_TILE_ROWS, _GPU_TILE_LOGITS = 2048, 2**28  # the logits of a tile are 1 GiB
_FLAGS = 8  # flags per byte


def contrastive_loss(  # noqa: PLR0913  its inputs, two that only save time, and a second result
    features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    same_text_threshold: float,
    *,
    logit_bias: Tensor | None = None,
    text_log_prior: Tensor | None = None,
    counts: Sequence[int] | None = None,
    tile_rows: int = 0,
    filtered_share: Tensor | None = None,
) -> Tensor:
    """Computes CLIP's softmax loss, or SigLIP's sigmoid loss if there is a `logit_bias`.

    softmax: `L = 1/(2 G) sum_i [ -log softmax_j(s f_i . t_j)_i - log softmax_j(s t_i . f_j)_i ]`,
    sigmoid: `L = -1/G sum_i sum_j log sigmoid(y_ij (s f_i . t_j + b))`, y_ij = 1 if i = j, else -1.
    Pairs (i, j != i) with `cos(t_i, t_j) > same_text_threshold` are left out of denominators and
    sums (section 3.3, text filtering; computed without gradient).

    A `text_log_prior` log p(t_j) is subtracted from the logits of text j (Bengio and Senecal 2008),
    which then learn log p(t | f); without it they learn log p(t | f) / p(t).

    The G x G logits never exist as a whole: each rank walks through its own rows, `tile_rows` at a
    time, and again for the gradient. Only which pairs are left out is kept, at one bit per pair.

    A rank returns W times its own rows' share of the sum over the global batch, likewise of the
    gradient. Data parallelism takes the mean over ranks of both, which equals the single-process
    loss for any number of rows per rank, also none. Every rank must weight the loss alike.

    Args:
        features, text_features: float[R, E], paired row by row, not normalised.
        logit_scale: float[1], logarithm of the inverse temperature s; s is cut at 100.
        same_text_threshold: 1.0 or more turns the filter off.
        logit_bias: float[1], b of the sigmoid loss; None takes the softmax loss.
        text_log_prior: float[R], up to a constant; None leaves it out.
        counts: R of every rank; None asks them.
        tile_rows: rows of logits in memory at a time; 0 chooses.
        filtered_share: float scalar that is set to the share of pairs (i, j != i) that the filter
            leaves out, scaled as the loss is.

    Returns:
        scalar, at least float32; 0 (with a gradient of 0) if the global batch has no rows.
    """
    features = F.normalize(at_least_float32(features), dim=-1)
    text_features = F.normalize(at_least_float32(text_features), dim=-1)
    all_texts, start = all_gather_with_grad(text_features, counts)
    scale = logit_scale.exp().clamp(max=100.0)
    num_global = all_texts.shape[0]
    if num_global == 0:
        bias_sum = 0.0 if logit_bias is None else logit_bias.sum()
        return (features.sum() + all_texts.sum() + scale.sum() + bias_sum) * 0.0
    tile_rows = tile_rows or rows_at_a_time(num_global, all_texts.device.type)
    same_text = None
    if same_text_threshold < 1.0:
        own = range(start, start + len(features))
        same_text, num_marked = _same_text_bits(
            all_texts.detach(), own, same_text_threshold, tile_rows
        )
        if filtered_share is not None:
            num_pairs = max(1, num_global * (num_global - 1))
            filtered_share.copy_(num_marked.to(filtered_share) * (world_size() / num_pairs))
    log_prior = text_log_prior
    if log_prior is not None:
        log_prior = all_gather_with_grad(log_prior.to(all_texts)[:, None], counts)[0][:, 0]
    tiling = _Tiling(start, tile_rows, same_text, log_prior)
    if logit_bias is None:
        summed = _TiledInfoNCE.apply(features, all_texts, scale, tiling)
        return summed * (world_size() / (2 * num_global))
    summed = _TiledSigmoid.apply(features, all_texts, scale, logit_bias.to(scale), tiling)
    return summed * (world_size() / num_global)


def rows_at_a_time(num_texts: int, device_type: str) -> int:
    """How many rows of `num_texts` logits are in memory at a time. On a GPU small tiles would be
    many kernels that do little."""
    if device_type == "cpu":
        return TILE_ROWS
    return min(_GPU_TILE_ROWS, max(TILE_ROWS, _GPU_TILE_LOGITS // num_texts))


class _Tiling(NamedTuple):
    start: int  # where this rank's rows start in the global batch
    tile_rows: int
    same_text: Tensor | None  # from `_same_text_bits`
    log_prior: Tensor | None  # of all texts, float[G]


class _TiledInfoNCE(torch.autograd.Function):
    """Sums both cross-entropies of this rank's rows; see `contrastive_loss`."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, all_texts: Tensor, scale: Tensor, tiling: _Tiling
    ) -> Tensor:
        to_texts, true_pairs = features.new_empty(2, len(features))
        to_features = features.new_full((len(all_texts),), float("-inf"))
        for rows, logits in _tiles(features, all_texts, scale, tiling):
            to_texts[rows] = logits.logsumexp(1)
            to_features = torch.logaddexp(to_features, logits.logsumexp(0))
            true_pairs[rows] = _true_pairs(logits, rows, tiling)
        to_features = all_reduce_logsumexp(to_features)
        ctx.save_for_backward(features, all_texts, scale, to_texts, to_features)
        ctx.tiling = tiling
        own = slice(tiling.start, tiling.start + len(features))
        return (to_texts + to_features[own] - 2 * true_pairs).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, all_texts, scale, to_texts, to_features = ctx.saved_tensors
        gradients = _Gradients(features, all_texts)
        for rows, logits in _tiles(features, all_texts, scale, ctx.tiling):
            # d/d logits is the sum of both softmaxes, less one for each at the true pair
            errors = (logits - to_texts[rows, None]).exp_()
            errors.add_(logits.sub_(to_features).exp_())
            _true_pairs(errors, rows, ctx.tiling).sub_(2.0)
            gradients.add(rows, errors.mul_(grad))
        return *gradients.finish(scale), None


class _TiledSigmoid(torch.autograd.Function):
    """Sums the binary cross-entropies of this rank's rows; see `contrastive_loss`."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, all_texts: Tensor, scale: Tensor, bias: Tensor, tiling: _Tiling
    ) -> Tensor:
        summed = features.new_zeros(())
        for rows, logits in _tiles(features, all_texts, scale, tiling, bias):
            # -log sigmoid(x) = -log sigmoid(-x) - x
            summed -= _true_pairs(logits, rows, tiling).sum()
            summed -= F.logsigmoid(logits.neg_()).sum()
        ctx.save_for_backward(features, all_texts, scale, bias)
        ctx.tiling = tiling
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, all_texts, scale, bias = ctx.saved_tensors
        gradients, grad_bias = _Gradients(features, all_texts), torch.zeros_like(bias)
        for rows, logits in _tiles(features, all_texts, scale, ctx.tiling, bias):
            errors = logits.sigmoid_()
            _true_pairs(errors, rows, ctx.tiling).sub_(1.0)
            grad_bias += errors.mul_(grad).sum()
            gradients.add(rows, errors)
        return *gradients.finish(scale), grad_bias, None


class _Gradients:
    """Accumulates the gradients of features, texts and scale, tile by tile."""

    def __init__(self, features: Tensor, all_texts: Tensor) -> None:
        self.features, self.all_texts = features, all_texts
        self.features_grad = torch.empty_like(features)
        self.texts_grad = torch.zeros_like(all_texts)

    def add(self, rows: slice, logits_grad: Tensor) -> None:
        torch.mm(logits_grad, self.all_texts, out=self.features_grad[rows])
        self.texts_grad.addmm_(logits_grad.T, self.features[rows])

    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of features, texts and scale, after all tiles."""
        scale_grad = (self.features_grad * self.features).sum().reshape(scale.shape)
        return self.features_grad.mul_(scale), self.texts_grad.mul_(scale), scale_grad


def _tiles(
    features: Tensor, all_texts: Tensor, scale: Tensor, tiling: _Tiling, bias: Tensor | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Yields a few of this rank's rows at a time with their logits: (rows, float[tile, G]).

    Pairs that the filter leaves out are `-inf`. Every tile reuses the same memory.
    """
    buffer = features.new_empty(min(tiling.tile_rows, len(features)), len(all_texts))
    for rows in _slices(len(features), tiling.tile_rows):
        logits = buffer[: rows.stop - rows.start]
        torch.mm(scale * features[rows], all_texts.T, out=logits)
        if bias is not None:
            logits.add_(bias)
        if tiling.log_prior is not None:
            logits.sub_(tiling.log_prior)
        if tiling.same_text is not None:
            bits = tiling.same_text[rows]
            for bit, part in enumerate(logits.split(bits.shape[1], 1)):
                same_text = (bits[:, : part.shape[1]] & (1 << bit)).bool()
                part.masked_fill_(same_text, float("-inf"))
        yield rows, logits


def _same_text_bits(
    all_texts: Tensor, own: range, threshold: float, tile_rows: int
) -> tuple[Tensor, Tensor]:
    """Marks the other texts that equal a row's own: uint8[R, ceil(G / 8)]; and counts the marks.

    Bit k of column c stands for text k * ceil(G / 8) + c. At one bit per pair the marks are small
    enough to keep, so that forward and backward share one product.
    """
    parts = all_texts.chunk(_FLAGS)
    bits = torch.zeros(len(own), len(parts[0]), dtype=torch.uint8, device=all_texts.device)
    num_marked = torch.zeros((), dtype=torch.long, device=all_texts.device)
    for rows in _slices(len(own), tile_rows):
        first = own.start + rows.start
        texts = all_texts[first : own.start + rows.stop]
        for bit, part in enumerate(parts):
            same_text = texts @ part.T > threshold
            same_text.diagonal(first - bit * len(parts[0])).fill_(False)
            bits[rows, : len(part)] |= same_text.to(torch.uint8) << bit
            num_marked += same_text.sum()
    return bits, num_marked


def _slices(length: int, size: int) -> Iterator[slice]:
    for first in range(0, length, size):
        yield slice(first, min(first + size, length))


def _true_pairs(tile: Tensor, rows: slice, tiling: _Tiling) -> Tensor:
    """A view of those entries of a tile whose row and text belong together."""
    return tile.diagonal(tiling.start + rows.start)[: rows.stop - rows.start]
