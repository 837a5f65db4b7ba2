"""Projects features of the vision encoder's width to the language model's.

Letters: B images, N image tokens, M tokens that the language model gets for them, D_i widths of the
features, Q queries, R regions, H width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloc_mllm.models.position import sinusoidal_code

if TYPE_CHECKING:
    from cloc_mllm.mllm.configuration import ClocMllmConfig

_CODE_DIM = 128
# the padding of a very long or tall image lies far outside; places beyond this are cut
_CODE_RANGE = (-1.0, 2.0)
_MERGED_SIDE = 2  # `pixel_shuffle` makes one token of so many by so many
_HEAD_DIM = 64  # approximate width of the resampler's attention heads


class Projector(nn.Module):
    """Applies LayerNorm to each feature, appends codes of boxes, then a two-layer MLP with GELU.

    Serves image tokens (with the boxes of their cell and of what they belong to) and regions (with
    their box). All boxes are in the original image's frame, so that the language model never has to
    undo the padding.
    """

    def __init__(
        self,
        feature_dims: Sequence[int],
        output_dim: int,
        output_std: float = 0.02,
        num_boxes: int = 1,
        hidden_dim: int = 0,
    ) -> None:
        """Builds a projector. `hidden_dim` 0 is `output_dim`; `feature_dims` [] is boxes alone."""
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in feature_dims)
        hidden_dim = hidden_dim or output_dim
        self.hidden = nn.Linear(sum(feature_dims) + num_boxes * _CODE_DIM, hidden_dim)
        self.output = nn.Linear(hidden_dim, output_dim)
        self.reset(output_std)

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Projects `features` float[..., D_i] and `boxes` float[..., 4] (0..1) to float[..., H]."""
        inputs = _coded(self.norms, features, boxes, self.output.weight.dtype)
        return self.output(F.gelu(self.hidden(inputs)))

    @torch.no_grad()
    def reset(self, output_std: float) -> None:
        """Initialises so that outputs have about the scale of the word embeddings they join."""
        _reset(self.hidden)
        _reset(self.output, output_std / _GELU_RMS)


class LinearProjector(nn.Module):
    """A `Projector` without a hidden layer: LayerNorm, codes, one matrix."""

    def __init__(
        self, feature_dims: Sequence[int], output_dim: int, output_std: float, num_boxes: int
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in feature_dims)
        self.output = nn.Linear(sum(feature_dims) + num_boxes * _CODE_DIM, output_dim)
        self.reset(output_std)

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Projects as `Projector.forward` does."""
        return self.output(_coded(self.norms, features, boxes, self.output.weight.dtype))

    @torch.no_grad()
    def reset(self, output_std: float) -> None:
        _reset(self.output, output_std)


class PixelShuffleProjector(nn.Module):
    """A `Projector` of what `merge_neighbours` makes of the tokens: M is N / 4."""

    def __init__(self, grid_hw: tuple[int, int], merged: Projector) -> None:
        """`merged` projects four times the features and 4 num_boxes - 3 boxes."""
        super().__init__()
        self.grid_hw = grid_hw
        self.merged = merged

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Projects `features` float[B, N, D_i] and `boxes` float[B, N, 4], of which the cells are
        first, to float[B, N / 4, H]."""
        features = [merge_neighbours(feature, self.grid_hw).flatten(2) for feature in features]
        cells, *others = (merge_neighbours(token_boxes, self.grid_hw) for token_boxes in boxes)
        merged_cell = torch.cat([cells[:, :, 0, :2], cells[:, :, -1, 2:]], -1)
        # four tokens may belong to several things; the box of each is kept
        separate = [box for four in others for box in four.unbind(2)]
        return self.merged(features, [merged_cell, *separate])

    def reset(self, output_std: float) -> None:
        self.merged.reset(output_std)


class Resampler(nn.Module):
    """Q learnt queries attend to all image tokens, once (Qwen-VL, arXiv 2308.12966): M is Q.

    They attend to what `Projector` reads, codes of places included, so an answer may say where.
    A two-layer MLP follows.
    """

    def __init__(
        self,
        feature_dims: Sequence[int],
        output_dim: int,
        num_queries: int,
        output_std: float,
        num_boxes: int,
        hidden_dim: int,
    ) -> None:
        """`hidden_dim` is the width of the attention and the MLP; 0 is `output_dim`."""
        super().__init__()
        width = hidden_dim or output_dim
        self.num_heads = next(n for n in range(max(1, width // _HEAD_DIM), 0, -1) if width % n == 0)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in feature_dims)
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.query = nn.Linear(width, width)
        input_dim = sum(feature_dims) + num_boxes * _CODE_DIM
        self.key = nn.Linear(input_dim, width, bias=False)  # softmax would cancel a bias
        self.value = nn.Linear(input_dim, width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, output_dim)
        self.reset(output_std)

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Projects `features` float[B, N, D_i] and `boxes` float[B, N, 4] to float[B, Q, H]."""
        inputs = _coded(self.norms, features, boxes, self.output.weight.dtype)
        queries = self.query(self.queries).expand(len(inputs), -1, -1)
        heads = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (queries, self.key(inputs), self.value(inputs))
        )
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.output(F.gelu(self.hidden(self.norm(self.queries + attended))))

    @torch.no_grad()
    def reset(self, output_std: float) -> None:
        for layer in (self.query, self.key, self.value, self.hidden):
            _reset(layer)
        _reset(self.output, output_std / _GELU_RMS)


ImageProjector = Projector | LinearProjector | PixelShuffleProjector | Resampler


def build_image_projector(
    config: ClocMllmConfig, feature_dims: Sequence[int], num_boxes: int, grid_hw: tuple[int, int]
) -> ImageProjector:
    """Builds the projector of image tokens. A token has `num_boxes` boxes, the cell first."""
    width, hidden = config.text_config.hidden_size, config.projector_width
    std = word_std(config)
    if config.projector == "linear":
        return LinearProjector(feature_dims, width, std, num_boxes)
    if config.projector == "resampler":
        return Resampler(feature_dims, width, config.num_queries, std, num_boxes, hidden)
    if config.projector == "pixel_shuffle":
        merged = _MERGED_SIDE**2
        dims = [merged * dim for dim in feature_dims]
        num_boxes = 1 + merged * (num_boxes - 1)
        return PixelShuffleProjector(grid_hw, Projector(dims, width, std, num_boxes, hidden))
    return Projector(feature_dims, width, std, num_boxes, hidden)


def word_std(config: ClocMllmConfig) -> float:
    """The standard deviation of the word embeddings that the language model starts with."""
    return getattr(config.text_config, "initializer_range", 0.02)


def num_image_tokens(projector: str, grid_hw: tuple[int, int], num_queries: int) -> int:
    """M, the number of tokens of the language model that an image takes.

    Raises:
        ValueError: the grid cannot be merged.
    """
    height, width = grid_hw
    if projector == "resampler":
        return num_queries
    if projector != "pixel_shuffle":
        return height * width
    if height % _MERGED_SIDE or width % _MERGED_SIDE:
        raise ValueError(
            f"pixel_shuffle merges {_MERGED_SIDE} x {_MERGED_SIDE} tokens, but the encoder has "
            f"{height} x {width}; set model.projector to mlp or resampler, or train stage 1 at "
            "an image_size of an even number of patches"
        )
    return height * width // _MERGED_SIDE**2


def merge_neighbours(tokens: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """Groups each 2 x 2 square of the grid: float[B, N, D] -> float[B, N / 4, 4, D].

    Squares, and the neighbours in each, are in row-major order.
    """
    height, width = (side // _MERGED_SIDE for side in grid_hw)
    squares = tokens.unflatten(1, (height, _MERGED_SIDE, width, _MERGED_SIDE)).transpose(2, 3)
    return squares.flatten(3, 4).flatten(1, 2)


def _coded(
    norms: nn.ModuleList, features: Sequence[Tensor], boxes: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """Joins normalised features and the codes of boxes: float[..., sum D_i + codes]."""
    normed = [norm(feature) for norm, feature in zip(norms, features, strict=True)]
    codes = [sinusoidal_code(b.float().clamp(*_CODE_RANGE), _CODE_DIM) for b in boxes]
    return torch.cat([*normed, *(code.to(dtype) for code in codes)], -1)


def _reset(layer: nn.Linear, gain: float = 1.0) -> None:
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


_GELU_RMS = 0.65  # root mean square of gelu of a unit normal


def to_original_frame(canvas_boxes: Tensor, image_frame: Tensor) -> Tensor:
    """Moves boxes of the canvas to normalised boxes of the original image.

    Args:
        canvas_boxes: float[..., 4] xyxy, canvas frame.
        image_frame: float[..., 4], the whole canvas as a box in the original's normalised frame
            (so it reaches outside 0..1 where the canvas is padding).
    """
    top_left, bottom_right = image_frame[..., :2], image_frame[..., 2:]
    size = bottom_right - top_left
    return torch.cat([top_left, top_left], -1) + canvas_boxes * torch.cat([size, size], -1)


def to_canvas_frame(boxes: Tensor, image_frame: Tensor) -> Tensor:
    """The inverse of `to_original_frame`."""
    top_left, bottom_right = image_frame[..., :2], image_frame[..., 2:]
    size = bottom_right - top_left
    return (boxes - torch.cat([top_left, top_left], -1)) / torch.cat([size, size], -1)
