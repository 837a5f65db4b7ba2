"""Normalises tokens that consist of several scales of an image tower, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def norm_of_scales(dims: Sequence[int]) -> nn.Module:
    """LayerNorm of each scale of a token by itself: float[..., sum(dims)] -> the same shape.

    The scales of a tower differ in magnitude, so one norm of all would drown the smaller.
    """
    return nn.LayerNorm(dims[0]) if len(dims) == 1 else _ScaleNorms(dims)


class _ScaleNorms(nn.Module):
    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.dims = list(dims)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = zip(self.norms, tokens.split(self.dims, -1), strict=True)
        return torch.cat([norm(part) for norm, part in parts], -1)
