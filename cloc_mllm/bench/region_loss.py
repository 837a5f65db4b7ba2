"""Our region loss and the full matrix it stands in for, on random regions.

Letters: R regions, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cloc_mllm.losses.contrastive import contrastive_loss

Side = Literal["ours", "full_matrix", "full_matrix_once"]
THRESHOLD = 0.9
_DISTINCT = 0.8  # share of the phrases that are not repeats of another


def full_matrix_loss(
    features: Tensor, texts: Tensor, logit_scale: Tensor, *, both_products: bool = True
) -> Tensor:
    """open_clip's `ClipLoss` on one process, with our mask of same texts: two R x R matrices of
    logits, one a direction; or one and its transpose, as open_clip does on several processes."""
    features, texts = F.normalize(features, dim=-1), F.normalize(texts, dim=-1)
    scale = logit_scale.exp()
    with torch.no_grad():
        same_text = (texts @ texts.T > THRESHOLD).fill_diagonal_(False)
    labels = torch.arange(len(features), device=features.device)
    to_texts = (scale * features @ texts.T).masked_fill_(same_text, float("-inf"))
    if both_products:
        to_features = (scale * texts @ features.T).masked_fill_(same_text, float("-inf"))
    else:
        to_features = to_texts.T
    return (F.cross_entropy(to_texts, labels) + F.cross_entropy(to_features, labels)) / 2


def random_regions(num_regions: int, width: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """`float[R, E], float[R, E], float[1]`: regions near their text; a fifth of texts repeats."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(num_regions, width, generator=generator)
    num_distinct = int(_DISTINCT * num_regions)
    texts[num_distinct:] = texts[: num_regions - num_distinct]
    features = texts + 3 * torch.randn(num_regions, width, generator=generator)
    inputs = (features, texts, torch.tensor([math.log(1 / 0.07)]))
    return tuple(tensor.requires_grad_() for tensor in inputs)  # type: ignore[return-value]


def prepare_step(side: Side, num_regions: int, tile_rows: int) -> Callable[[], list[Tensor]]:
    """Forward and backward of one side; the step returns loss and gradients."""
    inputs = random_regions(num_regions)

    def step() -> list[Tensor]:
        if side == "ours":
            loss = contrastive_loss(*inputs, THRESHOLD, tile_rows=tile_rows)
        else:
            loss = full_matrix_loss(*inputs, both_products=side == "full_matrix")
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    return step


def check_equal(num_regions: int, tile_rows: int, tolerance: float = 1e-5) -> None:
    """Raises an AssertionError unless loss and gradients of both sides agree."""
    ours, theirs = (prepare_step(s, num_regions, tile_rows)() for s in ("ours", "full_matrix"))
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
