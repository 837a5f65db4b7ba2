"""The language model's loss. Letters: K labelled positions, V vocabulary, H width."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
_CHUNK = 512  # labelled positions whose logits exist at a time
# But not more than so many logits: 128 MB in float32. They live about four times over: as the head
# writes them, in float32, as logarithms of probabilities, and as gradients.
_NUM_LOGITS = 2**25


class SoftBins(NamedTuple):
    """Soft targets of location tokens: Gaussians around the true bin, so that a near miss costs
    less than a far one.

    Attributes:
        start, num_bins: first id and number of the location tokens.
        smoothing: standard deviation of the Gaussian, in bins.
    """

    start: int
    num_bins: int
    smoothing: float


def chunk_of(vocab_size: int) -> int:
    """The number of labelled positions whose logits may exist at a time."""
    return max(1, min(_CHUNK, _NUM_LOGITS // vocab_size))


def answer_loss(logits: Tensor, labels: Tensor, soft_bins: SoftBins | None = None) -> Tensor:
    """Sums the cross-entropy of the next token over labelled positions, in float32.

    Args:
        logits: float[B, T, V], position t predicts token t + 1.
        labels: int64[B, T], the tokens themselves, `IGNORE_INDEX` where nothing is learnt.
        soft_bins: None is plain cross-entropy for location tokens too.

    Returns:
        float32 scalar, the sum; the caller divides by the number of labelled positions.
    """
    chosen = labels[:, 1:] != IGNORE_INDEX
    return _summed(logits[:, :-1][chosen], labels[:, 1:][chosen], soft_bins)


def answer_loss_of_hidden(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    soft_bins: SoftBins | None = None,
    *,
    chunk: int = _CHUNK,
) -> Tensor:
    """Computes `answer_loss(head(hidden), ...)` in little memory.

    Logits are made for labelled positions only, `chunk` of them at a time, and once more in
    backward. So the logits of a whole batch never exist.

    Args:
        hidden: float[B, T, H], the input of the language model's head.
        head: float[K, H] -> float[K, V].
    """
    chosen = labels[:, 1:] != IGNORE_INDEX
    states, targets = hidden[:, :-1][chosen], labels[:, 1:][chosen]
    return loss_of_states(states, targets, head, soft_bins, chunk=chunk)


def loss_of_states(
    states: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    soft_bins: SoftBins | None = None,
    *,
    chunk: int = _CHUNK,
) -> Tensor:
    """Computes the summed loss of what writes the targets: float[K, H] and int64[K]."""

    def summed(hidden: Tensor, targets: Tensor) -> Tensor:
        return _summed(head(hidden), targets, soft_bins)

    if len(targets) <= chunk:
        return summed(states, targets)
    pieces = zip(states.split(chunk), targets.split(chunk), strict=True)
    return torch.stack([checkpoint(summed, *piece, use_reentrant=False) for piece in pieces]).sum()


def _summed(logits: Tensor, targets: Tensor, soft_bins: SoftBins | None) -> Tensor:
    """The summed cross-entropy of float[K, V] logits with int64[K] targets."""
    logits = logits.float()
    if soft_bins is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    start, num_bins, smoothing = soft_bins
    bins = targets - start
    is_location = (bins >= 0) & (bins < num_bins)
    log_probs = logits.log_softmax(-1)
    plain = F.nll_loss(log_probs, targets, reduction="none")
    # computed for all rows: choosing some would wait for a GPU
    target = smoothed_bins(bins, num_bins, smoothing)
    soft = -(target * log_probs[:, start:][:, :num_bins]).sum(-1)
    return torch.where(is_location, soft, plain).sum()


def smoothed_bins(bins: Tensor, num_bins: int, smoothing: float) -> Tensor:
    """Makes a normalised Gaussian around each true bin: int64[K] -> float32[K, num_bins]."""
    distance = torch.arange(num_bins, device=bins.device) - bins[:, None]
    return (-0.5 * (distance / smoothing) ** 2).softmax(-1)
