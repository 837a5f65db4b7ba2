"""Packs all questions of an image behind one copy of its tokens, and several rows in a sequence.

Each question sees the image and itself, never its neighbours, and counts its positions from the
end of the image. So the model computes exactly what it would for one question at a time, as it is
asked later, at a fraction of the cost. Letters: B sequences, T tokens of the longest one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloc_mllm.mllm.losses import IGNORE_INDEX

_SHARED, _PADDING = 0, -1  # segments; questions are numbered from 1
# The length of a sequence at which attention costs as much as everything else: measured on a CPU at
# width 576 (SmolLM2); narrower models reach it sooner, wider ones later.
_TOKENS_OF_EVEN_COST = 1000


@dataclass
class PackedRow:
    """An image with its questions in one row (or a text alone, all of it shared).

    Attributes:
        labels: `IGNORE_INDEX` at the first token, which no token of the row predicts.
        segments: 0 for the shared start, then the number of the question.
        kept: indices of the conversations that are in the row.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    segments: list[int]
    kept: list[int]


def pack_questions(
    conversations: Sequence[tuple[list[int], list[int]]], shared_until: int, max_length: int
) -> PackedRow:
    """Joins `(ids, labels)` conversations that start alike, up to the last token `shared_until`.

    Conversations that do not fit into `max_length` tokens are left out whole, see `kept`.

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


def balanced_sequences(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Decides which rows share a sequence: lists of row indices, in rising order.

    Longest first, each row goes to the shortest sequence. The number of sequences is the one that
    costs least: few sequences are long, so attention is expensive; many need padding. If nothing is
    gained, each row stays alone, in its place.

    Args:
        max_length: most tokens of a sequence, unless one row is longer.
    """
    alone = [[index] for index in range(len(lengths))]
    best, least = alone, _cost(alone, lengths)
    limit = max(max_length, *lengths)
    for num_sequences in range(-(-sum(lengths) // limit), len(lengths)):
        sequences = _longest_first(lengths, num_sequences)
        fits = max(sum(lengths[i] for i in sequence) for sequence in sequences) <= limit
        if fits and (cost := _cost(sequences, lengths)) < least:
            best, least = sequences, cost
    return best


def _longest_first(lengths: Sequence[int], num_sequences: int) -> list[list[int]]:
    sequences: list[list[int]] = [[] for _ in range(num_sequences)]
    shortest = [(0, place) for place in range(num_sequences)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length, place = shortest[0]
        sequences[place].append(index)
        heapq.heapreplace(shortest, (length + lengths[index], place))
    return [sorted(sequence) for sequence in sequences]


def _cost(sequences: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """The cost of the padded rectangle, in tokens that attend to nothing."""
    longest = max(sum(lengths[index] for index in sequence) for sequence in sequences)
    return len(sequences) * longest * (1 + longest / _TOKENS_OF_EVEN_COST)


def pad_sequences(
    sequences: Sequence[Sequence[PackedRow]], pad_token_id: int, *, additive: bool = True
) -> dict[str, Tensor]:
    """Makes input_ids, labels, position_ids int64[B, T] and an attention_mask. The rows of a
    sequence follow each other and do not see each other.

    Args:
        additive: the mask is float32[B, 1, T, T], as any attention takes it; else bool, a quarter
            of the bytes, see `mask_for`.
    """

    def padded(field: str, fill: int) -> Tensor:
        values = [[v for row in rows for v in getattr(row, field)] for rows in sequences]
        return _padded(values, fill)

    return {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORE_INDEX),
        "position_ids": padded("position_ids", 0),
        "attention_mask": _additive(_visible(sequences)) if additive else _visible(sequences),
    }


def mask_for(attention: str, visible: Tensor) -> Tensor:
    """Makes the mask that a kernel takes.

    Args:
        attention: `eager` adds its mask to the logits; others, as `sdpa`, take bool.
        visible: bool[B, 1, T, T], where each token may look; a mask of numbers stays as it is.
    """
    return _additive(visible) if attention == "eager" and visible.dtype == torch.bool else visible


def _additive(visible: Tensor) -> Tensor:
    """0 where a token may look, the lowest float elsewhere."""
    lowest = torch.finfo(torch.float32).min
    mask = torch.full(visible.shape, lowest, device=visible.device)
    return mask.masked_fill_(visible, 0.0)


def _visible(sequences: Sequence[Sequence[PackedRow]]) -> Tensor:
    """Marks where each token may look: bool[B, 1, T, T].

    A token looks back at its own question and at the shared start of its row. Padding looks at
    padding, so that its softmax is defined.
    """
    own, shared = [], []
    for rows in sequences:
        own_of, shared_of, first = [], [], 0  # segments are counted through the sequence
        for row in rows:
            own_of += [first + segment for segment in row.segments]
            shared_of += [first + _SHARED] * len(row.segments)
            first += max(row.segments) + 1
        own.append(own_of)
        shared.append(shared_of)
    key = _padded(own, _PADDING)[:, None, :]
    query, start = key.mT, _padded(shared, _PADDING)[:, :, None]
    return ((key == query) | (key == start)).tril_()[:, None]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
