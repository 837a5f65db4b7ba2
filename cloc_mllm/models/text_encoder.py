"""The text tower f_T at the real length of its texts.

Letters: P texts, T tokens (longest of the batch), E embedding width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TextEncoder(nn.Module):
    """An open_clip text tower (native or Hugging Face): int64[P, T] -> float[P, E]."""

    text: Any

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, input_ids: Tensor) -> Tensor:
        """Pooled and projected, not normalised. T may be anything up to the context length.

        open_clip's native tower adds its full causal mask whatever T is, so the mask is cut to T
        for the call; at T = context length the call is open_clip's own, bit for bit.
        """
        if not len(input_ids):  # not every tower takes an empty batch
            return self(input_ids.new_ones(1, 1))[:0]
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
