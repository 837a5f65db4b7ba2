"""From the vision encoder's width to the language model's.

Letters: B images, N image tokens, R regions, H width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cloc_mllm.models.position import sinusoidal_code

_CODE_DIM = 128
# padding of a very long or tall image lies far outside; beyond this it is all just "outside"
_CODE_RANGE = (-1.0, 2.0)


class Projector(nn.Module):
    """LayerNorm on each feature, the codes of boxes appended, then a two-layer MLP with GELU.

    Serves image tokens (boxes are the token's cell and that of what it belongs to) and regions
    (the region's), all in the original image's frame: the language model never has to undo the
    padding.
    """

    def __init__(
        self,
        feature_dims: Sequence[int],
        output_dim: int,
        output_std: float = 0.02,
        num_boxes: int = 1,
        hidden_dim: int = 0,
    ) -> None:
        """`hidden_dim` 0 takes `output_dim`."""
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in feature_dims)
        hidden_dim = hidden_dim or output_dim
        self.hidden = nn.Linear(sum(feature_dims) + num_boxes * _CODE_DIM, hidden_dim)
        self.output = nn.Linear(hidden_dim, output_dim)
        self.reset(output_std)

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """`features`: float[..., D_i]; `boxes`: float[..., 4] normalised each -> float[..., H]."""
        normed = [norm(feature) for norm, feature in zip(self.norms, features, strict=True)]
        codes = [sinusoidal_code(b.float().clamp(*_CODE_RANGE), _CODE_DIM) for b in boxes]
        inputs = torch.cat([*normed, *(code.to(normed[0].dtype) for code in codes)], -1)
        return self.output(nn.functional.gelu(self.hidden(inputs)))

    @torch.no_grad()
    def reset(self, output_std: float) -> None:
        """Initialise so that outputs have about the scale of the word embeddings they join."""
        for layer, gain in ((self.hidden, 1.0), (self.output, output_std / _GELU_RMS)):
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)


_GELU_RMS = 0.65  # root mean square of gelu of a unit normal


def to_original_frame(canvas_boxes: Tensor, image_frame: Tensor) -> Tensor:
    """Boxes of the canvas -> normalised boxes of the original image.

    Args:
        canvas_boxes: float[..., 4] xyxy, canvas frame.
        image_frame: float[..., 4], the whole canvas as a box in the original's normalised frame
            (so it reaches outside 0..1 where the canvas is padding).
    """
    top_left, bottom_right = image_frame[..., :2], image_frame[..., 2:]
    size = bottom_right - top_left
    return torch.cat([top_left, top_left], -1) + canvas_boxes * torch.cat([size, size], -1)
