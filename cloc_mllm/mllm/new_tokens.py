"""Trains the embeddings of new tokens without a copy of the word table.

peft's layer writes the learnt rows into a copy of the whole table at every call, and backward makes
a gradient of that size. For a vocabulary of 152,000 words at width 3,584 that is 1 GB in bf16 per
call, and the loss calls the output layer once per chunk of labels. Here the table is read as it is
and the rows are put into the result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn


class RowsBesideTable(TrainableTokensLayer):
    """peft's layer of trainable rows, with the same parameters, names and values.

    It knows one adapter, which is never merged: `merging.py` writes merged weights.
    """

    def forward_adapters(
        self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Embeds `x: int64[...]`, or makes logits of `x: float[..., H]`."""
        if self.disable_adapters or not active_adapters:
            return self.base_layer(x, *args, **kwargs)
        (name,) = active_adapters
        rows = self.trainable_tokens_delta[name].to(self.base_layer.weight.dtype)
        ids, order = self._ids(name, x.device)
        rows = rows[order]
        if isinstance(self.base_layer, nn.Embedding):
            return self._embed(x, rows, ids)
        return self._logits(x, rows, ids)

    def _embed(self, input_ids: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        place = torch.searchsorted(ids, input_ids.contiguous()).clamp(max=len(ids) - 1)
        learnt = F.embedding(place, rows)
        scale = self._get_embed_scale()  # some families scale embeddings in their layer's forward
        if scale is not None:
            learnt = learnt * scale.to(learnt.dtype)
        is_new = (ids[place] == input_ids).unsqueeze(-1)
        return torch.where(is_new, learnt, self.base_layer(input_ids))

    def _logits(self, hidden: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        bias: Any = self.base_layer.bias
        learnt = F.linear(hidden, rows, None if bias is None else bias[ids])
        # in place: the layer's own backward does not need its result
        return self.base_layer(hidden).index_copy_(-1, ids, learnt)

    def _ids(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ids of the tokens in rising order, and the row of each; copied to a device once."""
        known: dict[torch.device, tuple[Tensor, Tensor]]
        known = self.__dict__.setdefault("_ids_on_device", {})
        if device not in known:
            known[device] = torch.tensor(self.token_indices[name], device=device).sort()
        return known[device]


def keep_rows_beside_table(language_model: nn.Module) -> None:
    """Makes peft's layers of trainable rows read the word table without copying it."""
    for module in language_model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = RowsBesideTable
