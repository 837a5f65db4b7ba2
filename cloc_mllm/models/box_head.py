"""BoxHead: the box a text prompt points at (section 3.3 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cloc_mllm.models.position import at_least_float32


class BoxHead(nn.Module):
    """Two-layer MLP with GELU on z of a text prompt: float[R, E] -> boxes float[R, 4].

    The four outputs are centre and size through a sigmoid, so a box is never inverted; returned
    as xyxy in the canvas frame.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, 4)
        )

    def forward(self, z: Tensor) -> Tensor:
        centre, size = at_least_float32(self.mlp(z)).sigmoid().chunk(2, -1)
        return torch.cat([centre - size / 2, centre + size / 2], -1)
