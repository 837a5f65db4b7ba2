"""Answers a box with one token, from which a head reads four numbers and a confidence.

The hidden state that writes `<box>` also holds the place of the box. Letters: B rows, T tokens,
K `<box>` tokens in the answers (packed, row by row), H width of the language model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cloc_mllm.geometry import elementwise_giou, elementwise_iou
from cloc_mllm.models.box_head import BoxHead

_GIOU_WEIGHT = 0.5


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


def answer_box_loss(head: AnswerBoxHead, hidden: Tensor, boxes: Tensor) -> Tensor:
    """Sums over boxes: mean |error| + half of (1 - GIoU) + the cross-entropy of the confidence with
    the IoU reached.

    Args:
        hidden: float[K, H], the hidden states that wrote the `<box>` tokens.
        boxes: float[K, 4], the true boxes.
    """
    answered, confidence = head(hidden)
    boxes = boxes.to(answered)
    giou = elementwise_giou(answered, boxes)
    iou = elementwise_iou(answered.detach(), boxes)
    surprise = F.binary_cross_entropy_with_logits(confidence, iou, reduction="sum")
    return (answered - boxes).abs().sum() / 4 + _GIOU_WEIGHT * (1 - giou).sum() + surprise


def writing_states(hidden: Tensor, labels: Tensor, box_token_id: int) -> Tensor:
    """Picks the states that should write `<box>` tokens: float[B, T, H] -> float[K, H]."""
    return hidden[:, :-1][labels[:, 1:] == box_token_id]
