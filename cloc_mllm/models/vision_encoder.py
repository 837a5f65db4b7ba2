"""Runs the image tower f_I and returns its tokens f_I' before pooling and projection, too.

Letters: B images, N tokens, D token width, E embedding width, S canvas side in pixels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cloc_mllm.models.attention import fast_attention


class ImageFeatures(NamedTuple):
    """An encoded batch of images, which every prompt reuses.

    Attributes:
        image_features: float[B, E], open_clip's own: pooled and projected, not normalised.
        tokens: float[B, N, D], before pooling and projection.
        grid_hw: rows and columns the N tokens stand on.
    """

    image_features: Tensor
    tokens: Tensor
    grid_hw: tuple[int, int]


class VisionEncoder(nn.Module):
    """An open_clip image tower (native ViT or timm) that also returns its tokens.

    Attributes:
        image_size: S.
        embed_dim, token_dim: E and D.
        grid_hw: rows and columns that the N tokens stand on.
    """

    visual: Any
    token_dim: int

    def __init__(self, visual: Any, image_size: int, embed_dim: int) -> None:
        super().__init__()
        self.visual = visual
        self.image_size = image_size
        self.embed_dim = embed_dim
        self.is_timm = hasattr(visual, "trunk")
        if not self.is_timm and not hasattr(visual, "forward_intermediates"):
            raise ValueError(
                f"image tower {type(visual).__name__} has no token output; "
                "use a ViT or a timm tower of open_clip"
            )
        if self.is_timm:
            self.token_dim = visual.trunk.num_features
            self.grid_hw = self._timm_grid()
        else:
            self.token_dim = visual.transformer.width
            height, width = visual.grid_size
            self.grid_hw = (int(height), int(width))

    def forward(self, pixel_values: Tensor) -> ImageFeatures:
        """Encodes `pixel_values: float[B, 3, S, S]`, normalised with the model's mean and std.

        Raises:
            ValueError: the images have another shape.
        """
        expected = (3, self.image_size, self.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"expected pixel_values[B, {', '.join(map(str, expected))}], "
                f"got {tuple(pixel_values.shape)}"
            )
        with fast_attention(self.visual, pixel_values):
            if self.is_timm:
                return self._forward_timm(pixel_values)
            return self._forward_native(pixel_values)

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Applies CLIP's own projection to every token: float[B, N, D] -> float[B, N, E]."""
        tokens = tokens.to(next(self.parameters()).dtype)
        if self.is_timm:
            return self.visual.head(tokens)
        return tokens if self.visual.proj is None else tokens @ self.visual.proj

    def _forward_native(self, pixel_values: Tensor) -> ImageFeatures:
        out = self.visual.forward_intermediates(
            pixel_values,
            indices=1,
            normalize_intermediates=True,
            output_fmt="NLC",
        )
        return ImageFeatures(out["image_features"], out["image_intermediates"][-1], self.grid_hw)

    def _forward_timm(self, pixel_values: Tensor) -> ImageFeatures:
        # On a CPU fp32 convolutions run twice as fast in this layout. The weights stay as they are,
        # because DeepSpeed broadcasts only contiguous ones.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        features = self.visual.trunk.forward_features(pixel_values)
        pooled = self.visual.head(self.visual.trunk.forward_head(features))
        if features.ndim == 4:
            tokens = features.flatten(2).transpose(1, 2)
        else:
            tokens = features[:, self.visual.trunk.num_prefix_tokens :]
        return ImageFeatures(pooled, tokens, self.grid_hw)

    def _timm_grid(self) -> tuple[int, int]:
        """The grid of a timm trunk, from its patch grid or its total stride."""
        patch_embed = getattr(self.visual.trunk, "patch_embed", None)
        grid = getattr(patch_embed, "grid_size", None)
        if grid is not None:
            return int(grid[0]), int(grid[1])
        stride = self.visual.trunk.feature_info[-1]["reduction"]
        side = -(-self.image_size // stride)
        return side, side


def freeze_batch_norm_statistics(module: nn.Module) -> None:
    """Keeps the running statistics of every batch norm fixed, also in `train()` mode.

    Call it after each `.train()`: ranks would otherwise drift apart, since each sees other images.
    """
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()
