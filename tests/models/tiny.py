"""Small real models for tests."""

from __future__ import annotations

from typing import Literal

import torch

from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.models.build import build_cloc
from cloc_mllm.models.clip_config import ResolvedModel, resolve_model
from cloc_mllm.models.cloc import Cloc


def built(config: ModelConfig) -> Cloc:
    return build_cloc(resolve_model(config))


def tiny_config(
    contrastive_loss: Literal["softmax", "sigmoid"] = "softmax", **prompter: object
) -> ResolvedModel:
    config = ModelConfig(
        clip_config={
            "embed_dim": 24,
            "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
            "text_cfg": {"width": 16, "heads": 2, "layers": 1},
        },
        image_size=64,
        tokenizer="builtin",
        context_length=24,
        contrastive_loss=contrastive_loss,
        prompter=PrompterConfig(**prompter),  # type: ignore[arg-type]
    )
    return ResolvedModel(config)  # nothing is left open


def tiny_cloc(
    seed: int = 0,
    contrastive_loss: Literal["softmax", "sigmoid"] = "softmax",
    **prompter: object,
) -> Cloc:
    torch.manual_seed(seed)
    return build_cloc(tiny_config(contrastive_loss, **prompter)).eval()
