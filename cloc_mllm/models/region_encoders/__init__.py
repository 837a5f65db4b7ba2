"""Turns image tokens and prompts into region embeddings: one file per region encoder.

Letters: B images, N image tokens, E embedding width, R regions of the batch (packed).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cloc_mllm.models.vision_encoder import ImageFeatures


class RegionPrompts(NamedTuple):
    """The regions that a training batch prompts with, packed.

    Attributes:
        boxes: float[R, 4] xyxy, canvas frame.
        image_index: int64[R].
        masks: float[F, H, W] in 0..1 over the canvas; each prompts instead of its region's box.
        masked_regions: int64[F], the regions that have a mask.
    """

    boxes: Tensor
    image_index: Tensor
    masks: Tensor
    masked_regions: Tensor

    def select_images(self, first: int, stop: int) -> tuple[RegionPrompts, Tensor]:
        """Selects the prompts of images `first` .. `stop`; also returns which regions they are:
        int64[R']."""
        own = ((self.image_index >= first) & (self.image_index < stop)).nonzero()[:, 0]
        place = torch.full_like(self.image_index, -1)
        place[own] = torch.arange(len(own), device=own.device)
        masked = place[self.masked_regions]
        part = RegionPrompts(
            self.boxes[own],
            self.image_index[own] - first,
            self.masks[masked >= 0],
            masked[masked >= 0],
        )
        return part, own


class RegionEncoder(Protocol):
    """Embeds what a prompt points at in an encoded image, and finds what a text points at.

    An implementation is an `nn.Module` in a file of this folder, and an `if` in `models/build.py`.
    Embeddings are not normalised; boxes are xyxy in the canvas frame.

    Attributes:
        has_region_loss: it is trained with L_CLOC. Otherwise the model is a plain CLIP: no
            temperature of regions, no phrases in training, and `forward` is never called.
        predicts_boxes: it learns the boxes that `locate` and `read_tokens` answer.
        takes_masks: it learns masks as prompts. Otherwise a mask may stand for its bounding box.
    """

    has_region_loss: bool
    predicts_boxes: bool
    takes_masks: bool

    def embed_boxes(self, image: ImageFeatures, boxes: Tensor, image_index: Tensor) -> Tensor:
        """The embedding z of each box: `boxes: float[R, 4]` -> float[R, E]."""
        ...

    def embed_masks(self, image: ImageFeatures, masks: Tensor, image_index: Tensor) -> Tensor:
        """The embedding z of each mask: `masks: float[R, H, W]` -> float[R, E].

        A mask holds values in 0..1 over the canvas at any resolution. It may draw a point, a
        scribble, a mask or several boxes.
        """
        ...

    def read_tokens(self, image: ImageFeatures) -> tuple[Tensor, Tensor]:
        """The region that each image token belongs to: z float[B, N, E] and boxes float[B, N, 4].

        An encoder that predicts no boxes answers the token's cell.
        """
        ...

    def locate(self, image: ImageFeatures, text_features: Tensor, image_index: Tensor) -> Tensor:
        """The box that each text points at: `text_features: float[R, E]` -> float[R, 4]."""
        ...

    def __call__(
        self, image: ImageFeatures, prompts: RegionPrompts, text_features: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The embeddings of the prompts and the boxes that the texts point at, for training.

        Returns:
            z float[R, E], and boxes float[R, 4], or None if it predicts no boxes.
        """
        ...
