"""Translates what earlier versions wrote into today's names. Every loader asks here alone."""

from __future__ import annotations

import re
from typing import Any, TypeVar

T = TypeVar("T")

# Prefixes of weights: of a CLOC and an MLLM, and of the file that `cloc-mllm export` writes.
RENAMED_WEIGHTS = {
    "vision.prompter.": "vision.region_encoder.prompter.",
    "vision.box_head.": "vision.region_encoder.box_head.",
    "vision.roi_align.": "vision.region_encoder.",
    "region.roi_align.": "region.",
}

# what every picture went through before it could be chosen
_FIRST_PREPROCESS = {
    "resize": "letterbox",
    "interpolation": "bicubic",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "padding_rgb": [124, 116, 104],
}


def current_name(name: str) -> str:
    """The name that a weight has today, also behind a prefix (`exp_avg.NAME`)."""
    for old, new in RENAMED_WEIGHTS.items():
        name = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", name)
    return name


def by_current_name(state: dict[str, T]) -> dict[str, T]:
    """Puts a state dict, or an optimizer's moments, under today's names."""
    return {current_name(name): value for name, value in state.items()}


def current_model_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Translates the settings of a `ModelConfig`. Before it could be chosen, the text prior was
    `region`; the loss of BoxHead was a setting of the model."""
    left_out = ("pretrained", "prompter")
    kept = {name: value for name, value in values.items() if name not in left_out}
    prompter = {"text_prior": "region", **values.get("prompter", {})}
    prompter.pop("box_head_loss", None)
    first = {"preprocess": _FIRST_PREPROCESS, "contrastive_loss": "softmax", "phrase_prior": 0.0}
    return {**first, **kept, "prompter": prompter}


def current_run_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Translates the settings of a training run, of either stage, that its checkpoint holds."""
    current = dict(values)
    prompter = values.get("model", {}).get("prompter", {})
    if prompter:
        current["model"] = current_model_settings(values["model"])
    if "language_model" in values.get("model", {}):
        current["model"] = {"dtype": "float32", **values["model"]}  # before it could be chosen
    if "box_head_loss" in prompter:
        current["loss"] = {**values["loss"], "box": prompter["box_head_loss"]}
    if rates := values.get("optim", {}).get("layer_lr"):
        rates = {current_name(f"{prefix}.").removesuffix("."): rates[prefix] for prefix in rates}
        current["optim"] = {**values["optim"], "layer_lr": rates}
    return current
