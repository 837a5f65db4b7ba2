"""Loads the language model, in a dtype or quantised, reads its weights back, adds tokens."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel

from cloc_mllm.config import Quantization
from cloc_mllm.models.position import sinusoidal_code

# what Transformers calls the argument of keys and values: `cache` since 5.24
_TAKEN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _TAKEN else "past_key_values"


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


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer of a language model.

    Raises:
        FileNotFoundError: there is no such model here, and none that the hub gives.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"model.language_model {name} is neither the directory of a language model nor one "
            f"that the hub gives ({' '.join(str(error).split())}); training/tiny_llm.py and "
            "training/smollm2.py make such directories"
        ) from error


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


@torch.no_grad()
def add_embeddings(language_model: PreTrainedModel, new: range, location: list[int]) -> None:
    """Rows for the new tokens, at the scale of the old ones; rows that are there stay.

    Location tokens start as a smooth curve: neighbouring bins get similar embeddings, so what is
    learnt of one coordinate holds for those around it.
    """
    if not new:
        return
    if new.stop > len(word_table(language_model.get_input_embeddings())):
        language_model.resize_token_embeddings(new.stop, mean_resizing=False)
    tables = [word_table(language_model.get_input_embeddings())]
    if not language_model.config.tie_word_embeddings:
        tables.append(word_table(language_model.get_output_embeddings()))
    for table in tables:
        old = table[: new.start].float()
        mean, std = old.mean(0), (old - old.mean(0)).std()
        table[new.start : new.stop] = mean.to(table.dtype)
        if location and location[0] in new:
            curve = location_curve(len(location), table.shape[1]).to(mean)
            table[location] = (mean + std * curve).to(table.dtype)


def location_curve(num_bins: int, width: int) -> Tensor:
    """Codes of the bins' values with root mean square 1: float[num_bins, width]."""
    values = torch.linspace(0, 1, num_bins)[:, None]
    code = sinusoidal_code(values, width - width % 2) * math.sqrt(2)
    return nn.functional.pad(code, (0, width % 2))


def word_table(embeddings: nn.Module) -> Tensor:
    """The weight of the layer that embeds words, or of the output layer: float[V, H]."""
    return embeddings.get_parameter("weight").detach()
