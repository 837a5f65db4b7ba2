"""Turns image tokens and prompts into region embeddings: one file per region encoder.

Letters: B images, N image tokens, E embedding width, R regions of the batch (packed).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cloc_mllm.devices import without_waiting
from cloc_mllm.models.vision_encoder import ImageFeatures


class RegionPrompts(NamedTuple):
    """The regions that a training batch prompts with, packed.

    Attributes:
        boxes: float[R, 4] xyxy, canvas frame.
        image_index: int64[R].
        masks: float[F, H, W] in 0..1 over the canvas; each prompts instead of its region's box.
        masked_regions: int64[F], the regions that have a mask.
        on_host: `image_index` and `masked_regions` on the CPU, so that choosing regions waits for
            no GPU; None copies them.
    """

    boxes: Tensor
    image_index: Tensor
    masks: Tensor
    masked_regions: Tensor
    on_host: tuple[Tensor, Tensor] | None = None

    @property
    def most_per_image(self) -> int:
        """The most regions that any image has."""
        image_index, _ = self._indices
        return int(image_index.bincount().max()) if len(image_index) else 0

    def select_images(self, first: int, stop: int) -> tuple[RegionPrompts, Tensor]:
        """Selects the prompts of images `first` .. `stop`; also returns which regions they are:
        int64[R']."""
        image_index, masked = self._indices
        own = ((image_index >= first) & (image_index < stop)).nonzero()[:, 0]
        place = torch.full_like(image_index, -1)
        place[own] = torch.arange(len(own))
        own_masks = (place[masked] >= 0).nonzero()[:, 0]
        on_host = (image_index[own] - first, place[masked][own_masks])
        own, own_masks, masked = (
            without_waiting(index, self.boxes.device) for index in (own, own_masks, on_host[1])
        )
        own_index = self.image_index[own] - first
        part = RegionPrompts(self.boxes[own], own_index, self.masks[own_masks], masked, on_host)
        return part, own

    @property
    def _indices(self) -> tuple[Tensor, Tensor]:
        return self.on_host or (self.image_index.cpu(), self.masked_regions.cpu())


class Nearness(NamedTuple):
    """Where the thing that a text names is looked for.

    Attributes:
        points: float[R, 2], canvas frame.
        gate: float scalar, what the logits of attention lose per (distance / 0.15 sides)^2 / 2.
    """

    points: Tensor
    gate: Tensor


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

    def prepare(self, image: ImageFeatures) -> ImageFeatures:
        """Computes once what all prompts to an image share, for those who prompt it often."""
        ...

    def embed_boxes(
        self, image: ImageFeatures, boxes: Tensor, image_index: Tensor, most: int | None = None
    ) -> Tensor:
        """The embedding z of each box: `boxes: float[R, 4]` -> float[R, E].

        `most` is the most boxes that any image has; None reads it from the index, for which the
        host waits for a GPU.
        """
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

    def similarity(self, image: ImageFeatures, text_features: Tensor) -> Tensor:
        """The cosine of each of P texts and each token of one image: float[P, E] -> float[P, N]."""
        ...

    def locate(
        self,
        image: ImageFeatures,
        text_features: Tensor,
        image_index: Tensor,
        most: int | None = None,
        near: Nearness | None = None,
    ) -> Tensor:
        """The box that each text points at, after each look of an encoder that looks K times, the
        last one its answer: `text_features: float[R, E]` -> float[K, R, 4].

        `most`: see `embed_boxes`. `near` may be ignored by an encoder that learns no boxes.
        """
        ...

    def __call__(
        self, image: ImageFeatures, prompts: RegionPrompts, text_features: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The embeddings of the prompts and the boxes that the texts point at, for training.

        Returns:
            z float[R, E], and boxes float[K, R, 4], the answers of an encoder that looks K times,
            the last one the best; or None if it predicts no boxes.
        """
        ...
