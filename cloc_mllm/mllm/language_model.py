"""The language model behind the projectors: loaded whole or quantised, and back to float32."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloc_mllm.config import Quantization


def attention_for_training() -> str:
    """On a CPU the fused kernel's backward in bf16 costs more than all else of a small model."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def load_language_model(name: str, quantization: Quantization = "none") -> PreTrainedModel:
    """An `AutoModelForCausalLM` in float32, or with its linear layers (not the output layer) in 4
    bits (nf4) or 8 (LLM.int8) by bitsandbytes."""
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
        # its bf16 repacking in eval() silently ruins every later gradient on such CPUs
        module.support_avx512bf16_for_cpu = False
    return language_model


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The bitsandbytes layers of a model by name (peft's wrappers around them have their names)."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        and type(module).__module__.startswith("bitsandbytes")
    }


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict on the CPU in which a quantised layer has the float32 weight it computes with,
    under the name that the layer it was made of has."""
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
    """Whether a tensor holds the codes of a quantised layer, or what they are read with:
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
    return codes.float() * scales.view(-1, 1) / 127  # one scale a row
