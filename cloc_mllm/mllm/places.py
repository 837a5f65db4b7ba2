"""Where things lie in the rows of a batch, so that the model need not look for them.

A GPU that is asked where the `<image>` tokens are makes the host wait for it. The collator knows,
and says so. Letters: B rows, T tokens, K blocks of N `<image>` tokens, R regions, L labelled
positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cloc_mllm.mllm.losses import IGNORE_INDEX


class Places(NamedTuple):
    """Indices into the rows joined to one of B * T tokens.

    Attributes:
        images: int64[K * N], the `<image>` tokens, block by block.
        regions: int64[R], the `<region>` tokens, in the order of `VisionInputs.region_boxes`.
        learnt: int64[L], the positions that predict a labelled token.
        targets: int64[L], the tokens that they predict.
        boxes: int64[...], those of `learnt` that predict a `<box>` token.
        most_regions: the most regions that any image has.
        most_answers: the most boxes that are answered in any image.
    """

    images: Tensor
    regions: Tensor
    learnt: Tensor
    targets: Tensor
    boxes: Tensor
    most_regions: int
    most_answers: int = 0

    def each(self, change: Callable[[Tensor], Tensor]) -> Places:
        """The same with every tensor changed, as by a copy to a device."""
        return Places._make([*map(change, self[:-2]), *self[-2:]])


def places_of(
    inputs: dict[str, Tensor],
    image_token_id: int | None,
    region_token_id: int | None,
    box_token_id: int | None,
) -> Places:
    """Finds the places of a batch on the CPU, whose blocks and regions are in the order of tokens.

    Args:
        inputs: the arguments of the model, see `MllmBatch`.
        image_token_id, region_token_id, box_token_id: None where the tokenizer has no such token.
    """
    input_ids, labels = inputs["input_ids"].flatten(), inputs["labels"]
    learnt, targets = labelled(labels)
    is_box = torch.zeros_like(targets) if box_token_id is None else targets == box_token_id
    most = most_answers = 0
    if len(inputs.get("region_image_index", ())):
        most = int(inputs["image_index"][inputs["region_image_index"]].bincount().max())
    if len(inputs.get("answer_image_index", ())):
        most_answers = int(inputs["answer_image_index"].bincount().max())
    return Places(
        _positions(input_ids, image_token_id),
        _positions(input_ids, region_token_id),
        learnt,
        targets,
        learnt[is_box.bool()],
        most,
        most_answers,
    )


def _positions(input_ids: Tensor, token_id: int | None) -> Tensor:
    """Where a token stands: int64[K]."""
    if token_id is None:
        return input_ids.new_empty(0)
    return (input_ids == token_id).nonzero()[:, 0]


def labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the positions that predict a labelled token, in the joined rows, and these tokens:
    int64[B, T] -> int64[L] each."""
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], 1)
    following = following.flatten()
    learnt = (following != IGNORE_INDEX).nonzero()[:, 0]
    return learnt, following[learnt]
