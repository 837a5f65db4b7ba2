"""Fixtures: the smallest real stage-1 model, language model and MLLM, all with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.config import LoraConfig, MllmConfig, ModelConfig, PrompterConfig

TEXTS = [
    "Where is the smaller crab?",
    "What is in <region>?",
    "Describe the image.",
    "a red apple left of a clock, a crab and the second boat from the left",
]


@pytest.fixture(scope="session")
def cloc_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-1 directory: ViT of width 32 on a 4 x 4 grid."""
    return save_tiny_cloc(tmp_path_factory.mktemp("cloc"), PrompterConfig())


def save_tiny_cloc(directory: Path, prompter: PrompterConfig) -> Path:
    from cloc_mllm.data.tokenizer import load_text_tokenizer
    from cloc_mllm.models.build import build_cloc, save_cloc

    config = ModelConfig(
        clip_config={
            "embed_dim": 24,
            "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
            "text_cfg": {"layers": 1, "width": 16, "heads": 1},
        },
        image_size=64,
        tokenizer="open_clip:ViT-B-16",
        context_length=16,
        prompter=prompter,
    )
    tokenizer = load_text_tokenizer(config.tokenizer, config.context_length)
    torch.manual_seed(0)
    save_cloc(build_cloc(config, tokenizer), directory, config, tokenizer)
    return directory


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of width 32 with tied embeddings, and a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cloc_mllm.data.tokenizer import train_byte_level_bpe

    tokenizer = train_byte_level_bpe(TEXTS, vocab_size=300)
    torch.manual_seed(0)
    config = LlamaConfig(**tiny_shape(tokenizer), tie_word_embeddings=True)
    directory = tmp_path_factory.mktemp("llm")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_shape(tokenizer: Any) -> dict[str, Any]:
    """Arguments of a language model's config, whatever its family."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": 0.2,
    }


def one_step_and_back(model: Any, processor: Any, inputs: Any, part: Any, directory: Path) -> Any:
    """Train a step, of which every parameter of `part` has its share, save, load: the logits are
    the same. Returns the loaded model."""
    from cloc_mllm.mllm import ClocMllmForConditionalGeneration, merge_and_save

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model.train()(**inputs).loss
    loss.backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    optimizer.step()
    with torch.no_grad():
        assert model(**inputs).loss < loss
        expected = model.eval()(**{**inputs, "labels": None}).logits

    merge_and_save(model, processor, directory)

    loaded = ClocMllmForConditionalGeneration.from_pretrained(directory).eval()
    with torch.no_grad():
        actual = loaded(**{**inputs, "labels": None}).logits
    # a model loads with another attention kernel than it trains with
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    return loaded


def _tiny_config(cloc_dir: Path, llm_dir: Path) -> MllmConfig:
    return MllmConfig(
        cloc=str(cloc_dir),
        language_model=str(llm_dir),
        projector_width=24,
        num_bins=20,
        lora=LoraConfig(rank=0),
    )


@pytest.fixture
def mllm_config(cloc_dir: Path, llm_dir: Path) -> MllmConfig:
    return _tiny_config(cloc_dir, llm_dir)


@pytest.fixture(scope="session")
def roi_mllm_dir(cloc_dir: Path, llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved MLLM that pools image tokens under boxes, points and masks."""
    from cloc_mllm.mllm import build_mllm, merge_and_save

    torch.manual_seed(0)
    config = replace(_tiny_config(cloc_dir, llm_dir), region_features="roi")
    directory = tmp_path_factory.mktemp("roi_mllm")
    merge_and_save(*build_mllm(config), directory)
    return directory


@pytest.fixture(scope="session")
def mllm_dir(cloc_dir: Path, llm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved MLLM, as stage 2 leaves it."""
    from cloc_mllm.mllm import build_mllm, merge_and_save

    torch.manual_seed(0)
    config = _tiny_config(cloc_dir, llm_dir)
    directory = tmp_path_factory.mktemp("mllm")
    merge_and_save(*build_mllm(config), directory)
    return directory
