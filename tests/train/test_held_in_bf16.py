"""Frozen weights in bf16: 50 steps of LoRA learn as they do with float32 weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.config import (
    LoraConfig,
    MllmConfig,
    Stage2Config,
    Stage2DataConfig,
    TowerOptimConfig,
    TowerRunConfig,
)
from cloc_mllm.data.parquet import write_records
from cloc_mllm.mllm import build_mllm
from cloc_mllm.train.stage2 import run_stage2
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]


def losses(config: Stage2Config) -> torch.Tensor:
    run_stage2(config)
    lines = (Path(config.run.output_dir) / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


def test_bf16_may_be_named_where_auto_would_not_choose_it(
    mllm_config: MllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the recipes of photos name it: on other CPUs it is slow, but right."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    config = replace(mllm_config, lora=LoraConfig(rank=4), dtype="bfloat16")
    model, _ = build_mllm(config)
    assert model.language_model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_the_loss_falls_as_with_float32_weights(
    mllm_config: MllmConfig, tiny_scenes: Any, tmp_path: Path
) -> None:
    write_records(tiny_scenes[:4], tmp_path / "records")

    def job(dtype: Any) -> Stage2Config:
        return Stage2Config(
            model=replace(mllm_config, lora=LoraConfig(rank=4), dtype=dtype),
            data=Stage2DataConfig(train=str(tmp_path / "records")),
            optim=TowerOptimConfig(lr=3e-3, warmup_steps=5),
            run=TowerRunConfig(
                output_dir=str(tmp_path / dtype),
                steps=50,
                global_batch_size=2,
                precision="bf16",
                log_every=1,
                save_every=0,
            ),
        )

    expected = losses(job("float32"))
    actual = losses(job("bfloat16"))

    assert len(expected) == 50
    fall = expected[:5].mean() - expected[-5:].mean()
    assert fall > 0.5
    print((actual - expected).abs().max(), fall)
    assert (actual - expected).abs().max() < 0.05 * fall
