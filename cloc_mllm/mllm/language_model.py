"""Loads the language model, in a dtype or quantised, and reads its weights back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cloc_mllm.config import Quantization


def attention_for_training() -> str:
    """Chooses the attention kernel. On a CPU the fused one is not used: in bf16 its backward pass
    takes longer than the rest of a small model."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def load_language_model(
    name: str, quantization: Quantization = "none", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Loads an `AutoModelForCausalLM`, file by file, without a copy in another dtype.

    Args:
        quantization: puts the linear layers (not the output layer) into 4 bits (nf4) or 8
            (LLM.int8) by bitsandbytes.
        dtype: of all other weights, and what 4 bits are multiplied in.
    """
    options: dict[str, Any] = {"attn_implementation": attention_for_training()}
    if quantization != "none":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = (
            BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            if quantization == "4bit"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        if torch.cuda.is_available():  # Transformers would take the first GPU on every rank
            options["device_map"] = {"": torch.cuda.current_device()}
    language_model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=False, **options
    )
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


def dequantized(module: Any) -> Tensor:
    """Unpacks the weight that a bitsandbytes layer computes with: float[out, in]."""
    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    # a layer's first call moves codes and scales from its weight to its state
    codes = weight.data if module.state.CB is None else module.state.CB
    scales = weight.SCB if module.state.SCB is None else module.state.SCB
    return codes.float() * scales.view(-1, 1) / 127  # one scale per row
