"""L_grounding: how far the box that BoxHead answers to a region's text is off (equation 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cloc_mllm.config import BoxLoss
from cloc_mllm.distributed import world_size
from cloc_mllm.geometry import elementwise_giou
from cloc_mllm.models.position import at_least_float32

_GIOU_WEIGHT = 0.5


def grounding_loss(
    located_boxes: Tensor,
    boxes: Tensor,
    num_global: int,
    kind: BoxLoss,
    region: Tensor | None = None,
) -> Tensor:
    """Averages the error of the boxes over the G regions of the global batch.

    Args:
        located_boxes, boxes: the answered and the true boxes of this rank, float[R, 4] xyxy,
            canvas frame.
        region: int64[K], if there are several true boxes of a region, then float[K, 4]: the region
            of each. The one with the smallest error counts.
        num_global: G, regions over all ranks.
        kind: `mse` is the paper's, over the 4 * G numbers; `l1_giou` is mean |error| plus half of
            (1 - GIoU), which starts to move sooner.

    Returns:
        scalar, at least float32, scaled so that its mean over ranks is the single-process loss.
    """
    located_boxes = at_least_float32(located_boxes)
    boxes = boxes.to(located_boxes)
    answered = located_boxes if region is None else located_boxes[region]
    if kind == "mse":
        errors = F.mse_loss(answered, boxes, reduction="none").mean(1)
    else:
        giou = elementwise_giou(answered, boxes)
        errors = (answered - boxes).abs().mean(1) + _GIOU_WEIGHT * (1 - giou)
    if region is not None:
        smallest = errors.new_zeros(len(located_boxes))
        errors = smallest.scatter_reduce(0, region, errors, "amin", include_self=False)
    return errors.sum() * (world_size() / max(1, num_global))
