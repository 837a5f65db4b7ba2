"""Runs the text tower f_T at the real length of its texts.

Letters: P texts, T tokens (longest of the batch), E embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloc_mllm.devices import without_waiting
from cloc_mllm.models.attention import fast_attention

# The cost of one more call of the tower, forward and backward, in tokens of a larger call. On a CPU
# it was measured: 46-62 for a ViT-B/16's tower, 62-87 for one of width 128. Elsewhere it is an
# estimate: a call is some 500 kernels, and kernels are short.
_CALL_TOKENS = {"cpu": 60}
_CALL_TOKENS_ELSEWHERE = 3000


class TextEncoder(nn.Module):
    """An open_clip text tower (native or Hugging Face): int64[P, T] -> float[P, E]."""

    text: Any

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, input_ids: Tensor) -> Tensor:
        """Pooled and projected features, not normalised. T may be anything up to the context
        length.

        open_clip's native tower adds its full causal mask whatever T is, so the mask is cut to T
        for the call. At T = context length the call is open_clip's own, bit for bit.
        """
        return self.project(self.run_tower(input_ids))

    def project(self, pooled: Tensor) -> Tensor:
        """Applies the tower's last linear map to what `run_tower` gives: -> float[P, E]."""
        return self.text.proj(pooled) if self._is_hugging_face else pooled

    def run_tower(self, input_ids: Tensor) -> Tensor:
        """Computes all of `forward` that does not depend on the last linear map of a Hugging Face
        tower: int64[P, T] -> float[P, W]. Of a native tower it is all of it."""
        if not len(input_ids):  # not every tower takes an empty batch
            return self.run_tower(input_ids.new_ones(1, 1))[:0]
        # open_clip pools with indices that it makes on the default device, and would copy them
        place = input_ids.device if input_ids.device.type == "cuda" else nullcontext()
        with place, fast_attention(self.text, input_ids):
            return self._forward_any_length(input_ids)

    def encode_groups(
        self, *groups: Tensor, on_host: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Features of several groups of texts: int64[P, T] -> float[P, E] each.

        Groups of float[P, W] are what `run_tower` made of texts before, and are only projected.

        Texts of all groups are sorted by length into buckets, one call of the tower per bucket, so
        that a long text does not lengthen all others. The cost of a call (`_CALL_TOKENS`) decides
        how many there are. The features equal those of `forward` up to rounding: matrix products of
        other sizes sum in another order.

        Args:
            on_host: the groups on the CPU, whose lengths are read without waiting for a GPU; None
                copies them.
        """
        if groups[0].is_floating_point():
            return [self.project(group) for group in groups]
        pad_id = self._pad_id
        if pad_id is None or self._is_partitioned or not sum(map(len, groups)):
            return [self(group) for group in groups]
        input_ids = _padded_alike(groups, pad_id)
        lengths = self._lengths(_padded_alike(on_host or groups, pad_id).cpu())
        call_tokens = _CALL_TOKENS.get(input_ids.device.type, _CALL_TOKENS_ELSEWHERE)
        shorter, rows, features = 0, [], []
        for bound in bucket_bounds(lengths.tolist(), call_tokens):
            rows.append(((lengths > shorter) & (lengths <= bound)).nonzero()[:, 0])
            chosen = without_waiting(rows[-1], input_ids.device)
            features.append(self(input_ids[chosen, :bound]))
            shorter = bound
        order = without_waiting(torch.cat(rows).argsort(), input_ids.device)
        in_order = torch.cat(features)[order]
        return list(in_order.split([len(group) for group in groups]))

    @property
    def _is_hugging_face(self) -> bool:
        return hasattr(self.text, "config")

    @property
    def _is_partitioned(self) -> bool:
        """Whether this is ZeRO-3, where every rank must call the tower equally often."""
        return hasattr(next(self.parameters()), "ds_id")

    @property
    def _pad_id(self) -> int | None:
        """The id that may be added to or cut from the end of a text, or None if that would change
        its features."""
        if self._is_hugging_face:  # Hugging Face: attention leaves padding out
            return self.text.config.pad_token_id
        is_causal = getattr(self.text, "attn_mask", None) is not None
        pools_at_end_token = getattr(self.text, "pool_type", "") in ("argmax", "eos")
        return 0 if is_causal and pools_at_end_token and self.text.cls_emb is None else None

    def _lengths(self, input_ids: Tensor) -> Tensor:
        """The number of tokens of each text that its features depend on: int64[P]."""
        if self._is_hugging_face:
            positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
            return ((input_ids != self._pad_id) * positions).amax(1)
        # causal, and pooled at the end token, which `argmax` takes to be the highest
        is_end = input_ids == self.text.eos_id if self.text.pool_type == "eos" else input_ids
        return is_end.int().argmax(1) + 1

    def _forward_any_length(self, input_ids: Tensor) -> Tensor:
        if self._is_hugging_face:
            mask = input_ids.ne(self.text.config.pad_token_id).long()
            out = self.text.transformer(input_ids=input_ids, attention_mask=mask)
            return self.text.pooler(out, mask)
        full_mask = getattr(self.text, "attn_mask", None)
        length = input_ids.shape[1]
        if full_mask is None or length == full_mask.shape[0]:
            return self.text(input_ids)
        if length > full_mask.shape[0]:
            raise ValueError(
                f"text of {length} tokens, but the tower takes at most {full_mask.shape[0]}; "
                "the tokenizer must cut texts to the context length"
            )
        try:
            self.text.attn_mask = full_mask[:length, :length]
            return self.text(input_ids)
        finally:
            self.text.attn_mask = full_mask


def _padded_alike(groups: Sequence[Tensor], pad_id: int) -> Tensor:
    """Joins groups of texts at the length of the longest: int64[P, T]."""
    longest = max(group.shape[1] for group in groups)
    padded = [F.pad(group, (0, longest - group.shape[1]), value=pad_id) for group in groups]
    return torch.cat(padded)


def bucket_bounds(lengths: list[int], call_tokens: int) -> list[int]:
    """Chooses the longest text of each bucket, ascending, so that the total cost is smallest.

    A bucket costs `call_tokens` and, for each of its texts, as many tokens as its longest has.
    """
    counts = sorted(Counter(lengths).items())
    cheapest: list[tuple[int, list[int]]] = [(0, [])]  # for the texts of the first i lengths
    for i, (longest, _) in enumerate(counts, 1):
        cheapest.append(
            min(
                (cost + call_tokens + longest * sum(n for _, n in counts[j:i]), [*bounds, longest])
                for j, (cost, bounds) in enumerate(cheapest)
            )
        )
    return cheapest[-1][1]
