"""Towers of Transformers: its own classes, called as open_clip's towers are.

A CLIP is not among them: its weights go into open_clip's own classes (`models/starts.py`).
Letters: B images, N tokens, D token width, E embedding width, P texts, T tokens of a text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class HfVisionTower(nn.Module):
    """An image model of Transformers: SigLIP, DINOv2, DINOv3, C-RADIO, TIPSv2 or one alike.

    Args:
        config: `to_dict()` of its config.
        image_size: side of the pictures in pixels.
        embed_dim: E. A linear map follows where the model's own pooled width is another.

    Attributes:
        grid_size: rows and columns of the tokens.
    """

    def __init__(self, config: dict[str, Any], image_size: int, embed_dim: int) -> None:
        super().__init__()
        from transformers import AutoModel

        # pictures of another size than the config's are the embeddings' business
        self.model: Any = AutoModel.from_config(_as_config(config | _own_size(config, image_size)))
        settings = self.model.config
        self.width = int(settings.hidden_size)
        side = image_size // int(settings.patch_size)
        self.patch_size = (int(settings.patch_size),) * 2
        self.grid_size = (side, side)
        summaries = len(getattr(settings, "summary_idxs", None) or [0])  # C-RADIO has several
        pooled = self.width * summaries
        self.projection: nn.Module = nn.Identity()
        if pooled != embed_dim:
            self.projection = nn.Linear(pooled, embed_dim, bias=False)
        self.num_summaries = summaries

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """What the model pooled, before `projection`, and tokens float[B, N, D], after its last
        norm."""
        out = self.model(pixel_values)
        height, width = self.grid_size
        pooled = getattr(out, "pooler_output", None)
        if pooled is None:
            pooled = getattr(out, "summary", None)
        tokens = out.last_hidden_state[:, -height * width :]
        if pooled is None:
            pooled = tokens.mean(1)
        return pooled, tokens

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Pools and projects every token by itself: float[B, N, D] -> float[B, N, E]."""
        head = getattr(self.model, "head", None)
        if head is not None:  # attention pooling, here over one token
            tokens = head(tokens.flatten(0, 1).unsqueeze(1)).unflatten(0, tokens.shape[:2])
        return self.projection(torch.cat([tokens] * self.num_summaries, -1))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        _set_checkpointing(self.model, enable)


class HfTextTower(nn.Module):
    """The text side of SigLIP or TIPSv2: int64[P, T] -> float[P, E].

    SigLIP reads the padding, too, and pools at the last token, so texts always have T =
    `context_length` tokens.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import SiglipTextModel, Tipsv2TextModel

        self.ignores_padding = not config["model_type"].startswith("siglip")
        text_model = Tipsv2TextModel if self.ignores_padding else SiglipTextModel
        self.model: Any = text_model(_as_config(config))
        self.context_length = int(self.model.config.max_position_embeddings)
        self.vocab_size = int(self.model.config.vocab_size)
        self.pad_id = int(self.model.config.pad_token_id or 0)

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = (input_ids != self.pad_id).long() if self.ignores_padding else None
        return self.model(input_ids=input_ids, attention_mask=mask).pooler_output

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        _set_checkpointing(self.model, enable)


def _as_config(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _own_size(config: dict[str, Any], image_size: int) -> dict[str, int]:
    """SigLIP's positions are a table of its own size. The others interpolate theirs."""
    is_siglip = config["model_type"] == "siglip_vision_model"
    return {"image_size": image_size} if is_siglip else {}


def _set_checkpointing(model: Any, enable: bool) -> None:
    if enable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
