"""Answers a box with one token: what the hidden state that writes `<box>` says is made a box.

`AnswerBoxHead` reads the four numbers off the state. `PrompterBoxHead` makes a text prompt of the
state and lets CLOC's Prompter find the box in the image tokens; the numbers read off the state only
say near where. Letters: B rows, T tokens, K `<box>` tokens in the answers (packed, row by row), H
width of the language model, I images, E embedding width of CLOC.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloc_mllm.geometry import elementwise_giou, elementwise_iou
from cloc_mllm.mllm.projector import to_canvas_frame, to_original_frame
from cloc_mllm.models.box_head import BoxHead
from cloc_mllm.models.cloc import ClocVision
from cloc_mllm.models.region_encoders import Nearness
from cloc_mllm.models.vision_encoder import ImageFeatures

_GIOU_WEIGHT = 0.5
_NEAR_START = 0.1


class SeenImages(NamedTuple):
    """The images that answers point into.

    Attributes:
        features: of I images.
        frames: float[I, 4], see `VisionInputs.image_frame`.
        image_index: int64[K], the image of each `<box>` token; None chooses it by the answer.
        most: the most `<box>` tokens that any image has; None reads it from the index.
    """

    features: ImageFeatures
    frames: Tensor
    image_index: Tensor | None = None
    most: int | None = None


class AnswerBoxHead(nn.Module):
    """Reads boxes and confidences: float[K, H] -> boxes float[K, 4] xyxy, normalised to the
    original image, and logits float[K] of the IoU that they will have with the true boxes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.box = BoxHead(width)
        self.confidence = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(hidden.float())
        return self.box(hidden), self.confidence(hidden)[:, 0]

    def loss(self, hidden: Tensor, boxes: Tensor) -> Tensor:
        """Sums over boxes: mean |error| + half of (1 - GIoU) + the cross-entropy of the confidence
        with the IoU reached.

        Args:
            hidden: float[K, H], the hidden states that wrote the `<box>` tokens.
            boxes: float[K, 4], the true boxes.
        """
        answered, confidence = self(hidden)
        boxes = boxes.to(answered)
        return _box_error(answered, boxes) + _surprise(confidence, answered, boxes)


class PrompterBoxHead(nn.Module):
    """Makes prompts of hidden states, which CLOC's region encoder finds in its image tokens.

    Args:
        width: H.
        embed_dim: E.
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.prompt = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embed_dim))
        self.rough_box = BoxHead(width)
        self.near = nn.Parameter(torch.tensor([_NEAR_START]))
        self.confidence = nn.Linear(width + 1, 1)

    def forward(
        self, hidden: Tensor, vision: ClocVision, images: SeenImages
    ) -> tuple[Tensor, Tensor]:
        """Reads boxes and confidences as `AnswerBoxHead` does.

        Without an index each is looked for in all images, and taken from the one where the region
        found is most like the prompt.
        """
        if images.image_index is not None:
            found = self._find(hidden, vision, images)
            return found.boxes[-1], found.confidence
        num_images, num_boxes = len(images.frames), len(hidden)
        each = torch.arange(num_images, device=hidden.device).repeat(num_boxes)
        found = self._find(
            hidden.repeat_interleave(num_images, 0), vision, images._replace(image_index=each)
        )
        best = found.match.view(num_boxes, num_images).argmax(1)
        best = best + num_images * torch.arange(num_boxes, device=hidden.device)
        return found.boxes[-1][best], found.confidence[best]

    def loss(
        self, hidden: Tensor, boxes: Tensor, vision: ClocVision, images: SeenImages | None
    ) -> Tensor:
        """The loss of `AnswerBoxHead`, averaged over the looks of the region encoder, for the rough
        box too, and 1 - cosine of each prompt and the embedding of its true region.

        Args:
            images: None where no row has an image, and so none a box.
        """
        if images is None:  # every rank must touch every parameter
            return sum((p.sum() * 0.0 for p in self.parameters()), hidden.new_zeros(()))
        found = self._find(hidden, vision, images)
        boxes = boxes.to(found.rough)
        total = _box_error(found.rough, boxes) + _surprise(found.confidence, found.boxes[-1], boxes)
        for answered in found.boxes:
            total = total + _box_error(answered, boxes) / len(found.boxes)
        assert images.image_index is not None
        canvas = to_canvas_frame(boxes, images.frames[images.image_index])
        regions = vision.embed_boxes(images.features, canvas, images.image_index, images.most)
        likeness = F.cosine_similarity(found.prompts.float(), regions.detach().float(), dim=1)
        return total + (1 - likeness).sum()

    def _find(self, hidden: Tensor, vision: ClocVision, images: SeenImages) -> _Found:
        assert images.image_index is not None
        hidden = self.norm(hidden.float())
        prompts, rough = self.prompt(hidden), self.rough_box(hidden)
        frames = images.frames[images.image_index]
        rough_canvas = to_canvas_frame(rough.detach(), frames)
        near = Nearness((rough_canvas[:, :2] + rough_canvas[:, 2:]) / 2, self.near)
        features, index, most = images.features, images.image_index, images.most
        canvas = vision.region_encoder.locate(features, prompts, index, most, near)
        regions = vision.embed_boxes(features, canvas[-1].detach(), index, most)
        match = F.cosine_similarity(prompts.float(), regions.float(), dim=1).detach()
        confidence = self.confidence(torch.cat([hidden, match[:, None]], 1))[:, 0]
        return _Found(prompts, rough, to_original_frame(canvas, frames), confidence, match)


class _Found(NamedTuple):
    """What a `PrompterBoxHead` finds.

    Attributes:
        prompts: float[K, E].
        rough: float[K, 4], the box read off the state.
        boxes: float[L, K, 4], after each of L looks, normalised to the original image.
        confidence: float[K], logits.
        match: float[K], the cosine of each prompt and the region in its box.
    """

    prompts: Tensor
    rough: Tensor
    boxes: Tensor
    confidence: Tensor
    match: Tensor


def writing_states(hidden: Tensor, labels: Tensor, box_token_id: int) -> Tensor:
    """Picks the states that should write `<box>` tokens: float[B, T, H] -> float[K, H]."""
    return hidden[:, :-1][labels[:, 1:] == box_token_id]


def _box_error(answered: Tensor, boxes: Tensor) -> Tensor:
    giou = elementwise_giou(answered, boxes)
    return (answered - boxes).abs().sum() / 4 + _GIOU_WEIGHT * (1 - giou).sum()


def _surprise(confidence: Tensor, answered: Tensor, boxes: Tensor) -> Tensor:
    iou = elementwise_iou(answered.detach(), boxes)
    return F.binary_cross_entropy_with_logits(confidence, iou, reduction="sum")
