"""All questions of an image behind one copy of its tokens.

Each question sees the image and itself, never its neighbours, and counts its positions from the
end of the image: the model computes exactly what it would for one question at a time, which is how
it is asked later, at a fraction of the cost. Letters: B rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloc_mllm.mllm.losses import IGNORE_INDEX

_SHARED, _PADDING = 0, -1  # segments; questions are numbered from 1


@dataclass
class PackedRow:
    """One image's tokens.

    Attributes:
        segments: 0 for the shared start, then the number of the question.
        kept: indices of the conversations that are in it.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    segments: list[int]
    kept: list[int]


def pack_questions(
    conversations: Sequence[tuple[list[int], list[int]]], shared_until: int, max_length: int
) -> PackedRow:
    """Join `(ids, labels)` conversations that start alike up to the last token `shared_until`.

    Conversations that no longer fit into `max_length` tokens are left out whole; `kept` tells.

    Raises:
        ValueError: not even the first one fits, or they do not start alike.
    """
    first_ids = conversations[0][0]
    start = len(first_ids) - first_ids[::-1].index(shared_until)
    shared = first_ids[:start]
    row = PackedRow(shared[:], [IGNORE_INDEX] * start, list(range(start)), [_SHARED] * start, [])
    for index, (ids, labels) in enumerate(conversations):
        if ids[:start] != shared:
            raise ValueError("questions packed into one row must start with the same image tokens")
        if len(row.input_ids) + len(ids) - start > max_length:
            continue
        row.kept.append(index)
        row.input_ids += ids[start:]
        row.labels += labels[start:]
        row.position_ids += range(start, len(ids))
        row.segments += [index + 1] * (len(ids) - start)
    if not row.kept:
        raise ValueError(
            f"max_length {max_length} holds no question: the image takes {start} tokens and the "
            f"shortest question {min(len(ids) - start for ids, _ in conversations)} more; raise "
            "conversations.max_length"
        )
    return row


def pad_rows(rows: Sequence[PackedRow], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, labels, position_ids int64[B, T] and an additive attention_mask
    float32[B, 1, T, T]."""
    segments = _padded([row.segments for row in rows], _PADDING)
    return {
        "input_ids": _padded([row.input_ids for row in rows], pad_token_id),
        "labels": _padded([row.labels for row in rows], IGNORE_INDEX),
        "position_ids": _padded([row.position_ids for row in rows], 0),
        "attention_mask": _block_mask(segments),
    }


def _block_mask(segments: Tensor) -> Tensor:
    """0 where a token may look (back, at the shared start or its own question), lowest elsewhere.

    Padding looks at itself, so that its softmax is defined.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    visible = ((key == _SHARED) | (key == query)).tril()
    mask = torch.full(visible.shape, torch.finfo(torch.float32).min)
    return mask.masked_fill(visible, 0.0).view(-1, 1, length, length)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
