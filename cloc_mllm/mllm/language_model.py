"""Loads the language model, whole or quantised, and turns it back into float32."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloc_mllm.config import Quantization


def attention_for_training() -> str:
    """Chooses the attention kernel. On a CPU the fused one is not used: in bf16 its backward pass
    takes longer than the rest of a small model."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def load_language_model(name: str, quantization: Quantization = "none") -> PreTrainedModel:
    """Loads an `AutoModelForCausalLM` in float32, or with its linear layers (not the output layer)
    in 4 bits (nf4) or 8 bits (LLM.int8) by bitsandbytes."""
    options: dict[str, Any] = {"attn_implementation": attention_for_training()}
    if quantization != "none":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            if quantization == "4bit"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
    language_model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    for module in quantized_layers(language_model).values():
        # on such CPUs eval() repacks the weights for bf16, which silently ruins later gradients
        module.support_avx512bf16_for_cpu = False
    return language_model


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Finds the bitsandbytes layers of a model, by name (peft's wrappers have the same names)."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        and type(module).__module__.startswith("bitsandbytes")
    }


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Makes a state dict on the CPU in which a quantised layer has the float32 weight that it
    computes with, under the name of the original layer's weight."""
    layers = quantized_layers(model)
    state = {
        name: tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
        if not _is_packed(name, layers)
    }
    for layer, module in layers.items():
        state[f"{layer}.weight"] = _dequantized(module).float().cpu()
    return state


def _is_packed(name: str, layers: Collection[str]) -> bool:
    """Whether a tensor holds the codes of a quantised layer, or belongs to them:
    `LAYER.weight`, `LAYER.weight.absmax` and others, `LAYER.weight_format`, `LAYER.SCB`."""
    return name.partition(".weight")[0] in layers or name.removesuffix(".SCB") in layers


def _dequantized(module: Any) -> Tensor:
    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    # a layer's first call moves codes and scales from its weight to its state
    codes = weight.data if module.state.CB is None else module.state.CB
    scales = weight.SCB if module.state.SCB is None else module.state.SCB
    return codes.float() * scales.view(-1, 1) / 127  # one scale per row
