"""Runs the image tower f_I and returns its tokens f_I' before pooling and projection, too.

Letters: B images, N tokens, D token width (of all scales together), E embedding width, S canvas
side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.models.attention import fast_attention
from cloc_mllm.models.hf_towers import HfVisionTower


class ImageFeatures(NamedTuple):
    """An encoded batch of images, which every prompt reuses.

    Attributes:
        image_features: float[B, E], open_clip's own: pooled and projected, not normalised.
        tokens: float[B, N, D], before pooling and projection. Of a tower with several scales they
            are side by side, the finest first: D is the sum of `VisionEncoder.token_dims`.
        grid_hw: rows and columns the N tokens stand on.
        prepared: what `RegionEncoder.prepare` computed of the tokens for all prompts to come; None
            if each prompt computes it again.
    """

    image_features: Tensor
    tokens: Tensor
    grid_hw: tuple[int, int]
    prepared: Any = None


@dataclass(frozen=True)
class TowerOutputs:
    """What an image tower computes before its last linear map, for B images.

    Attributes:
        pooled: float[B, P], what `VisionEncoder.join` projects to E; of towers without a linear
            head of their own, float[B, E].
        scales: float[B, N_i, D_i], tokens of each scale on its own grid, the finest first.
    """

    pooled: Tensor
    scales: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def device(self) -> torch.device:
        return self.pooled.device

    def to(self, *args: Any, **options: Any) -> TowerOutputs:
        return TowerOutputs(
            self.pooled.to(*args, **options), tuple(x.to(*args, **options) for x in self.scales)
        )

    def pin_memory(self) -> TowerOutputs:
        return TowerOutputs(self.pooled.pin_memory(), tuple(x.pin_memory() for x in self.scales))


class VisionEncoder(nn.Module):
    """An image tower of open_clip (ViT, ResNet, timm) or Transformers that also returns its tokens.

    Args:
        preprocessing: what its pixels go through before.
        token_strides: pixels per token side of each scale, the finest first and the tower's last
            one at the end; () is the last one alone. The tokens stand on the finest grid, where
            those of coarser scales are repeated.

    Attributes:
        preprocessing, image_size: what its pixels go through, and S.
        embed_dim, token_dim: E and D.
        token_dims: widths of the scales of a token.
        grid_hw: rows and columns that the N tokens stand on.

    Raises:
        ValueError: the tower has no token output, or not at these strides.
    """

    visual: Any

    def __init__(
        self,
        visual: Any,
        preprocessing: Preprocessing,
        embed_dim: int,
        token_strides: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.visual = visual
        self.preprocessing = preprocessing
        self.image_size = image_size = preprocessing.size
        self.embed_dim = embed_dim
        self.is_timm = hasattr(visual, "trunk")
        self.is_resnet = hasattr(visual, "attnpool")
        self.is_hf = isinstance(visual, HfVisionTower)
        if not self.is_timm and not self.is_hf and not hasattr(visual, "forward_intermediates"):
            raise ValueError(
                f"image tower {type(visual).__name__} has no token output; "
                "use a ViT, a ResNet or a timm tower of open_clip"
            )
        scales = self._scales()
        last = max(scales)
        strides = tuple(token_strides) or (last,)
        if strides != tuple(sorted({*strides} & {*scales})) or strides[-1] != last:
            raise ValueError(
                f"model.token_strides is {list(strides)}, but this image tower has tokens of "
                f"strides {', '.join(map(str, scales))}; give some of them in this order, with "
                f"{last} at the end"
            )
        if len(strides) > 1 and image_size % last:
            raise ValueError(
                f"model.image_size is {image_size}; with several model.token_strides it must be a "
                f"multiple of the largest, {last}"
            )
        self.token_strides = strides
        self.token_dims = tuple(scales[stride].dim for stride in strides)
        self._levels = [scales[stride].level for stride in strides[:-1]]
        self.grid_hw = self._own_grid()
        if len(strides) > 1:
            self.grid_hw = image_size // strides[0], image_size // strides[0]

    @property
    def token_dim(self) -> int:
        return sum(self.token_dims)

    def forward(self, pixel_values: Tensor) -> ImageFeatures:
        """Encodes `pixel_values: float[B, 3, S, S]`, normalised with the model's mean and std.

        Raises:
            ValueError: the images have another shape.
        """
        return self.join(self.run_tower(pixel_values))

    def join(self, outputs: TowerOutputs) -> ImageFeatures:
        """Projects what the tower pooled and lays its scales side by side, as `forward` does."""
        pooled = outputs.pooled
        if self.is_timm or self.is_hf:
            pooled = (self.visual.head if self.is_timm else self.visual.projection)(pooled)
        return ImageFeatures(pooled, self._side_by_side(outputs.scales), self.grid_hw)

    def run_tower(self, pixel_values: Tensor) -> TowerOutputs:
        """Computes all of `forward` that does not depend on the head of the tower.

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
            if self.is_resnet:
                return self._forward_resnet(pixel_values)
            if self.is_hf:
                pooled, tokens = self.visual(pixel_values)
                return TowerOutputs(pooled, (tokens,))
            return self._forward_native(pixel_values)

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Applies CLIP's own projection to every token of the last scale:
        float[B, N, D] -> float[B, N, E]."""
        tokens = tokens[..., -self.token_dims[-1] :].to(next(self.parameters()).dtype)
        if self.is_timm:
            return self.visual.head(tokens)
        if self.is_hf:
            return self.visual.project_tokens(tokens)
        if self.is_resnet:  # attention pooling that attends to this token alone
            pool = self.visual.attnpool
            return pool.c_proj(pool.v_proj(tokens))
        return tokens if self.visual.proj is None else tokens @ self.visual.proj

    def _forward_native(self, pixel_values: Tensor) -> TowerOutputs:
        out = self.visual.forward_intermediates(
            pixel_values,
            indices=1,
            normalize_intermediates=True,
            output_fmt="NLC",
        )
        return TowerOutputs(out["image_features"], (out["image_intermediates"][-1],))

    def _forward_resnet(self, pixel_values: Tensor) -> TowerOutputs:
        out = self.visual.forward_intermediates(pixel_values, indices=[*self._levels, 4])
        return TowerOutputs(
            out["image_features"], tuple(_tokens_of(x) for x in out["image_intermediates"])
        )

    def _forward_timm(self, pixel_values: Tensor) -> TowerOutputs:
        # On a CPU fp32 convolutions run twice as fast in this layout. The weights stay as they are,
        # because DeepSpeed broadcasts only contiguous ones.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        trunk = self.visual.trunk
        finer: list[Tensor] = []
        if self._levels:
            features, finer = trunk.forward_intermediates(
                pixel_values, indices=self._levels, norm=False, output_fmt="NCHW"
            )
        else:
            features = trunk.forward_features(pixel_values)
        pooled = trunk.forward_head(features)
        if features.ndim == 3:
            last = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
        else:
            is_channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
            last = features.flatten(1, 2) if is_channels_last else _tokens_of(features)
        return TowerOutputs(pooled, (*map(_tokens_of, finer), last))

    def _side_by_side(self, scales: Sequence[Tensor]) -> Tensor:
        """Repeats `float[B, N_i, D_i]` on the finest grid and joins them: float[B, N, D]."""
        if len(scales) == 1:
            return scales[0]
        repeated = []
        for tokens, stride in zip(scales, self.token_strides, strict=True):
            side, times = self.image_size // stride, stride // self.token_strides[0]
            grid = tokens.unflatten(1, (side, side))
            repeated.append(grid.repeat_interleave(times, 1).repeat_interleave(times, 2))
        return torch.cat(repeated, -1).flatten(1, 2)

    def _scales(self) -> dict[int, _Scale]:
        """What the tower can give, by stride; of levels with one stride the last."""
        if self.is_timm:
            trunk = self.visual.trunk
            levels = [(of["reduction"], of["num_chs"]) for of in trunk.feature_info]
            scales = {stride: _Scale(dim, i) for i, (stride, dim) in enumerate(levels)}
            return scales | {max(scales): _Scale(trunk.num_features, len(levels) - 1)}
        if self.is_resnet:
            width = self.visual.attnpool.v_proj.in_features
            return {4 * 2**i: _Scale(width // 2 ** (3 - i), i + 1) for i in range(4)}
        width = self.visual.width if self.is_hf else self.visual.transformer.width
        return {self.visual.patch_size[0]: _Scale(width, 0)}

    def _own_grid(self) -> tuple[int, int]:
        """Rows and columns of the last scale: of a ViT those of its patches, else by the stride."""
        has_one_scale = self.is_timm and len(self._scales()) == 1
        trunk = self.visual.trunk if has_one_scale else None
        patches = getattr(trunk, "patch_embed", None) if self.is_timm else self.visual
        if patches is not None and hasattr(patches, "grid_size"):
            height, width = patches.grid_size
            return int(height), int(width)
        side = -(-self.image_size // self.token_strides[-1])
        return side, side


class _Scale(NamedTuple):
    """Tokens of one stride: their width, and the tower's index of the level that gives them."""

    dim: int
    level: int


def _tokens_of(level: Tensor) -> Tensor:
    """float[B, D, H, W] -> float[B, H * W, D]."""
    return level.flatten(2).transpose(1, 2)


def freeze_batch_norm_statistics(module: nn.Module) -> None:
    """Keeps the running statistics of every batch norm fixed, also in `train()` mode.

    Call it after each `.train()`: ranks would otherwise drift apart, since each sees other images.
    """
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()
