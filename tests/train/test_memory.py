"""What a step is said to need, against what real modules hold and what a run prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.config import LoraConfig, MllmConfig, OptimConfig, Stage2Config, TowerRunConfig
from cloc_mllm.data.parquet import write_records
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.build import hold_frozen, new_token_ids
from cloc_mllm.train.memory import LiveBytes, StepEstimate, StepShape, estimate_step
from cloc_mllm.train.optim import freeze_by_lr
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]

SHAPE = StepShape(2, 64, num_labels=20, num_images=3, num_regions=4, num_bytes=1000)


def job(base: MllmConfig, **model: Any) -> Stage2Config:
    return Stage2Config(
        model=replace(base, **{"dtype": "float32", **model}), run=TowerRunConfig(precision="bf16")
    )


def estimate(config: Stage2Config, shape: StepShape = SHAPE, num_ranks: int = 1) -> StepEstimate:
    model, processor = build_mllm(config.model)
    return estimate_step(config, model.config, new_token_ids(processor), shape, num_ranks=num_ranks)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora": LoraConfig(rank=2)},
        {"lora": LoraConfig(rank=2), "dtype": "bfloat16"},
        {"lora": LoraConfig(rank=2), "freeze_vision_encoder": False, "dtype": "bfloat16"},
    ],
    ids=["whole", "lora", "lora-bf16", "lora-bf16-encoder"],
)
def test_weights_gradients_and_optimizer_are_those_of_the_real_model(
    mllm_config: MllmConfig, settings: dict[str, Any]
) -> None:
    config = job(mllm_config, **settings)
    model, _ = build_mllm(config.model)
    freeze_by_lr(model, OptimConfig())
    hold_frozen(model, torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)

    actual = estimate(config)

    assert actual.weights == weights
    assert (actual.gradients, actual.optimizer) == (trainable, 2 * trainable)
    assert actual.activations > 0 and actual.logits >= 0 and actual.flops > 0
    assert actual.total == sum(
        (weights, 3 * trainable, actual.activations, actual.logits, SHAPE.num_bytes)
    )


def test_what_is_shared_among_ranks(mllm_config: MllmConfig) -> None:
    config = job(mllm_config, lora=LoraConfig(rank=2))
    alone = estimate(config)
    config.run.zero_stage = 1
    actual = estimate(config, num_ranks=4)

    # ZeRO 1 adds a float32 copy of the rank's share
    assert actual.optimizer == (alone.optimizer + alone.gradients) // 4
    assert actual.weights == alone.weights


def test_more_tokens_and_no_checkpointing_need_more(mllm_config: MllmConfig) -> None:
    config = job(mllm_config, lora=LoraConfig(rank=2))
    usual = estimate(config)
    long = estimate(config, replace(SHAPE, num_tokens=128))
    config.run.gradient_checkpointing = True
    checkpointed = estimate(config)

    assert long.activations > 1.5 * usual.activations
    assert long.flops > 1.5 * usual.flops
    assert checkpointed.activations < usual.activations
    assert checkpointed.flops > usual.flops  # the forward pass runs twice


def test_live_bytes_follow_what_autograd_keeps() -> None:
    x = torch.zeros(100, 50)
    weight = torch.zeros(50, 50, requires_grad=True)
    with LiveBytes([x, weight]) as live:
        hidden = x @ weight.t()  # 20,000 bytes; the view of the weight is none
        assert live.now == 20_000
        loss = hidden.sigmoid().sum()  # sigmoid keeps its result
        del hidden
        assert live.now == 20_004
        loss.backward()
        del loss
    assert live.now == weight.grad.nbytes  # type: ignore[union-attr]
    assert live.peak >= 40_004


def test_the_dry_run_says_whether_a_step_fits_and_what_to_change_first(
    mllm_config: MllmConfig, tmp_path: Path, tiny_scenes: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from cloc_mllm.train.stage2 import main

    write_records(tiny_scenes[:2], tmp_path / "records")
    arguments = [
        "--dry_run",
        f"--model.cloc={mllm_config.cloc}",
        f"--model.language_model={mllm_config.language_model}",
        f"--data.train={tmp_path / 'records'}",
        "--run.global_batch_size=2",
        "--run.precision=fp32",
    ]

    assert main([*arguments, "--gpu_memory=24"]) == 0
    assert "fits into 24 GiB of a GPU" in capsys.readouterr().out

    assert main([*arguments, "--gpu_memory=1"]) == 0
    told = capsys.readouterr().out
    assert "does not fit into 1 GiB of a GPU" in told
    order = [told.index(s) for s in ("model.dtype: bf", "run.gradient_check", "quantization: 4bit")]
    assert order == sorted(order)

    with pytest.raises(ValueError, match="--gpu_memory is a question to --dry_run"):
        main(["--gpu_memory=24"])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "bf16")])
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(
    tmp_path: Path, dtype: str, precision: str
) -> None:
    from stage2_memory import job, measure, write_language_model

    write_language_model("smollm2-135m", tmp_path)

    measured = measure(job(tmp_path, dtype=dtype, precision=precision, num_images=4), num_steps=2)

    assert measured.estimate.total == pytest.approx(measured.peak, rel=0.2)
