"""An MLLM above a tower whose tokens have several scales."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from cloc_mllm.config import LoraConfig, MllmConfig, ModelConfig, PrompterConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, build_mllm
from cloc_mllm.models.build import build_cloc, save_cloc
from cloc_mllm.models.clip_config import ResolvedModel
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]


@pytest.mark.parametrize("region_features", ["prompter", "roi"])
@pytest.mark.parametrize("projector", ["linear", "pixel_shuffle", "resampler"])
@torch.no_grad()
def test_it_reads_both_scales(
    mllm_config: MllmConfig, tmp_path: Path, region_features: str, projector: str
) -> None:
    torch.manual_seed(0)
    config = ResolvedModel(
        ModelConfig(
            clip_config={
                "embed_dim": 24,
                "vision_cfg": {
                    "timm_model_name": "resnet10t",
                    "timm_pool": "avg",
                    "timm_proj": "linear",
                },
                "text_cfg": {"width": 16, "heads": 2, "layers": 1},
            },
            image_size=64,
            token_strides=[16, 32],
            tokenizer="builtin",
            context_length=24,
            prompter=PrompterConfig(width=32),
        )
    )
    save_cloc(build_cloc(config), tmp_path / "cloc", config, load_text_tokenizer("builtin", 24))
    model, processor = build_mllm(
        dataclasses.replace(
            mllm_config,
            cloc=str(tmp_path / "cloc"),
            projector=projector,
            region_features=region_features,
            max_tiles=2,
            lora=LoraConfig(rank=0),
        )
    )
    model.eval()
    inputs = processor(
        images=[Image.effect_noise((128, 64), 90).convert("RGB")],
        text=["<image>What is in <region>?"],
        regions=[[[0.1, 0.1, 0.4, 0.9]]],
    )
    assert inputs["pixel_values"].shape == (3, 3, 64, 64)  # the whole and two tiles
    expected = model(**inputs).logits
    tokens = model.encode_images(inputs["pixel_values"]).tokens
    assert tokens.shape == (3, 16, 256 + 512)
    from_cache = model(**{**inputs, "pixel_values": tokens}).logits
    assert torch.equal(from_cache, expected)
    fine_changed = tokens.clone()
    fine_changed[..., :256] += torch.randn(3, 16, 256)
    assert not torch.equal(model(**{**inputs, "pixel_values": fine_changed}).logits, expected)
    model.save_pretrained(tmp_path / "mllm")
    loaded = ClocMllmForConditionalGeneration.from_pretrained(tmp_path / "mllm").eval()
    # Weights mapped from a file lie at addresses that other kernels multiply: 3e-5 in the logits.
    torch.testing.assert_close(copy.deepcopy(loaded)(**inputs).logits, expected)
