"""Prompter(l, f_I'(x)) -> z: one single-head transformer layer over prompt and image tokens.

Letters: B images, N image tokens, D the layer's width, E embedding width, R prompts (packed
over the batch), K tokens of one prompt. Source: section 3.3 and figure 2 of the paper; the
spatial prior and the `prompt` readout are ours.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloc_mllm.config import PrompterConfig
from cloc_mllm.models.mean_readout import ImageOutputs, MlpStart, summed_hidden
from cloc_mllm.models.position import (
    cell_coverage,
    mask_boxes,
    mask_coverage,
    sinusoidal_code,
    token_cells,
)
from cloc_mllm.models.vision_encoder import ImageFeatures

_BOX_GATE_START = 4.0
_TEXT_GATE_START = 15.0
_NEARNESS = 0.15  # standard deviation, in canvas sides, of "near the token" (`locate_tokens`)


class ImageContext(NamedTuple):
    """What all prompts of an image share: tokens with position, their keys and values, and for
    the `mean` readout what the layer makes of them."""

    tokens: Tensor  # float[B, N, D]
    keys: Tensor  # float[B, N, D]
    values: Tensor  # float[B, N, D]
    outputs: ImageOutputs | None = None


class Prompter(nn.Module):
    """Turns a prompt (box, mask or text) and the image tokens into an embedding of CLIP's width.

    What the settings do: `PrompterConfig`. Tokens of another width than the layer are normalised
    and projected to it first. With either readout, what prompts of an image have in common is
    computed once. Without `free_form`, `embed_masks` knows only a mask's bounding box and prior.
    """

    def __init__(self, token_dim: int, embed_dim: int, config: PrompterConfig) -> None:
        super().__init__()
        width = config.width or token_dim
        self.readout = config.readout
        self.text_prior = config.text_prior
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
        self.box_gate: nn.Parameter | None = None
        self.text_gate: nn.Parameter | None = None
        if config.spatial_prior in ("both", "box"):
            self.box_gate = nn.Parameter(torch.tensor([_BOX_GATE_START]))
        if config.spatial_prior in ("both", "text"):
            self.text_gate = nn.Parameter(torch.tensor([_TEXT_GATE_START]))
        self.mask: nn.Linear | None = None
        if config.free_form:
            self.mask = nn.Linear(self.code_dim, 2 * width)

    def prepare(self, image: ImageFeatures) -> ImageContext:
        """Add positions and compute keys and values, once per image."""
        cells = token_cells(image.grid_hw, image.tokens.device)
        tokens = self.adapt(image.tokens) + self.position(self._code(cells))
        normed = self.norm_attention(tokens)
        keys, values = self.key(normed), self.value(normed)
        if self.readout == "prompt":
            return ImageContext(tokens, keys, values)
        queries = self.query(normed)
        logits = queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        attended = self.output(logits.softmax(-1) @ values)
        outputs = ImageOutputs.of(tokens, logits, queries, attended, self._mlp_start)
        return ImageContext(tokens, keys, values, outputs)

    @property
    def _mlp_start(self) -> MlpStart:
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        return MlpStart(self.norm_mlp, first)

    def embed_boxes(
        self, image: ImageFeatures, context: ImageContext, boxes: Tensor, image_index: Tensor
    ) -> Tensor:
        """z of box prompts: `boxes: float[R, 4]` canvas frame -> float[R, E]."""
        grid = _PromptGrid.of(image_index, len(context.tokens))
        return grid.pack(self.embed_box_grid(image, context, grid.spread(boxes)))

    def embed_box_grid(self, image: ImageFeatures, context: ImageContext, boxes: Tensor) -> Tensor:
        """z of Q box prompts for each image: float[B, Q, 4] canvas frame -> float[B, Q, E]."""
        prompts = self.corners(self._code(boxes)).unflatten(-1, (2, -1))
        bias = None
        if self.box_gate is not None:
            cells = token_cells(image.grid_hw, boxes.device)
            coverage = cell_coverage(boxes.flatten(0, 1), cells)
            bias = self.box_gate * coverage.unflatten(0, boxes.shape[:2])
        return self._attend(prompts, context, bias)

    def embed_masks(
        self, image: ImageFeatures, context: ImageContext, masks: Tensor, image_index: Tensor
    ) -> Tensor:
        """z of points, scribbles, masks and sets of boxes: float[R, H, W] in 0..1 over the canvas
        -> float[R, E].

        Prompt tokens are those of the mask's bounding box, plus a map of the mean position code of
        what it covers: the code that stands for a box by its corners, taken over an area.
        """
        cells = token_cells(image.grid_hw, masks.device)
        coverage = mask_coverage(masks, image.grid_hw)
        prompts = self.corners(self._code(mask_boxes(masks)))
        if self.mask is not None:
            share = coverage / coverage.sum(1, keepdim=True).clamp(min=1e-6)
            code = self._code(cells)
            prompts = prompts + self.mask(share.to(code.dtype) @ code)
        grid = _PromptGrid.of(image_index, len(context.tokens))
        bias = None if self.box_gate is None else self.box_gate * grid.spread(coverage)
        return grid.pack(self._attend(grid.spread(prompts).unflatten(-1, (2, -1)), context, bias))

    def embed_texts(
        self, context: ImageContext, text_features: Tensor, image_index: Tensor
    ) -> Tensor:
        """z of text prompts: `text_features: float[R, E]` -> float[R, E]."""
        grid = _PromptGrid.of(image_index, len(context.tokens))
        texts = grid.spread(text_features)
        prompts = self.text_token(self.text_norm(texts)).unsqueeze(2)
        bias = None
        if self.text_gate is not None:
            bias = self.text_gate * self._similarity(texts, context)
        return grid.pack(self._attend(prompts, context, bias))

    def locate_tokens(self, image: ImageFeatures, context: ImageContext) -> Tensor:
        """z of every image token's own embedding, taken as a text prompt: float[B, N, E].

        Attention is held near the token, or two things of one kind would answer together.
        """
        cells = token_cells(image.grid_hw, image.tokens.device)
        centres = (cells[:, :2] + cells[:, 2:]) / 2
        embeddings = self.embed_tokens(context)
        near = -torch.cdist(centres, centres).square() / (2 * _NEARNESS**2)
        bias = near.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        if self.text_gate is not None:
            bias = bias + self.text_gate * self._similarity(embeddings, context, embeddings)
        prompts = self.text_token(self.text_norm(embeddings)).unsqueeze(2)
        return self._attend(prompts, context, bias)

    def embed_tokens(self, context: ImageContext) -> Tensor:
        """Every image token read out as if it were a region: float[B, N, E]."""
        attended = self.output(context.values)
        return self.projection(attended + self.mlp(self.norm_mlp(attended)))

    def _similarity(
        self, texts: Tensor, context: ImageContext, embeddings: Tensor | None = None
    ) -> Tensor:
        """Cosine of `texts: float[B, Q, E]` and the image tokens: float[B, Q, N].

        `embeddings`: `embed_tokens` of the context where the caller has it.
        """
        if self.text_prior == "linear":
            weight = self.projection.weight  # times the output's first: one product, not two
            by_output = weight @ self.output.weight, weight @ self.output.bias
            tokens = F.linear(context.values, *by_output)
        else:
            tokens = self.embed_tokens(context) if embeddings is None else embeddings
        return F.normalize(texts, dim=-1) @ F.normalize(tokens, dim=-1).transpose(1, 2)

    def _code(self, boxes: Tensor) -> Tensor:
        return sinusoidal_code(boxes, self.code_dim).to(self.position.weight.dtype)

    def _attend(self, prompts: Tensor, context: ImageContext, bias: Tensor | None) -> Tensor:
        """The layer over [prompt, image] tokens for each prompt, pooled and projected.

        Letters: Q prompts of each image.

        Args:
            prompts: float[B, Q, K, D].
            bias: float[B, Q, N], added to the attention of prompt tokens over image tokens.

        Returns:
            float[B, Q, E].
        """
        num_own, width = prompts.shape[-2:]
        normed = self.norm_attention(prompts)
        queries, own_keys, own_values = self.query(normed), self.key(normed), self.value(normed)
        to_image = _shared_product(queries, context.keys.transpose(1, 2)) / math.sqrt(width)
        if bias is not None:
            to_image = to_image + bias.unsqueeze(2)
        to_own = queries @ own_keys.transpose(2, 3) / math.sqrt(width)
        weights = torch.cat([to_own, to_image], -1).softmax(-1)
        mixed = weights[..., :num_own] @ own_values
        mixed = mixed + _shared_product(weights[..., num_own:], context.values)
        attended = prompts + self.output(mixed)
        outputs = (attended + self.mlp(self.norm_mlp(attended))).sum(2)
        num_tokens = num_own
        if context.outputs is not None:
            outputs = outputs + self._sum_image_tokens(context, own_keys, own_values)
            num_tokens += context.tokens.shape[1]
        return self.projection(outputs / num_tokens)

    def _sum_image_tokens(
        self, context: ImageContext, own_keys: Tensor, own_values: Tensor
    ) -> Tensor:
        """The layer's outputs at the image tokens, which see the prompt too, summed.

        `own_keys, own_values: float[B, Q, K, D]` -> float[B, Q, D]; see `mean_readout`.
        """
        image = context.outputs
        assert image is not None
        num_tokens, width = context.tokens.shape[1:]
        to_own = image.queries @ own_keys.flatten(1, 2).transpose(1, 2) / math.sqrt(width)
        to_own = to_own.unflatten(-1, own_keys.shape[1:3]).transpose(1, 2)
        to_image = image.log_sums[:, None, :, None].expand_as(to_own[..., :1])
        weights = torch.cat([to_own, to_image], -1).softmax(-1)
        own = self.output(own_values)
        attended = weights[..., -1] @ image.attended
        attended = attended + (weights[..., :-1].sum(2).unsqueeze(2) @ own).squeeze(2)
        hidden = summed_hidden(image, own, weights, self.norm_mlp.eps)
        summed = context.tokens.sum(1, keepdim=True) + attended
        return summed + num_tokens * self.mlp[2](hidden / num_tokens)


class _PromptGrid(NamedTuple):
    """Where packed prompts stand when each image has a row of places, as many as any has prompts.

    So an image's tokens, keys and values serve its prompts without a copy for each.
    """

    image_index: Tensor  # int64[R]
    place: Tensor  # int64[R]
    shape: tuple[int, int]  # B, Q

    @classmethod
    def of(cls, image_index: Tensor, num_images: int) -> _PromptGrid:
        counts = image_index.bincount(minlength=num_images)
        order = image_index.argsort(stable=True)
        first = (counts.cumsum(0) - counts)[image_index]
        place = order.argsort() - first
        return cls(image_index, place, (num_images, int(counts.max())))

    def spread(self, packed: Tensor) -> Tensor:
        """float[R, X] -> float[B, Q, X], zeros at empty places."""
        grid = packed.new_zeros(*self.shape, packed.shape[1])
        return grid.index_put((self.image_index, self.place), packed)

    def pack(self, grid: Tensor) -> Tensor:
        """float[B, Q, X] -> float[R, X]."""
        return grid[self.image_index, self.place]


def _shared_product(a: Tensor, b: Tensor) -> Tensor:
    """`a: float[B, Q, K, X]` times `b: float[B, X, Y]`, b shared by the Q: float[B, Q, K, Y]."""
    return (a.flatten(1, 2) @ b).unflatten(1, a.shape[1:3])
