"""The language model's loss. K labelled positions, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def answer_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    location_token_start: int | None = None,
    num_bins: int = 0,
    smoothing: float = 0.0,
) -> Tensor:
    """Summed cross-entropy of the next token over labelled positions, in float32.

    Args:
        logits: float[B, T, V], position t predicts token t + 1.
        labels: int64[B, T], the tokens themselves, `IGNORE_INDEX` where nothing is learnt.
        location_token_start, num_bins: ids of the location tokens; their target is a Gaussian of
            standard deviation `smoothing` (in bins) around the true bin, so that a near miss
            costs less than a far one. `smoothing` 0 is plain cross-entropy.

    Returns:
        float32 scalar, the sum; the caller divides by the number of labelled positions.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORE_INDEX
    targets, logits = targets[chosen], logits[:, :-1][chosen].float()
    if smoothing <= 0 or location_token_start is None:
        return F.cross_entropy(logits, targets, reduction="sum")
    bins = targets - location_token_start
    is_location = (bins >= 0) & (bins < num_bins)
    log_probs = logits.log_softmax(-1)
    plain = F.nll_loss(log_probs[~is_location], targets[~is_location], reduction="sum")
    target = smoothed_bins(bins[is_location], num_bins, smoothing)
    location_log_probs = log_probs[is_location][:, location_token_start:][:, :num_bins]
    return plain - (target * location_log_probs).sum()


def smoothed_bins(bins: Tensor, num_bins: int, smoothing: float) -> Tensor:
    """int64[K] true bins -> float32[K, num_bins], rows are normalised Gaussians around them."""
    distance = torch.arange(num_bins, device=bins.device) - bins[:, None]
    return (-0.5 * (distance / smoothing) ** 2).softmax(-1)
