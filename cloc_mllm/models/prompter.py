"""Prompter(l, f_I'(x)) -> z: one single-head transformer layer over prompt and image tokens.

Letters: B images, N image tokens, D the layer's width, E embedding width, R prompts (packed
over the batch), K tokens of one prompt. Source: section 3.3 and figure 2 of the paper; the
spatial prior and the `prompt` readout are ours.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloc_mllm.models.position import cell_coverage, sinusoidal_code, token_cells
from cloc_mllm.models.vision_encoder import ImageFeatures

_BOX_GATE_START = 4.0
_TEXT_GATE_START = 15.0
_NEARNESS = 0.15  # standard deviation, in canvas sides, of "near the token" (`locate_tokens`)


class ImageContext(NamedTuple):
    """What all prompts of an image share: tokens with position, their keys and values."""

    tokens: Tensor  # float[B, N, D]
    keys: Tensor  # float[B, N, D]
    values: Tensor  # float[B, N, D]


class Prompter(nn.Module):
    """Turns a prompt (box or text) and the image tokens into an embedding of CLIP's width.

    Args:
        width: D of the layer; tokens of another width are normalised and projected to it first.
        readout: `mean` averages all output tokens (the paper); `prompt` averages the prompt's
            own output tokens, so only those are computed and keys and values are shared.
        spatial_prior: adds a learnable gate times the overlap of token and box (box prompts) or
            the cosine of text and token embedding (text prompts) to the prompt's attention.
    """

    def __init__(
        self,
        token_dim: int,
        embed_dim: int,
        *,
        width: int,
        readout: Literal["mean", "prompt"] = "mean",
        spatial_prior: bool = True,
    ) -> None:
        super().__init__()
        self.readout = readout
        self.spatial_prior = spatial_prior
        self.code_dim = 8 * max(1, width // 8)
        self.adapt: nn.Module = nn.Identity()
        if width != token_dim:
            self.adapt = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, width))
        self.position = nn.Linear(self.code_dim, width)
        self.corners = nn.Linear(self.code_dim, 2 * width)
        self.text_norm = nn.LayerNorm(embed_dim)
        self.text_token = nn.Linear(embed_dim, width)
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.projection = nn.Linear(width, embed_dim, bias=False)
        if spatial_prior:
            self.box_gate = nn.Parameter(torch.tensor([_BOX_GATE_START]))
            self.text_gate = nn.Parameter(torch.tensor([_TEXT_GATE_START]))

    def prepare(self, image: ImageFeatures) -> ImageContext:
        """Add positions and compute keys and values, once per image."""
        cells = token_cells(image.grid_hw, image.tokens.device)
        tokens = self.adapt(image.tokens) + self.position(self._code(cells))
        normed = self.norm_attention(tokens)
        return ImageContext(tokens, self.key(normed), self.value(normed))

    def embed_boxes(
        self, image: ImageFeatures, context: ImageContext, boxes: Tensor, image_index: Tensor
    ) -> Tensor:
        """z of box prompts: `boxes: float[R, 4]` canvas frame -> float[R, E]."""
        prompts = self.corners(self._code(boxes)).unflatten(-1, (2, -1))
        bias = None
        if self.spatial_prior:
            cells = token_cells(image.grid_hw, boxes.device)
            bias = self.box_gate * cell_coverage(boxes, cells)
        return self._attend(prompts, context, image_index, bias)

    def embed_texts(
        self, context: ImageContext, text_features: Tensor, image_index: Tensor
    ) -> Tensor:
        """z of text prompts: `text_features: float[R, E]` -> float[R, E]."""
        prompts = self.text_token(self.text_norm(text_features)).unsqueeze(1)
        bias = None
        if self.spatial_prior:
            token_embeddings = F.normalize(self.embed_tokens(context), dim=-1)[image_index]
            text = F.normalize(text_features, dim=-1)
            bias = self.text_gate * torch.einsum("rne,re->rn", token_embeddings, text)
        return self._attend(prompts, context, image_index, bias)

    def locate_tokens(self, image: ImageFeatures, context: ImageContext) -> Tensor:
        """z of every image token's own embedding, taken as a text prompt: float[B, N, E].

        Attention is held near the token, or two things of one kind would answer together.
        """
        num_images, num_tokens = image.tokens.shape[:2]
        cells = token_cells(image.grid_hw, image.tokens.device)
        centres = (cells[:, :2] + cells[:, 2:]) / 2
        embeddings = self.embed_tokens(context)
        bias = -torch.cdist(centres, centres).square() / (2 * _NEARNESS**2)
        bias = bias.to(embeddings.dtype).expand(num_images, -1, -1)
        if self.spatial_prior:
            normed = F.normalize(embeddings, dim=-1)
            bias = bias + self.text_gate * normed @ normed.transpose(1, 2)
        prompts = self.text_token(self.text_norm(embeddings)).flatten(0, 1).unsqueeze(1)
        of_image = torch.arange(num_images, device=cells.device).repeat_interleave(num_tokens)
        z = self._attend(prompts, context, of_image, bias.flatten(0, 1))
        return z.unflatten(0, (num_images, num_tokens))

    def embed_tokens(self, context: ImageContext) -> Tensor:
        """Every image token read out as if it were a region: float[B, N, E]."""
        attended = self.output(context.values)
        return self.projection(attended + self.mlp(self.norm_mlp(attended)))

    def _code(self, boxes: Tensor) -> Tensor:
        return sinusoidal_code(boxes, self.code_dim).to(self.position.weight.dtype)

    def _attend(
        self, prompts: Tensor, context: ImageContext, image_index: Tensor, bias: Tensor | None
    ) -> Tensor:
        """One transformer layer over [prompt, image] tokens, pooled and projected.

        Args:
            prompts: float[R, K, D].
            image_index: int64[R], the image of each prompt.
            bias: float[R, N] added to the attention of prompt tokens over image tokens.
        """
        normed = self.norm_attention(prompts)
        keys = torch.cat([self.key(normed), context.keys[image_index]], 1)
        values = torch.cat([self.value(normed), context.values[image_index]], 1)
        if self.readout == "prompt":
            outputs = self._layer(prompts, normed, keys, values, bias)
        else:
            # the image tokens see the prompt too, so the whole layer runs for every prompt
            image_tokens = context.tokens[image_index]
            outputs = torch.cat(
                [
                    self._layer(prompts, normed, keys, values, bias),
                    self._layer(
                        image_tokens, self.norm_attention(image_tokens), keys, values, None
                    ),
                ],
                1,
            )
        return self.projection(outputs.mean(1))

    def _layer(
        self, tokens: Tensor, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
    ) -> Tensor:
        logits = self.query(normed) @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        if bias is not None:
            num_prompt_tokens = keys.shape[1] - bias.shape[1]
            logits = logits + F.pad(bias, (num_prompt_tokens, 0)).unsqueeze(1)
        attended = tokens + self.output(logits.softmax(-1) @ values)
        return attended + self.mlp(self.norm_mlp(attended))
