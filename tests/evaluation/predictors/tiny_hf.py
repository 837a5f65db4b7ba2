"""The smallest checkpoints of other grounding models: random weights, processors made offline."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AddedToken,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

from cloc_mllm.data.tokenizer import train_byte_level_bpe

_TEXTS = ["Locate the smaller crab, output its bbox coordinates.", "detect a boat"]
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,
}
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(special: list[str], plain: list[str] = ()) -> PreTrainedTokenizerBase:
    tokenizer = train_byte_level_bpe(_TEXTS, vocab_size=300)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in special], True)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in plain])
    return tokenizer


def save_qwen2_5_vl(directory: Path) -> None:
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>", "<|box_start|>", "<|box_end|>"]
    tokenizer = _tokenizer(special)
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=_TEXT
        | {
            "vocab_size": len(tokenizer),
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(directory)
    size = {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size, patch_size=14),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, patch_size=14),
        chat_template=_QWEN_TEMPLATE,
    ).save_pretrained(directory)


def save_paligemma(directory: Path) -> None:
    tokenizer = _tokenizer(["<bos>", "<image>"])
    tokenizer.bos_token = "<bos>"
    image_processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        text_config=_TEXT
        | {
            "model_type": "gemma",
            "vocab_size": len(processor.tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": 32,
        },
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    PaliGemmaForConditionalGeneration(config).save_pretrained(directory)
    processor.save_pretrained(directory)
