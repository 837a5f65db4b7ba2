"""BoxHead: reads the box that a text prompt points at (section 3.3 of the paper)."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import box_convert

from cloc_mllm.models.position import at_least_float32


class BoxHead(nn.Module):
    """A two-layer MLP with GELU from z of a text prompt to its box: float[R, E] -> float[R, 4].

    The four outputs are centre and size, through a sigmoid, so that a box is never inverted. The
    box is xyxy in the canvas frame.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, 4)
        )

    def forward(self, z: Tensor) -> Tensor:
        return box_convert(at_least_float32(self.mlp(z)).sigmoid(), "cxcywh", "xyxy")
