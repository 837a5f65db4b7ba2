"""Prompter(l, f_I'(x)) -> z: one single-head transformer layer over prompt and image tokens.

Letters: B images, N image tokens, D width of the layer, E embedding width, R prompts (packed
over the batch), K tokens of one prompt. Source: section 3.3 and figure 2 of the paper; the
spatial prior and the `prompt` readout are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloc_mllm.config import SpatialPrior, TextPrior
from cloc_mllm.models.box_head import BoxHead
from cloc_mllm.models.box_refiner import BoxRefiner
from cloc_mllm.models.position import (
    cell_coverage,
    mask_boxes,
    mask_coverage,
    sinusoidal_code,
    token_cells,
)
from cloc_mllm.models.region_encoders import Nearness, RegionPrompts
from cloc_mllm.models.region_encoders.mean_readout import ImageOutputs, MlpStart, summed_hidden
from cloc_mllm.models.scales import norm_of_scales
from cloc_mllm.models.vision_encoder import ImageFeatures

_BOX_GATE_START = 4.0
_TEXT_GATE_START = 15.0
_NEARNESS = 0.15  # standard deviation, in canvas sides, of "near the token" or a point


class PrompterEncoder(nn.Module):
    """The paper's region encoder: the Prompter embeds every prompt, BoxHead reads the box of a
    text prompt. `refiner`, if any, looks at that box again.

    See `RegionEncoder` for the methods.
    """

    has_region_loss = True
    predicts_boxes = True

    def __init__(
        self, prompter: Prompter, box_head: BoxHead, refiner: BoxRefiner | None = None
    ) -> None:
        super().__init__()
        self.prompter = prompter
        self.box_head = box_head
        self.refiner = refiner
        self.takes_masks = prompter.mask is not None

    def prepare(self, image: ImageFeatures) -> ImageFeatures:
        return image._replace(prepared=self.prompter.read_tokens(self._context(image)))

    def _context(self, image: ImageFeatures) -> ImageContext:
        return self.prompter.prepare(image) if image.prepared is None else image.prepared

    def embed_boxes(
        self, image: ImageFeatures, boxes: Tensor, image_index: Tensor, most: int | None = None
    ) -> Tensor:
        return self.prompter.embed_boxes(self._context(image), boxes, image_index, most)

    def embed_masks(self, image: ImageFeatures, masks: Tensor, image_index: Tensor) -> Tensor:
        return self.prompter.embed_masks(self._context(image), masks, image_index)

    def read_tokens(self, image: ImageFeatures) -> tuple[Tensor, Tensor]:
        """A token's own embedding, as a text prompt, gives the box; that box, as a box prompt,
        gives the embedding."""
        context = self._context(image)
        boxes = self.box_head(self.prompter.locate_tokens(context))
        if self.refiner is not None:
            embeddings = self.prompter.embed_tokens(context)
            similarity = self.prompter.similarity(embeddings, context, embeddings).flatten(0, 1)
            index = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
            texts = embeddings.flatten(0, 1)
            refined = self._refine(context, boxes.flatten(0, 1), texts, similarity, index)
            boxes = refined[-1].view_as(boxes)
        return self.prompter.embed_box_grid(context, boxes), boxes

    def similarity(self, image: ImageFeatures, text_features: Tensor) -> Tensor:
        return self.prompter.similarity(text_features[None], self._context(image))[0]

    def locate(
        self,
        image: ImageFeatures,
        text_features: Tensor,
        image_index: Tensor,
        most: int | None = None,
        near: Nearness | None = None,
    ) -> Tensor:
        context = self._context(image)
        return self._locate(context, text_features, image_index, most, near)

    def forward(
        self, image: ImageFeatures, prompts: RegionPrompts, text_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        boxes, image_index, masks, masked, _ = prompts
        most = prompts.most_per_image
        context = self._context(image)
        z = self.prompter.embed_boxes(context, boxes, image_index, most)
        if self.takes_masks:  # without masks, too: every rank must touch every parameter
            z_of_masks = self.prompter.embed_masks(context, masks, image_index[masked])
            z = z.index_copy(0, masked, z_of_masks)
        return z, self._locate(context, text_features, image_index, most)

    def _locate(
        self,
        context: ImageContext,
        text_features: Tensor,
        image_index: Tensor,
        most: int | None,
        near: Nearness | None = None,
    ) -> Tensor:
        """The box of each text, first from its embedding, then after each look:
        float[1 + looks, R, 4]."""
        z = self.prompter.embed_texts(context, text_features, image_index, most, near)
        first = self.box_head(z)
        if self.refiner is None:
            return first[None]
        grid = _place_prompts(image_index, len(context.tokens), most)
        similarity = grid.pack(self.prompter.similarity(grid.spread(text_features), context))
        refined = self._refine(context, first, text_features, similarity, image_index)
        return torch.cat([first[None], refined])

    def _refine(
        self,
        context: ImageContext,
        boxes: Tensor,
        text_features: Tensor,
        similarity: Tensor,
        image_index: Tensor,
    ) -> Tensor:
        assert self.refiner is not None
        return self.refiner(
            boxes, text_features, similarity, image_index, context.tokens, context.grid_hw
        )


class ImageContext(NamedTuple):
    """The values that all prompts of an image share.

    Attributes:
        tokens: float[B, N, D], with positions.
        keys, values: float[B, N, D].
        cells: float[N, 4] xyxy, canvas frame, the cell of each token.
        grid_hw: rows and columns of the tokens.
        outputs: the layer's own outputs at the image tokens, for the `mean` readout.
        readouts: float[B, N, E] of unit length, what texts are compared with; None computes them
            for each text prompt.
    """

    tokens: Tensor
    keys: Tensor
    values: Tensor
    cells: Tensor
    grid_hw: tuple[int, int]
    outputs: ImageOutputs | None = None
    readouts: Tensor | None = None


class Prompter(nn.Module):
    """Turns a prompt (box, mask or text) and the image tokens into an embedding of CLIP's width.

    Tokens of another width than the layer, or of several scales, are normalised and projected to it
    first: one linear map per scale. Whatever the
    prompts of an image have in common is computed once, with either readout. Without `free_form`,
    `embed_masks` knows a mask by its bounding box and its prior alone.

    Args:
        token_dims: widths of the scales that an image token consists of, mostly one.
        embed_dim: E.
        width: D.
        readout, spatial_prior, text_prior, free_form: see `PrompterConfig`.
    """

    def __init__(  # noqa: PLR0913  the settings of one layer
        self,
        token_dims: Sequence[int],
        embed_dim: int,
        width: int,
        *,
        readout: Literal["mean", "prompt"],
        spatial_prior: SpatialPrior,
        text_prior: TextPrior,
        free_form: bool,
    ) -> None:
        super().__init__()
        self.readout = readout
        self.text_prior = text_prior
        self.code_dim = 8 * max(1, width // 8)
        self.adapt: nn.Module = nn.Identity()
        if (width,) != tuple(token_dims):
            self.adapt = nn.Sequential(
                norm_of_scales(token_dims), nn.Linear(sum(token_dims), width)
            )
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
        if spatial_prior in ("both", "box"):
            self.box_gate = nn.Parameter(torch.tensor([_BOX_GATE_START]))
        if spatial_prior in ("both", "text"):
            self.text_gate = nn.Parameter(torch.tensor([_TEXT_GATE_START]))
        self.mask: nn.Linear | None = None
        if free_form:
            self.mask = nn.Linear(self.code_dim, 2 * width)

    def prepare(self, image: ImageFeatures) -> ImageContext:
        """Adds positions and computes keys and values, once per image."""
        cells = token_cells(image.grid_hw, image.tokens.device)
        tokens = self.adapt(image.tokens) + self.position(self._code(cells))
        normed = self.norm_attention(tokens)
        keys, values = self.key(normed), self.value(normed)
        outputs = None
        if self.readout == "mean":
            outputs = self._outputs_at_image_tokens(tokens, self.query(normed), keys, values)
        return ImageContext(tokens, keys, values, cells, image.grid_hw, outputs)

    def embed_boxes(
        self, context: ImageContext, boxes: Tensor, image_index: Tensor, most: int | None = None
    ) -> Tensor:
        """The embedding z of each box: `boxes: float[R, 4]` canvas frame -> float[R, E].

        `most`: see `RegionEncoder.embed_boxes`.
        """
        grid = _place_prompts(image_index, len(context.tokens), most)
        return grid.pack(self.embed_box_grid(context, grid.spread(boxes)))

    def embed_box_grid(self, context: ImageContext, boxes: Tensor) -> Tensor:
        """The embedding z of Q boxes per image: float[B, Q, 4] canvas frame -> float[B, Q, E]."""
        prompts = self.corners(self._code(boxes)).unflatten(-1, (2, -1))
        bias = None
        if self.box_gate is not None:
            coverage = cell_coverage(boxes.flatten(0, 1), context.cells)
            bias = self.box_gate * coverage.unflatten(0, boxes.shape[:2])
        return self._attend(prompts, context, bias)

    def embed_masks(self, context: ImageContext, masks: Tensor, image_index: Tensor) -> Tensor:
        """The embedding z of each mask: float[R, H, W] in 0..1 over the canvas -> float[R, E].

        The prompt tokens are those of the mask's bounding box, plus a linear map of the mean
        position code of the cells it covers.
        """
        coverage = mask_coverage(masks, context.grid_hw)
        prompts = self.corners(self._code(mask_boxes(masks)))
        if self.mask is not None:
            share = coverage / coverage.sum(1, keepdim=True).clamp(min=1e-6)
            code = self._code(context.cells)
            prompts = prompts + self.mask(share.to(code.dtype) @ code)
        grid = _place_prompts(image_index, len(context.tokens))
        bias = None if self.box_gate is None else self.box_gate * grid.spread(coverage)
        return grid.pack(self._attend(grid.spread(prompts).unflatten(-1, (2, -1)), context, bias))

    def embed_texts(
        self,
        context: ImageContext,
        text_features: Tensor,
        image_index: Tensor,
        most: int | None = None,
        near: Nearness | None = None,
    ) -> Tensor:
        """The embedding z of each text: `text_features: float[R, E]` -> float[R, E]."""
        grid = _place_prompts(image_index, len(context.tokens), most)
        texts = grid.spread(text_features)
        prompts = self.text_token(self.text_norm(texts)).unsqueeze(2)
        bias = None
        if self.text_gate is not None:
            bias = self.text_gate * self.similarity(texts, context)
        if near is not None:
            far = _squared_distance(grid.spread(near.points), _centres(context.cells))
            bias = -near.gate * far + (0.0 if bias is None else bias)
        return grid.pack(self._attend(prompts, context, bias))

    def locate_tokens(self, context: ImageContext) -> Tensor:
        """The embedding z of each image token's own embedding, taken as a text prompt:
        float[B, N, E].

        Attention stays near the token, or two things of one kind would answer together.
        """
        centres = _centres(context.cells)
        embeddings = self.embed_tokens(context)
        near = -_squared_distance(centres, centres)
        bias = near.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        if self.text_gate is not None:
            bias = bias + self.text_gate * self.similarity(embeddings, context, embeddings)
        prompts = self.text_token(self.text_norm(embeddings)).unsqueeze(2)
        return self._attend(prompts, context, bias)

    def embed_tokens(self, context: ImageContext) -> Tensor:
        """Reads out every image token as if it were a region: float[B, N, E]."""
        attended = self.output(context.values)
        return self.projection(attended + self.mlp(self.norm_mlp(attended)))

    def _outputs_at_image_tokens(
        self, tokens: Tensor, queries: Tensor, keys: Tensor, values: Tensor
    ) -> ImageOutputs:
        logits = queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        attended = self.output(logits.softmax(-1) @ values)
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        mlp_start = MlpStart(self.norm_mlp, first)
        return ImageOutputs.compute(tokens, logits, queries, attended, mlp_start)

    def similarity(
        self, texts: Tensor, context: ImageContext, embeddings: Tensor | None = None
    ) -> Tensor:
        """The cosine of `texts: float[B, Q, E]` and each image token: float[B, Q, N].

        `embeddings` is `embed_tokens(context)`, if the caller has it already.
        """
        readouts = context.readouts
        if readouts is None:
            readouts = self._readouts(context, embeddings)
        return F.normalize(texts, dim=-1) @ readouts.transpose(1, 2)

    def read_tokens(self, context: ImageContext) -> ImageContext:
        """Adds `readouts`, for those who prompt an image with text often."""
        return context._replace(readouts=self._readouts(context))

    def _readouts(self, context: ImageContext, embeddings: Tensor | None = None) -> Tensor:
        if self.text_prior == "linear":
            weight = self.projection.weight  # times the output's first: one product, not two
            by_output = weight @ self.output.weight, weight @ self.output.bias
            tokens = F.linear(context.values, *by_output)
        else:
            tokens = self.embed_tokens(context) if embeddings is None else embeddings
        return F.normalize(tokens, dim=-1)

    def _code(self, boxes: Tensor) -> Tensor:
        return sinusoidal_code(boxes, self.code_dim).to(self.position.weight.dtype)

    def _attend(self, prompts: Tensor, context: ImageContext, bias: Tensor | None) -> Tensor:
        """Runs the layer over [prompt, image] tokens for Q prompts per image, pools and projects.

        Args:
            prompts: float[B, Q, K, D].
            bias: float[B, Q, N], added to the attention logits of prompt tokens over image tokens.

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
        """Sums the layer's outputs at the image tokens, which see the prompt too.

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


def _centres(cells: Tensor) -> Tensor:
    """float[N, 4] -> float[N, 2]."""
    return (cells[:, :2] + cells[:, 2:]) / 2


def _squared_distance(points: Tensor, centres: Tensor) -> Tensor:
    """Half of the squared distance in `_NEARNESS`: float[..., Q, 2], float[N, 2] ->
    float[..., Q, N]."""
    return torch.cdist(points.to(centres.dtype), centres).square() / (2 * _NEARNESS**2)


class _PromptGrid(NamedTuple):
    """A grid of B images times Q places for packed prompts. Q is the most prompts that any image
    has. On the grid, the prompts of an image share its tokens, keys and values without copies.

    Attributes:
        image_index, place: int64[R], row and column of each prompt.
        shape: B, Q.
    """

    image_index: Tensor
    place: Tensor
    shape: tuple[int, int]

    def spread(self, packed: Tensor) -> Tensor:
        """float[R, X] -> float[B, Q, X], zeros at empty places."""
        grid = packed.new_zeros(*self.shape, packed.shape[1])
        return grid.index_put((self.image_index, self.place), packed)

    def pack(self, grid: Tensor) -> Tensor:
        """float[B, Q, X] -> float[R, X]."""
        return grid[self.image_index, self.place]


def _place_prompts(image_index: Tensor, num_images: int, most: int | None = None) -> _PromptGrid:
    """Gives each prompt the next free place of its image; `image_index: int64[R]`.

    `most`: see `RegionEncoder.embed_boxes`.
    """
    # not bincount, which waits for a GPU
    counts = image_index.new_zeros(num_images).index_add_(
        0, image_index, torch.ones_like(image_index)
    )
    order = image_index.argsort(stable=True)
    first = (counts.cumsum(0) - counts)[image_index]
    place = order.argsort() - first
    width = int(counts.max()) if most is None else most
    return _PromptGrid(image_index, place, (num_images, width))


def _shared_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiplies `a: float[B, Q, K, X]` with `b: float[B, X, Y]`, shared by the Q:
    float[B, Q, K, Y]."""
    return (a.flatten(1, 2) @ b).unflatten(1, a.shape[1:3])
