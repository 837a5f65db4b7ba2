"""{LoRA, 4-bit, whole} x {ZeRO 0, 2, 3} x {one, two ranks}, and bf16, as autocast and as the dtype
of frozen weights: what is saved loads, resumes and merges.

Each cell trains two steps, then the second again from the checkpoint of the first, and leaves
the trained model's logits beside its weights. One pair of processes runs all cells of two ranks.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from cloc_mllm.cli import main
from cloc_mllm.config import (
    ConversationConfig,
    LoraConfig,
    MllmConfig,
    Stage2Config,
    Stage2DataConfig,
    Stage2RunConfig,
    TowerOptimConfig,
)
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.evaluation.quick import draw_questions, quick_answer_metrics
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm import merge_and_save
from cloc_mllm.mllm.adapter import load_adapter
from cloc_mllm.mllm.language_model import quantized_layers
from cloc_mllm.train import engine, stage2
from cloc_mllm.train.deepspeed_config import deepspeed_config
from cloc_mllm.train.export import load_trained
from cloc_mllm.train.logging import read_log
from tests.distributed.ranks import run_ranks
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

pytest.importorskip("deepspeed")

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]

KINDS = {
    "lora": ({"lora": LoraConfig(rank=2, alpha=4)}, "fp32"),
    "lora_bf16": ({"lora": LoraConfig(rank=2, alpha=4)}, "bf16"),
    "4bit": ({"lora": LoraConfig(rank=2, alpha=4), "quantization": "4bit"}, "fp32"),
    "lora_held": ({"lora": LoraConfig(rank=2, alpha=4), "dtype": "bfloat16"}, "bf16"),
    "4bit_held": (
        {"lora": LoraConfig(rank=2, alpha=4), "quantization": "4bit", "dtype": "bfloat16"},
        "bf16",
    ),
    "whole_held": ({"dtype": "bfloat16"}, "bf16"),
    "whole": ({}, "fp32"),
    "whole_bf16": ({}, "bf16"),
}
HELD = ("lora_held", "4bit_held", "whole_held")
EVERYWHERE = [*product(("lora", "4bit", "whole", *HELD), (0, 2, 3))]
# `lora_bf16` is autocast, with float32 weights all the same, so one stage on two ranks shows it
RUNS = {1: [*EVERYWHERE, ("lora_held", 1)], 2: [*EVERYWHERE, ("lora_bf16", 2), ("whole_bf16", 2)]}
# A merged product rounds once more, W + BA against (W)x + B(Ax); held in bf16 W + BA has 8 bits.
MERGED = {"float32": {"atol": 1e-4, "rtol": 1e-4}, "bfloat16": {"atol": 0.1, "rtol": 0.02}}
CELLS = [
    pytest.param(kind, zero_stage, num_ranks, id=f"{kind}-zero{zero_stage}-{num_ranks}rank")
    for num_ranks, runs in RUNS.items()
    for kind, zero_stage in runs
]
LINEAR = torch.nn.functional.linear


def logits_of(model: Any, processor: Any) -> Tensor:
    """In float32, whatever the model was trained in."""
    picture = Image.new("RGB", (40, 20), "teal")
    inputs = processor(picture, "<image>Where is <region>?", [[[0.1, 0.1, 0.5, 0.5]]])
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def merged_tolerance(kind: str) -> dict[str, float]:
    return MERGED[KINDS[kind][0].get("dtype", "float32")]


def config_of(base: MllmConfig, records: Path, root: Path, kind: str, zero: Any) -> Stage2Config:
    changes, precision = KINDS[kind]
    return Stage2Config(
        model=dataclasses.replace(base, **changes),
        data=Stage2DataConfig(train=str(records), validation=str(records), num_workers=0),
        conversations=ConversationConfig(questions_per_image=2),
        optim=TowerOptimConfig(lr=1e-2, warmup_steps=0),
        run=Stage2RunConfig(
            output_dir=str(root / f"{kind}_zero{zero}"),
            steps=2,
            global_batch_size=2,
            precision=precision,  # type: ignore[arg-type]
            zero_stage=zero,
            save_every=1,
            eval_every=1,
            eval_questions=3,
        ),
    )


def save_with_logits(model: Any, processor: Any, directory: Path) -> None:
    with mock.patch.object(torch.nn.functional, "linear", LINEAR):  # ZeRO-3's rounds otherwise
        expected = logits_of(model, processor)
    merge_and_save(model, processor, directory)
    save_file({"logits": expected}, directory.parent / "logits.safetensors")


def cut_everything(*arguments: Any) -> dict[str, Any]:
    """ZeRO-3 leaves weights below 100,000 numbers whole, which is all that these models have."""
    config = deepspeed_config(*arguments)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def train_cells(base: MllmConfig, records: Path, root: Path) -> None:
    with (
        mock.patch.object(engine, "deepspeed_config", cut_everything),
        mock.patch.object(stage2, "merge_and_save", save_with_logits),
    ):
        for kind, zero_stage in RUNS[int(os.environ.get("WORLD_SIZE", "1"))]:
            config = config_of(base, records, root, kind, zero_stage)
            stage2.run_stage2(config)
            first = Path(config.run.output_dir)
            again = first.with_name(f"{first.name}_resumed")
            if engine.is_main():
                kept = "checkpoints/step_00000001"
                shutil.copytree(first / kept, again / kept)
            engine.all_reduce_sum(torch.zeros(1))  # the other rank waits for the copy
            config.run.output_dir = str(again)
            stage2.run_stage2(config)


@pytest.fixture(scope="module")
def runs(
    cloc_dir: Path, llm_dir: Path, tiny_scenes: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("saving")
    write_records(tiny_scenes[:4], root / "records")
    base = MllmConfig(
        cloc=str(cloc_dir), language_model=str(llm_dir), num_bins=20, lora=LoraConfig(rank=0)
    )
    train = partial(train_cells, base, root / "records")
    train(root / "1")
    run_ranks(train, root / "2", num_ranks=2)
    return root


def run_of(runs: Path, kind: str, zero_stage: int, num_ranks: int) -> tuple[Path, Tensor]:
    run = runs / str(num_ranks) / f"{kind}_zero{zero_stage}"
    return run, load_file(run / "logits.safetensors")["logits"]


@pytest.mark.parametrize(("kind", "zero_stage", "num_ranks"), CELLS)
def test_the_saved_model_loads_with_transformers_alone(
    runs: Path, kind: str, zero_stage: int, num_ranks: int
) -> None:
    run, expected = run_of(runs, kind, zero_stage, num_ranks)
    model = AutoModelForImageTextToText.from_pretrained(run / "model")
    held = torch.bfloat16 if kind in ("lora_held", "4bit_held") else torch.float32
    assert {p.dtype for p in model.language_model.parameters()} == {held}
    assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    processor = AutoProcessor.from_pretrained(run / "model")
    assert not any("lora" in name for name in model.state_dict())
    actual = logits_of(model, processor)
    torch.testing.assert_close(actual, expected, **merged_tolerance(kind))


@pytest.mark.parametrize(("kind", "zero_stage", "num_ranks"), CELLS)
def test_a_checkpoint_gives_the_trained_model_back(
    runs: Path, kind: str, zero_stage: int, num_ranks: int
) -> None:
    run, expected = run_of(runs, kind, zero_stage, num_ranks)
    model, processor = load_trained(run)
    assert torch.equal(logits_of(model, processor), expected)


@pytest.mark.parametrize(("kind", "zero_stage", "num_ranks"), CELLS)
def test_resuming_is_bit_equal(runs: Path, kind: str, zero_stage: int, num_ranks: int) -> None:
    run, _ = run_of(runs, kind, zero_stage, num_ranks)
    resumed = run.with_name(f"{run.name}_resumed")
    for name in ("weights", "optimizer"):
        path = f"checkpoints/step_00000002/{name}.safetensors"
        actual, expected = load_file(resumed / path), load_file(run / path)
        assert actual.keys() == expected.keys()
        assert [n for n in expected if not torch.equal(actual[n], expected[n])] == []
        assert expected


@pytest.mark.parametrize(("kind", "zero_stage", "num_ranks"), CELLS)
def test_the_main_rank_evaluates_the_whole_model(
    runs: Path, kind: str, zero_stage: int, num_ranks: int
) -> None:
    run, _ = run_of(runs, kind, zero_stage, num_ranks)
    questions = draw_questions(load_records(runs / "records"), 3, seed=0)
    expected = quick_answer_metrics(GroundingPredictor(*load_trained(run)), questions)
    rows = read_log(run / "log.jsonl", "eval")
    assert [row["step"] for row in rows] == [1, 2]
    assert {name: rows[-1][name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["lora", "4bit", "lora_held", "4bit_held"])
def test_export_of_an_adapter_and_its_merge(runs: Path, tmp_path: Path, kind: str) -> None:
    run, expected = run_of(runs, kind, zero_stage=3, num_ranks=2)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", "--mllm", str(run), "--out", str(adapter)]) == 0
    model, processor = load_adapter(
        adapter,
        quantization="4bit" if "4bit" in kind else "none",
        dtype=torch.bfloat16 if "held" in kind else torch.float32,
    )
    assert bool(quantized_layers(model)) == ("4bit" in kind)
    assert torch.equal(logits_of(model, processor), expected)

    assert main(["export", "--mllm", str(run), "--merge", "--out", str(merged)]) == 0
    whole = AutoModelForImageTextToText.from_pretrained(merged)
    actual = logits_of(whole, AutoProcessor.from_pretrained(merged))
    torch.testing.assert_close(actual, expected, **merged_tolerance(kind))


def test_what_cannot_be_exported_says_why(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = run_of(runs, "whole", 0, 1)
    assert main(["export", "--mllm", str(run), "--out", str(tmp_path / "a")]) == 2
    assert "has no LoRA (model.lora.rank is 0)" in capsys.readouterr().err
    merged = str(run / "model")
    assert main(["export", "--mllm", merged, "--merge", "--out", str(tmp_path / "b")]) == 2
    assert "OUTPUT_DIR/model, which a finished run writes, is merged" in capsys.readouterr().err
