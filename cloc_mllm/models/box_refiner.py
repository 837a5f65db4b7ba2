"""BoxRefiner: looks again at the box that a text points at, and moves its sides.

Letters: B images, N image tokens, D width of the Prompter, E embedding width, R texts (packed).

BoxHead reads a box from one vector, which says well where a thing is and badly where it ends. So
the tokens around that box are sampled on a grid that moves with it, as Cascade R-CNN does
(arXiv 1712.00726), but with the text in place of a class. It is ours, not the paper's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from cloc_mllm.models.position import at_least_float32
from cloc_mllm.models.region_encoders.roi_align import sample_regions

_BINS = 8  # per side
_MARGIN = 0.25  # of the box's side, on each side
_CHANNELS = 32
_HIDDEN = 384
_SMALLEST = 0.02  # side of a box that is looked at, in canvas sides
_LARGEST_CHANGE = 2.0  # of a side, as a logarithm


class BoxRefiner(nn.Module):
    """Moves each box by what the tokens in and around it show, `looks` times with one set of
    weights. It starts as the identity.

    Args:
        width: D.
        embed_dim: E.
        looks: how often each box is looked at.
    """

    def __init__(self, width: int, embed_dim: int, looks: int) -> None:
        super().__init__()
        self.looks = looks
        self.token = nn.Linear(width, 2 * _CHANNELS)
        self.gate = nn.Linear(embed_dim, _CHANNELS)
        self.text = nn.Linear(embed_dim, _HIDDEN)
        self.cells = nn.Sequential(
            nn.Linear(_BINS**2 * (2 * _CHANNELS + 1), _HIDDEN),
            nn.GELU(),
            nn.Linear(_HIDDEN, _HIDDEN),
        )
        self.change = nn.Linear(_HIDDEN, 4)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    def forward(
        self,
        boxes: Tensor,
        text_features: Tensor,
        similarity: Tensor,
        image_index: Tensor,
        tokens: Tensor,
        grid_hw: tuple[int, int],
    ) -> Tensor:
        """Refines the boxes; the gradient of a look ends at the box that it started from.

        Args:
            boxes: float[R, 4] xyxy, canvas frame.
            text_features: float[R, E].
            similarity: float[R, N], of each text and each token of its image.
            image_index: int64[R].
            tokens: float[B, N, D], of the Prompter.
            grid_hw: rows and columns of the tokens.

        Returns:
            float[looks, R, 4] xyxy, canvas frame, the box after each look.
        """
        features = self.token(tokens).transpose(1, 2).unflatten(2, grid_hw)
        matching = similarity.unflatten(1, grid_hw).unsqueeze(1)
        own = torch.arange(len(boxes), device=boxes.device)
        gate, text = self.gate(text_features)[:, :, None, None], self.text(text_features)
        answers = []
        for _ in range(self.looks):
            boxes = at_least_float32(boxes.detach()).clamp(0, 1)
            centre, side = box_convert(boxes, "xyxy", "cxcywh").split(2, 1)
            side = side.clamp(min=_SMALLEST)
            reach = side * (0.5 + _MARGIN)
            around = torch.cat([centre - reach, centre + reach], 1)
            seen = sample_regions(features, around, image_index, _BINS, 1)
            asked, other = seen.split(_CHANNELS, 1)
            matches = sample_regions(matching, around, own, _BINS, 1)
            cells = torch.cat([asked * gate, other, matches], 1).flatten(1)
            change = at_least_float32(self.change(F.gelu(self.cells(cells) + text)))
            centre = centre + change[:, :2] * side
            side = side * change[:, 2:].clamp(-_LARGEST_CHANGE, _LARGEST_CHANGE).exp()
            boxes = torch.cat([centre - side / 2, centre + side / 2], 1)
            answers.append(boxes)
        return torch.stack(answers)
