"""Builds a small language model for the built-in data: its tokenizer and its untrained weights.

Everything else works with any Hugging Face language model; this one needs no download.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cloc_mllm.config import TinyLlmConfig
from cloc_mllm.data.conversations import PROMPTS
from cloc_mllm.data.scenes import CONCEPTS, ZERO_SHOT_CONCEPTS, sample_layout, scene_rng
from cloc_mllm.data.tokenizer import train_byte_level_bpe
from cloc_mllm.mllm.coordinates import BoxFormat
from cloc_mllm.mllm.processing import add_special_tokens
from cloc_mllm.mllm.scene_tokens import NOTHING
from cloc_mllm.models.position import sinusoidal_code

_USER, _ASSISTANT = "<|user|>", "<|assistant|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] == 'assistant' %}}{_ASSISTANT}{{{{ message['content'] }}}}"
    f"{{{{ eos_token }}}}{{% else %}}{_USER}{{{{ message['content'] }}}}{{% endif %}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{_ASSISTANT}{{% endif %}}"
)
_TOKENIZER_SCENES = 300
_VOCABULARY = 1024
_EMBEDDING_STD = 0.06  # with 0.02 the tied output layer stays flat for a thousand steps
_ROPE_THETA = 1e6  # most dimensions hardly turn, so that equal words match at any distance
_VALUE_GAIN = 0.7


def build_tokenizer(box_format: BoxFormat) -> PreTrainedTokenizerBase:
    """Builds a byte-level BPE of the built-in text, with one token for most words; always the same.

    Any string comes back from encoding and decoding (except for a space at its start).
    """
    tokenizer = train_byte_level_bpe(_texts(), _VOCABULARY, (_USER, _ASSISTANT))
    add_special_tokens(tokenizer, box_format)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def build_language_model(
    config: TinyLlmConfig, tokenizer: PreTrainedTokenizerBase, box_format: BoxFormat
) -> LlamaForCausalLM:
    """Builds a Llama with tied embeddings, its location tokens on a smooth curve."""
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=True,
            initializer_range=_EMBEDDING_STD,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        )
    )
    for layer in model.model.layers:
        _start_as_matching(layer.self_attn)
    location: Any = tokenizer.convert_tokens_to_ids(box_format.tokens())
    if location:
        with torch.no_grad():
            values = torch.linspace(0, 1, len(location))[:, None]
            curve = sinusoidal_code(values, config.width) * (_EMBEDDING_STD * math.sqrt(2))
            model.get_input_embeddings().weight[location] = curve
    return model


@torch.no_grad()
def _start_as_matching(attention: nn.Module) -> None:
    """Initialises attention to look for tokens like itself and copy them: queries equal keys, and
    the output is the transpose of values (after "Mimetic Initialization", arXiv 2305.09828)."""
    projections: Any = attention
    width = projections.q_proj.in_features
    same = torch.linalg.qr(torch.randn(width, width))[0]
    copy = torch.linalg.qr(torch.randn(width, width))[0]
    projections.q_proj.weight.copy_(same)
    projections.k_proj.weight.copy_(same)
    projections.v_proj.weight.copy_(copy * _VALUE_GAIN)
    projections.o_proj.weight.copy_(copy.T * _VALUE_GAIN)


def _texts() -> Iterator[str]:
    yield from (*CONCEPTS, *ZERO_SHOT_CONCEPTS, *PROMPTS.values(), NOTHING)
    for index in range(_TOKENIZER_SCENES):
        layout = sample_layout(scene_rng(0, "train", index))
        yield from layout.captions
        yield from (PROMPTS["ground"].format(phrase=e) for of in layout.expressions for e in of)
