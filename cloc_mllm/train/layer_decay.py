"""Layer-wise decay of the learning rate: the later a layer of a tower, the higher its rate.

The embeddings of a tower are its layer 0, its L blocks are the layers 1 to L, and what follows them
has depth L + 1. The rate of layer l is lr * decay ** (L + 1 - l). Everything outside of the towers
has the full rate.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from cloc_mllm.models.text_encoder import TextEncoder
from cloc_mllm.models.vision_encoder import VisionEncoder

_BLOCK = re.compile(r"\b(?:resblocks|layers|layer|blocks|block)\.(\d+)\.")
_BEFORE_BLOCKS = re.compile(r"emb|conv1\b|ln_pre\b")  # in open_clip's and Transformers' towers


def lr_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Computes the factor of the learning rate of every parameter in a tower.

    Returns:
        factors by the parameter's name in `model`; none if `decay` is 1.

    Raises:
        ValueError: `decay` is not in (0, 1], or the model has no tower.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"optim.layer_decay is {decay}; expected a factor in (0, 1], 1 is off")
    if decay == 1:
        return {}
    scales: dict[str, float] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, (VisionEncoder, TextEncoder)):
            layers = _layers_of(module)
            depth = 1 + max(layer for layer in layers.values() if layer is not None)
            for name, layer in layers.items():
                distance = 0 if layer is None else depth - layer
                scales[f"{prefix}.{name}"] = decay**distance
    if not scales:
        raise ValueError("optim.layer_decay is set, but the model has no image or text tower")
    return scales


def _layers_of(encoder: VisionEncoder | TextEncoder) -> dict[str, int | None]:
    """Finds the layer of each parameter; None if it comes after the last layer."""
    names = [name for name, _ in encoder.named_parameters()]
    if isinstance(encoder, VisionEncoder) and encoder.is_timm:
        trunk = _timm_layers(encoder.visual.trunk)
        return {name: trunk.get(name.removeprefix("visual.trunk.")) for name in names}
    return {name: _layer_by_name(name) for name in names}


def _layer_by_name(name: str) -> int | None:
    block = _BLOCK.search(name)
    if block is not None:
        return int(block[1]) + 1
    return 0 if _BEFORE_BLOCKS.search(name) else None


def _timm_layers(trunk: Any) -> dict[str, int]:
    from timm.models import group_parameters

    groups = group_parameters(trunk, trunk.group_matcher())
    return {name: int(layer) for layer, members in groups.items() for name in members}
