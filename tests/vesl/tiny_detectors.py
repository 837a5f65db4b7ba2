"""The smallest real OWLv2 and Grounding DINO, with random weights, as directories on disk."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tiny_owlv2(directory: Path) -> Path:
    """ViT of width 32 on an 8 x 8 grid of a 64 px square."""
    from transformers import (
        CLIPTokenizer,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vocabulary = {word: index for index, word in enumerate(_clip_tokens())}
    config = Owlv2Config(
        text_config={**tower, "vocab_size": len(vocabulary), "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 64, "patch_size": 8},
        projection_dim=32,
    )
    Owlv2ForObjectDetection(config).save_pretrained(directory)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[])
    image_processor = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(image_processor, tokenizer).save_pretrained(directory)
    return directory


def _clip_tokens() -> list[str]:
    """Single letters, alone and at the end of a word; id 0 is padding, which OWLv2 masks."""
    letters = [chr(code) for code in range(33, 127)]
    ends = [f"{letter}</w>" for letter in letters]
    return ["!pad", *letters[1:], "!", *ends, "<|startoftext|>", "<|endoftext|>"]


def save_tiny_grounding_dino(directory: Path) -> Path:
    """Swin of width 16, one encoder and two decoder layers, 20 queries."""
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    torch.manual_seed(0)
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?"]
    tokens += [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 2],
            "window_size": 4,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        text_config={
            "model_type": "bert",
            "vocab_size": len(tokens),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=20,
        max_text_len=32,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(directory)
    processor = GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    GroundingDinoProcessor(processor, BertTokenizer(vocab=vocabulary)).save_pretrained(directory)
    return directory
