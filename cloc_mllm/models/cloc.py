"""CLOC: CLIP plus promptable region embeddings (figure 2 of arXiv 2410.02746).

Letters: B images, N image tokens, D token width, E embedding width, R regions of the batch
(packed: `region_image_index[r]` is the image of region r), P distinct phrases.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cloc_mllm.config import PrompterConfig
from cloc_mllm.models.box_head import BoxHead
from cloc_mllm.models.position import mask_boxes, token_cells
from cloc_mllm.models.prompter import Prompter
from cloc_mllm.models.region_pooling import RoIAlignEncoder, box_of_similarity, pool_under_boxes
from cloc_mllm.models.text_encoder import TextEncoder
from cloc_mllm.models.vision_encoder import ImageFeatures, VisionEncoder

_INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


class ClocInputs(Protocol):
    """The tensors of a batch that the model reads (see `cloc_mllm.data.collate.ClocBatch`)."""

    pixel_values: Tensor
    caption_input_ids: Tensor
    caption_image_index: Tensor
    phrase_input_ids: Tensor
    boxes: Tensor
    region_image_index: Tensor
    region_phrase_index: Tensor
    region_masks: Tensor
    masked_regions: Tensor


class RegionPrompts(NamedTuple):
    """Where the regions of a batch are, packed.

    Attributes:
        boxes: float[R, 4] xyxy, canvas frame.
        image_index: int64[R].
        masks: float[F, H, W] over the canvas; they prompt instead of the box.
        masked_regions: int64[F], the regions they stand for.
    """

    boxes: Tensor
    image_index: Tensor
    masks: Tensor
    masked_regions: Tensor


class ClocOutputs(NamedTuple):
    """Everything the losses need.

    Attributes:
        image_features, caption_features: float[C, E], of the images that have a caption.
        region_features: float[R, E], z of the box prompts; None for plain CLIP.
        region_text_features: float[R, E], f_T of each region's phrase; None for plain CLIP.
        located_boxes: float[R, 4] canvas frame, BoxHead's answer to each region's phrase; None
            without a Prompter.
    """

    image_features: Tensor
    caption_features: Tensor
    region_features: Tensor | None
    region_text_features: Tensor | None
    located_boxes: Tensor | None


class ClocVision(nn.Module):
    """Image tower with its region encoder and BoxHead: CLOC without the text tower."""

    def __init__(self, encoder: VisionEncoder, embed_dim: int, config: PrompterConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.embed_dim = embed_dim
        self.kind = config.kind
        self.prompter: Prompter | None = None
        self.roi_align: RoIAlignEncoder | None = None
        self.box_head: BoxHead | None = None
        if config.kind == "prompter":
            self.prompter = Prompter(encoder.token_dim, embed_dim, config)
            self.box_head = BoxHead(embed_dim)
        elif config.kind == "roi_align":
            self.roi_align = RoIAlignEncoder(encoder.token_dim, embed_dim)

    @property
    def token_dim(self) -> int:
        return self.encoder.token_dim

    @property
    def num_tokens(self) -> int:
        return self.encoder.num_tokens

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.encoder.grid_hw

    def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
        """Once per image; every prompt below reuses the result."""
        return self.encoder(pixel_values)

    def embed_boxes(self, image: ImageFeatures, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Region embeddings z of `boxes: float[R, 4]` (canvas frame): float[R, E], unnormalised."""
        if self.prompter is not None:
            return self.prompter.embed_boxes(
                image, self.prompter.prepare(image), boxes, image_index
            )
        if self.roi_align is not None:
            return self.roi_align.embed_boxes(image, boxes, image_index)
        return pool_under_boxes(self.embed_tokens(image), image, boxes, image_index)

    def embed_masks(self, image: ImageFeatures, masks: Tensor, image_index: Tensor) -> Tensor:
        """Region embeddings of points, scribbles, masks or sets of boxes, drawn as masks:
        `masks: float[R, H, W]` in 0..1 over the canvas, any H and W -> float[R, E], unnormalised.

        Without a Prompter a mask is its bounding box.
        """
        if self.prompter is None:
            return self.embed_boxes(image, mask_boxes(masks), image_index)
        return self.prompter.embed_masks(image, self.prompter.prepare(image), masks, image_index)

    def embed_tokens(self, image: ImageFeatures) -> Tensor:
        """Every image token read out as if it were a region: float[B, N, E], unnormalised."""
        if self.prompter is not None:
            return self.prompter.embed_tokens(self.prompter.prepare(image))
        if self.roi_align is not None:
            return self.roi_align.embed_tokens(image)
        return self.encoder.project_tokens(image.tokens)

    def read_tokens(self, image: ImageFeatures) -> tuple[Tensor, Tensor]:
        """What each image token belongs to: region embeddings float[B, N, E] and their boxes
        float[B, N, 4] (canvas frame).

        A token's own embedding, as a text prompt, gives the box; that box, as a box prompt, gives
        the embedding. Without a Prompter the box is the token's cell.
        """
        if self.prompter is None or self.box_head is None:
            cells = token_cells(image.grid_hw, image.tokens.device)
            return self.embed_tokens(image), cells.expand(len(image.tokens), -1, -1)
        context = self.prompter.prepare(image)
        boxes = self.box_head(self.prompter.locate_tokens(image, context))
        return self.prompter.embed_box_grid(image, context, boxes), boxes

    def locate(self, image: ImageFeatures, text_features: Tensor, image_index: Tensor) -> Tensor:
        """The box each text points at: float[R, 4] canvas frame.

        `text_features: float[R, E]` are f_T's, unnormalised. Without a Prompter the box is drawn
        around the tokens most similar to the text (`box_of_similarity`).
        """
        if self.prompter is None or self.box_head is None:
            return box_of_similarity(self.embed_tokens(image), image, text_features, image_index)
        context = self.prompter.prepare(image)
        return self.box_head(self.prompter.embed_texts(context, text_features, image_index))

    def forward_regions(
        self, image: ImageFeatures, regions: RegionPrompts, text_features: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Training's `(region embeddings, located boxes)` with the shared work done once.

        `text_features: float[R, E]`.
        """
        boxes, image_index, masks, masked = regions
        if self.prompter is not None and self.box_head is not None:
            context = self.prompter.prepare(image)
            z = self.prompter.embed_boxes(image, context, boxes, image_index)
            if self.prompter.mask is not None:
                of_masks = self.prompter.embed_masks(image, context, masks, image_index[masked])
                z = z.index_copy(0, masked, of_masks)
            text_z = self.prompter.embed_texts(context, text_features, image_index)
            return z, self.box_head(text_z)
        if self.roi_align is not None:
            return self.roi_align.embed_boxes(image, boxes, image_index), None
        return None, None


class Cloc(nn.Module):
    """The two towers, the region encoder and the temperatures.

    `encode_image` and `encode_text` equal the underlying open_clip model's, bit for bit.
    """

    def __init__(self, vision: ClocVision, text: TextEncoder) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        # one-element, not 0-dim: DeepSpeed cannot initialise 0-dim parameters
        self.logit_scale = nn.Parameter(torch.tensor([_INITIAL_LOGIT_SCALE]))
        if vision.kind != "none":
            self.region_logit_scale = nn.Parameter(torch.tensor([_INITIAL_LOGIT_SCALE]))

    def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
        """`pixel_values: float[B, 3, S, S]` -> pooled features and tokens."""
        return self.vision.encode_image(pixel_values)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """`input_ids: int64[P, T]` -> float[P, E], unnormalised."""
        return self.text(input_ids)

    def embed_boxes(self, image: ImageFeatures, boxes: Tensor, image_index: Tensor) -> Tensor:
        """See `ClocVision.embed_boxes`."""
        return self.vision.embed_boxes(image, boxes, image_index)

    def embed_tokens(self, image: ImageFeatures) -> Tensor:
        """See `ClocVision.embed_tokens`."""
        return self.vision.embed_tokens(image)

    def locate(self, image: ImageFeatures, text_features: Tensor, image_index: Tensor) -> Tensor:
        """See `ClocVision.locate`."""
        return self.vision.locate(image, text_features, image_index)

    def forward(self, batch: ClocInputs) -> ClocOutputs:
        is_clip = self.vision.kind == "none"
        phrase_input_ids = batch.phrase_input_ids[: 0 if is_clip else None]
        captions, phrases = self.text.encode_groups(batch.caption_input_ids, phrase_input_ids)
        image = self.encode_image(batch.pixel_values)
        captioned = image.image_features[batch.caption_image_index]
        if is_clip:
            return ClocOutputs(captioned, captions, None, None, None)
        # a batch without regions still runs both branches (on nothing), so that every rank
        # touches every parameter
        region_text = phrases[batch.region_phrase_index]
        regions = RegionPrompts(
            batch.boxes, batch.region_image_index, batch.region_masks, batch.masked_regions
        )
        z, located = self.vision.forward_regions(image, regions, region_text)
        return ClocOutputs(captioned, captions, z, region_text, located)

    def set_gradient_checkpointing(self, enable: bool) -> None:
        self.vision.encoder.visual.set_grad_checkpointing(enable)
        self.text.text.set_grad_checkpointing(enable)
