"""An MLLM above an image tower that is itself a model of Transformers."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from cloc_mllm.config import LoraConfig, MllmConfig, ModelConfig, PrompterConfig
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, ClocMllmProcessor, build_mllm
from cloc_mllm.models.build import build_cloc, load_tokenizer, save_cloc
from cloc_mllm.models.clip_config import resolve_model
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]


@torch.no_grad()
def test_it_loads_again_with_its_pixels(mllm_config: MllmConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = transformers.Dinov2Model(
        transformers.Dinov2Config(image_size=64, patch_size=16, mlp_ratio=2, **shape)
    )
    theirs.save_pretrained(tmp_path / "dino")
    transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=[0.4] * 3, image_std=[0.2] * 3
    ).save_pretrained(tmp_path / "dino")
    config = resolve_model(
        ModelConfig(init=str(tmp_path / "dino"), prompter=PrompterConfig(width=16))
    )
    tokenizer = load_tokenizer(config)
    save_cloc(build_cloc(config, tokenizer), tmp_path / "cloc", config, tokenizer)
    lora = LoraConfig(rank=0)
    built = dataclasses.replace(mllm_config, cloc=str(tmp_path / "cloc"), lora=lora)
    model, processor = build_mllm(built)
    assert processor.image_processor.resize == "squash"
    inputs = processor(
        images=[Image.effect_noise((120, 64), 90).convert("RGB")],
        text=["<image>What is in <region>?"],
        regions=[[[0.1, 0.1, 0.4, 0.9]]],
    )
    model.language_model.set_attn_implementation("sdpa")  # the kernel it is loaded with
    expected = model.eval()(**inputs).logits
    for part in (model, processor):
        part.save_pretrained(tmp_path / "mllm")
    loaded = ClocMllmForConditionalGeneration.from_pretrained(tmp_path / "mllm").eval()
    # Weights mapped from a file lie at addresses that other kernels multiply: 3e-5 in the logits.
    loaded = copy.deepcopy(loaded)
    again = ClocMllmProcessor.from_pretrained(tmp_path / "mllm")
    assert again.image_processor.preprocessing == processor.image_processor.preprocessing
    assert torch.equal(loaded(**inputs).logits, expected)
    wrong = dict(processor.fingerprint, pixel_mean=[0.5] * 3)
    with pytest.raises(ValueError, match=r"pixel_mean: the saved processor has \[0.5"):
        ClocMllmProcessor(processor.tokenizer, processor.image_processor, fingerprint=wrong)
