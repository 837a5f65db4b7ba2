"""The optimizer, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from cloc_mllm.config import OptimConfig, Stage1OptimConfig, TowerOptimConfig
from cloc_mllm.train.layer_decay import lr_scales
from cloc_mllm.train.muon import Muon

NEW_PARTS = (
    "vision.region_encoder",
    "region_logit_scale",
    "region_logit_bias",
)
_EMBEDDINGS = ("embed", "lm_head")  # matrices that are tables: one row per token or position


def lr_factor(step: int, num_steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate at `step`, which counts from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: Any, factor: float) -> None:
    """Sets the rate of every group to `factor` times its peak.

    Args:
        optimizer: ours, or DeepSpeed's wrapper of it.
    """
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]


def freeze_by_lr(model: nn.Module, optim: OptimConfig) -> None:
    """Freezes every parameter whose `layer_lr` is 0.

    Raises:
        ValueError: a prefix in `layer_lr` names no parameter, or gives a rate to parameters that
            are all frozen.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in optim.layer_lr:
        if not any(_has_prefix(name, prefix) for name in names):
            known = sorted({name.split(".")[0] for name in names})
            raise ValueError(
                f"optim.layer_lr names {prefix!r}, but no parameter starts with it; "
                f"the model's parts are {', '.join(known)}"
            )
    for name, parameter in model.named_parameters():
        if _peak_lr(name, optim) == 0.0:
            parameter.requires_grad_(False)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for prefix, rate in optim.layer_lr.items():
        if rate and not any(_has_prefix(name, prefix) for name in trainable):
            raise ValueError(
                f"optim.layer_lr gives {prefix!r} the rate {rate}, but all of it is frozen; a rate "
                "thaws nothing: leave it out, or change what freezes it (in stage 2 "
                "model.freeze_vision_encoder and model.lora)"
            )


def param_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups the trainable parameters by optimizer, learning rate and weight decay.

    Vectors and scalars (biases, norms, temperatures, gates) do not decay.

    Raises:
        ValueError: nothing is trainable, or Muon is used without an `lr` that its rates refer to.
    """
    if optim.optimizer == "muon" and not optim.lr > 0:
        raise ValueError(
            f"optim.lr is {optim.lr}; muon needs it above 0, because muon_lr is the rate of "
            "matrices whose AdamW rate would be lr. To freeze parts, use layer_lr"
        )
    scales = lr_scales(model, optim.layer_decay) if isinstance(optim, TowerOptimConfig) else {}
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            muon = optim.optimizer == "muon" and _is_hidden_matrix(name, parameter)
            lr = _peak_lr(name, optim) * scales.get(name, 1.0)
            lr *= optim.muon_lr / optim.lr if muon else 1.0
            decay = 0.0 if parameter.ndim < 2 else optim.weight_decay
            groups.setdefault((muon, lr, decay), []).append(parameter)
    if not groups:
        raise ValueError("no parameter is trainable; optim.layer_lr or a freeze option froze all")
    return [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay, "muon": muon}
        for (muon, lr, decay), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module, optim: OptimConfig, *, muon_dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Builds plain AdamW or Muon, which DeepSpeed accepts without compiling anything."""
    beta1, beta2 = optim.betas
    groups = param_groups(model, optim)
    if optim.optimizer == "muon":
        return Muon(groups, betas=(beta1, beta2), dtype=muon_dtype)
    # fused: one pass over each parameter, on a CPU seven times faster than torch's default loop
    return torch.optim.AdamW(groups, betas=(beta1, beta2), fused=True)


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and not any(table in name for table in _EMBEDDINGS)


def _has_prefix(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _peak_lr(name: str, optim: OptimConfig) -> float:
    """The peak rate of a parameter. It depends on name and settings alone, so resuming keeps it."""
    new_lr = optim.new_lr if isinstance(optim, Stage1OptimConfig) else 0.0
    rates = dict.fromkeys(NEW_PARTS, new_lr) if new_lr else {}
    rates |= optim.layer_lr
    matching = [prefix for prefix in rates if _has_prefix(name, prefix)]
    return rates[max(matching, key=len)] if matching else optim.lr
