"""Saving whole: LoRA merged, shards, dtypes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cloc_mllm.config import LoraConfig, MllmConfig
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, build_mllm, merge_and_save
from cloc_mllm.mllm.build import hold_frozen

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def held_model(config: MllmConfig, rank: int, dtype: Any) -> tuple[Any, Any]:
    """A model as stage 2 trains it: what is frozen has the dtype."""
    model, processor = build_mllm(replace(config, lora=LoraConfig(rank=rank), dtype=dtype))
    hold_frozen(model, getattr(torch, dtype))
    return model, processor


@DTYPES
def test_shards_load_as_one_file_does(mllm_config: MllmConfig, tmp_path: Path, dtype: Any) -> None:
    model, processor = held_model(mllm_config, 2, dtype)

    merge_and_save(model, processor, tmp_path / "one")
    merge_and_save(model, processor, tmp_path / "many", max_shard_bytes=10_000)

    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in load_file(tmp_path / "one" / "model.safetensors").values()
    )
    assert sorted(set(index["weight_map"].values())) == files
    one, many = (
        ClocMllmForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("one", "many")
    )
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_saving_again_leaves_no_shard_behind(mllm_config: MllmConfig, tmp_path: Path) -> None:
    model, processor = build_mllm(mllm_config)
    merge_and_save(model, processor, tmp_path, max_shard_bytes=10_000)

    merge_and_save(model, processor, tmp_path)

    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


@DTYPES
@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_the_file_has_what_transformers_would_save(
    mllm_config: MllmConfig, tmp_path: Path, rank: int, dtype: Any
) -> None:
    """Names, and tied weights once."""
    model, processor = held_model(mllm_config, rank, dtype)
    merge_and_save(model, processor, tmp_path / "ours")
    loaded, info = ClocMllmForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    loaded.save_pretrained(tmp_path / "theirs")

    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours, theirs = (
        {
            key: value.shape
            for key, value in load_file(tmp_path / name / "model.safetensors").items()
        }
        for name in ("ours", "theirs")
    )
    assert ours == theirs


def test_what_is_frozen_is_held_in_bfloat16_and_what_learns_in_float32(
    mllm_config: MllmConfig,
) -> None:
    model, _ = build_mllm(replace(mllm_config, lora=LoraConfig(rank=2), dtype="bfloat16"))

    hold_frozen(model, torch.bfloat16)

    for name, parameter in model.named_parameters():
        precise = parameter.requires_grad or name.startswith("vision.region_encoder")
        assert parameter.dtype == (torch.float32 if precise else torch.bfloat16), name


def test_an_encoder_that_alignment_teaches_stays_float32(mllm_config: MllmConfig) -> None:
    model, _ = build_mllm(mllm_config)

    hold_frozen(model, torch.bfloat16, ("projector.", "vision."))

    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_model_loads_in_the_dtype_that_is_asked_for(mllm_dir: Path) -> None:
    """Projectors, Prompter and box head stay float32; it answers without autocast."""
    from cloc_mllm.inference.grounding_predictor import GroundingPredictor

    predictor = GroundingPredictor.from_pretrained(
        mllm_dir, dtype="bfloat16", attn_implementation="eager"
    )

    model = predictor.model
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vision.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vision.region_encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    assert model.language_model.config._attn_implementation == "eager"
    assert len(predictor.ground(Image.new("RGB", (40, 20), "teal"), ["a crab"]).text) == 1
