"""CLOC: CLIP plus promptable region embeddings (figure 2 of arXiv 2410.02746).

Letters: B images, N image tokens, D token width, E embedding width, R regions of the batch
(packed: `region_image_index[r]` is the image of region r), P distinct phrases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cloc_mllm.models.region_encoders import RegionEncoder, RegionPrompts
from cloc_mllm.models.text_encoder import TextEncoder
from cloc_mllm.models.vision_encoder import ImageFeatures, TowerOutputs, VisionEncoder

_INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
# Nearly all pairs of the sigmoid loss are negatives, so all start as "no" (SigLIP, section 3.2).
_INITIAL_SIGMOID_SCALE = math.log(10.0)
_INITIAL_SIGMOID_BIAS = -10.0


class ClocInputs(Protocol):
    """The tensors of a batch that the model reads (see `cloc_mllm.data.collate.ClocBatch`)."""

    pixel_values: Tensor | TowerOutputs
    caption_input_ids: Tensor
    caption_image_index: Tensor
    phrase_input_ids: Tensor
    phrase_log_prior: Tensor | None
    boxes: Tensor
    region_image_index: Tensor
    region_phrase_index: Tensor
    phrase_boxes: Tensor
    phrase_box_region: Tensor
    region_masks: Tensor
    masked_regions: Tensor

    @property
    def on_host(self) -> ClocInputs:
        """The same on the CPU, where the small parts are read without waiting for a GPU."""
        ...


class Temperature(NamedTuple):
    """Turns a cosine into a logit: `exp(logit_scale) * cosine + logit_bias`.

    Attributes:
        logit_scale: float[1].
        logit_bias: float[1] for the sigmoid loss, None for the softmax loss.
    """

    logit_scale: Tensor
    logit_bias: Tensor | None

    def clone(self) -> Temperature:
        """Copies that pass the gradient on. ZeRO-3 empties a module's own parameters at the end of
        its forward, and the loss comes later."""
        bias = self.logit_bias
        return Temperature(self.logit_scale.clone(), None if bias is None else bias.clone())


class ClocOutputs(NamedTuple):
    """Everything the losses need.

    Attributes:
        temperature: for L_CLIP.
        image_features, caption_features: float[C, E], of the C captions and their images.
        region_temperature: for L_CLOC; None for a plain CLIP.
        region_features: float[R, E], z of the prompts; None for a plain CLIP.
        region_text_features: float[R, E], f_T of each region's phrase; None for a plain CLIP.
        located_boxes: float[K, R, 4] canvas frame, the boxes answered to each region's phrase by
            an encoder that looks K times; None if it predicts no boxes.
    """

    temperature: Temperature
    image_features: Tensor
    caption_features: Tensor
    region_temperature: Temperature | None = None
    region_features: Tensor | None = None
    region_text_features: Tensor | None = None
    located_boxes: Tensor | None = None


class ClocVision(nn.Module):
    """Image tower and region encoder: CLOC without the text tower."""

    def __init__(self, encoder: VisionEncoder, region_encoder: RegionEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.region_encoder = region_encoder

    @property
    def token_dim(self) -> int:
        return self.encoder.token_dim

    @property
    def token_dims(self) -> tuple[int, ...]:
        return self.encoder.token_dims

    def split_scales(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The scales of `tokens: float[..., D]`, the finest first: float[..., D_i] each."""
        return tokens.split(list(self.token_dims), -1)

    @property
    def embed_dim(self) -> int:
        return self.encoder.embed_dim

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.encoder.grid_hw

    def encode_image(self, images: Tensor | TowerOutputs) -> ImageFeatures:
        """Encodes each image once; every prompt below reuses the result.

        Args:
            images: pixel_values float[B, 3, S, S], or what a frozen tower made of them before.
        """
        return (
            self.encoder.join(images) if isinstance(images, TowerOutputs) else self.encoder(images)
        )

    def embed_boxes(
        self, image: ImageFeatures, boxes: Tensor, image_index: Tensor, most: int | None = None
    ) -> Tensor:
        """See `RegionEncoder.embed_boxes`."""
        return self.region_encoder.embed_boxes(image, boxes, image_index, most)

    def embed_masks(self, image: ImageFeatures, masks: Tensor, image_index: Tensor) -> Tensor:
        """See `RegionEncoder.embed_masks`."""
        return self.region_encoder.embed_masks(image, masks, image_index)

    def read_tokens(self, image: ImageFeatures) -> tuple[Tensor, Tensor]:
        """See `RegionEncoder.read_tokens`."""
        return self.region_encoder.read_tokens(image)

    def locate(self, image: ImageFeatures, text_features: Tensor, image_index: Tensor) -> Tensor:
        """The box that each text points at: `text_features: float[R, E]` -> float[R, 4]."""
        return self.region_encoder.locate(image, text_features, image_index)[-1]

    def forward_images(
        self,
        pixel_values: Tensor | TowerOutputs,
        prompts: RegionPrompts,
        text_features: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Training's `(image_features, region embeddings, located boxes)`; the last two are None
        without `text_features: float[R, E]`."""
        image = self.encode_image(pixel_values)
        if text_features is None:
            return image.image_features, None, None
        return image.image_features, *self.region_encoder(image, prompts, text_features)


class Cloc(nn.Module):
    """The two towers, the region encoder and the temperatures.

    `encode_image` and `encode_text` equal those of the underlying open_clip model, bit for bit.

    Attributes:
        phrase_prior: see `ModelConfig.phrase_prior`.
        micro_batch_size: if not 0, `forward` takes this many images (then texts) at a time and
            keeps their outputs alone; each part runs again in backward. This is GradCache (arXiv
            2101.06983) in one backward pass: the same loss with the activations of one part.
    """

    def __init__(
        self,
        vision: ClocVision,
        text: TextEncoder,
        contrastive_loss: Literal["softmax", "sigmoid"],
    ) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.phrase_prior = 0.0
        self.micro_batch_size = 0
        self.logit_scale, self.logit_bias = _initial_temperature(contrastive_loss)
        if vision.region_encoder.has_region_loss:
            self.region_logit_scale, self.region_logit_bias = _initial_temperature(contrastive_loss)

    @property
    def region_scale(self) -> float:
        """What the cosine of a region and a text is multiplied with to be a contrastive logit."""
        logarithm = getattr(self, "region_logit_scale", self.logit_scale)
        return float(logarithm.detach().exp().clamp(max=100))

    def encode_image(self, pixel_values: Tensor) -> ImageFeatures:
        """Pooled features and tokens of `pixel_values: float[B, 3, S, S]`."""
        return self.vision.encode_image(pixel_values)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Features of `input_ids: int64[P, T]`: float[P, E], not normalised."""
        return self.text(input_ids)

    def embed_boxes(self, image: ImageFeatures, boxes: Tensor, image_index: Tensor) -> Tensor:
        """See `RegionEncoder.embed_boxes`."""
        return self.vision.embed_boxes(image, boxes, image_index)

    def locate(self, image: ImageFeatures, text_features: Tensor, image_index: Tensor) -> Tensor:
        """See `ClocVision.locate`."""
        return self.vision.locate(image, text_features, image_index)

    def forward(self, batch: ClocInputs) -> ClocOutputs:
        temperature = Temperature(self.logit_scale, self.logit_bias).clone()
        is_clip = not self.vision.region_encoder.has_region_loss
        taken = slice(0 if is_clip else None)
        captions, phrases = self._encode_texts(
            [batch.caption_input_ids, batch.phrase_input_ids[taken]],
            [batch.on_host.caption_input_ids, batch.on_host.phrase_input_ids[taken]],
        )
        prompts = RegionPrompts(
            batch.boxes,
            batch.region_image_index,
            batch.region_masks,
            batch.masked_regions,
            (batch.on_host.region_image_index, batch.on_host.masked_regions),
        )
        if is_clip:
            image_features, *_ = self._encode_images(batch.pixel_values, prompts, None)
            return ClocOutputs(temperature, image_features[batch.caption_image_index], captions)
        # A batch without regions still runs all of this (on nothing), so that every rank touches
        # every parameter.
        region_text = phrases[batch.region_phrase_index]
        image_features, z, located = self._encode_images(batch.pixel_values, prompts, region_text)
        return ClocOutputs(
            temperature,
            image_features[batch.caption_image_index],
            captions,
            Temperature(self.region_logit_scale, self.region_logit_bias).clone(),
            z,
            region_text,
            located,
        )

    def _encode_texts(self, groups: Sequence[Tensor], on_host: Sequence[Tensor]) -> list[Tensor]:
        """Features of each group of texts: int64[P, T], or float[P, W] of `run_tower`,
        -> float[P, E]; see `encode_groups`."""
        size = self.micro_batch_size
        if groups[0].is_floating_point() or not 0 < size < max(map(len, groups)):
            return self.text.encode_groups(*groups, on_host=on_host)
        return [
            torch.cat(
                [checkpoint(self.text, part, use_reentrant=False) for part in ids.split(size)]
            )
            for ids in groups
        ]

    def _encode_images(
        self,
        pixel_values: Tensor | TowerOutputs,
        prompts: RegionPrompts,
        region_text: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `ClocVision.forward_images`. Each micro-batch takes the regions of its images."""
        size, num_images = self.micro_batch_size, len(pixel_values)
        forward = self.vision.forward_images
        if isinstance(pixel_values, TowerOutputs) or not 0 < size < num_images:
            return forward(pixel_values, prompts, region_text)
        parts, owned = [], []
        for first in range(0, num_images, size):
            own_prompts, own_regions = prompts.select_images(first, first + size)
            text = None if region_text is None else region_text[own_regions]
            inputs = (pixel_values[first : first + size], own_prompts, text)
            parts.append(checkpoint(forward, *inputs, use_reentrant=False))
            owned.append(own_regions)
        image_features, z, located = zip(*parts, strict=True)
        in_order = torch.cat(owned).argsort()
        return (
            torch.cat(image_features),
            None if z[0] is None else torch.cat(z)[in_order],
            None if located[0] is None else torch.cat(located, 1)[:, in_order],
        )

    def set_gradient_checkpointing(self, enable: bool) -> None:
        self.vision.encoder.visual.set_grad_checkpointing(enable)
        self.text.text.set_grad_checkpointing(enable)


def _initial_temperature(
    contrastive_loss: Literal["softmax", "sigmoid"],
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Logarithmic scale and bias of one element each: DeepSpeed takes no 0-dim parameters."""
    if contrastive_loss == "softmax":
        return nn.Parameter(torch.tensor([_INITIAL_LOGIT_SCALE])), None
    scale = nn.Parameter(torch.tensor([_INITIAL_SIGMOID_SCALE]))
    return scale, nn.Parameter(torch.tensor([_INITIAL_SIGMOID_BIAS]))
