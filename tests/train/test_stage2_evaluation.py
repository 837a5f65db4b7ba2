"""The periodic evaluation of stage 2: what it reports, and that training does not notice it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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
from cloc_mllm.mllm import build_mllm
from cloc_mllm.train.checkpoint import list_checkpoints
from cloc_mllm.train.logging import read_log
from cloc_mllm.train.stage2 import run_stage2
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]

METRICS = {"rec/acc_at_0_5", "rec/mean_iou", "referring/exact_match", "referring/word_f1"}


@pytest.fixture(scope="module")
def sets(tiny_scenes, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sets")
    write_records(tiny_scenes[:8], directory / "train")
    write_records(tiny_scenes[8:], directory / "validation")
    bare = [dataclasses.replace(record, regions=[]) for record in tiny_scenes[:2]]
    write_records(bare, directory / "bare")
    return directory


@pytest.fixture
def config(mllm_config: MllmConfig, sets: Path, tmp_path: Path) -> Stage2Config:
    lora = LoraConfig(rank=2, alpha=4, dropout=0.3)
    return Stage2Config(
        model=dataclasses.replace(mllm_config, lora=lora),
        data=Stage2DataConfig(
            train=str(sets / "train"), validation=str(sets / "validation"), num_workers=0
        ),
        conversations=ConversationConfig(questions_per_image=3),
        optim=TowerOptimConfig(lr=1e-2, warmup_steps=0),
        run=Stage2RunConfig(
            output_dir=str(tmp_path / "run"),
            steps=20,
            global_batch_size=4,
            precision="fp32",
            log_every=1,
            eval_every=4,
            eval_questions=5,
        ),
    )


FORMS: dict[str, dict[str, Any]] = {
    "LoRA with dropout, packed": {},
    "rows alone": {"conversations.pack": False},
    "feature cache": {"data.feature_cache": "cache"},
    "box head": {"model.box_head": True},
    "prompter head": {"model.box_head": True, "model.box_reader": "prompter"},
    "vision trained": {
        "model.freeze_vision_encoder": False,
        "run.gradient_checkpointing": True,
    },
    "integers, whole model": {"model.box_format": "integers", "model.lora": LoraConfig(rank=0)},
    "absent things, tiles, bf16": {
        "conversations.absent": 0.5,
        "model.max_tiles": 2,
        "run.precision": "bf16",
    },
}


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_training_is_the_same_with_and_without(
    config: Stage2Config, changes: dict[str, Any], tmp_path: Path
) -> None:
    for setting, value in changes.items():
        part, name = setting.split(".")
        value = str(tmp_path / value) if value == "cache" else value
        setattr(getattr(config, part), name, value)
    config.run.steps = 6 if changes else 20
    result = run_stage2(config)
    with_evaluation = Path(config.run.output_dir)
    config.data.validation = ""
    config.run.output_dir = str(tmp_path / "without")
    run_stage2(config)

    without = Path(config.run.output_dir)
    actual, expected = (
        [(row["step"], row["loss"], row["grad_norm"]) for row in read_log(run / "log.jsonl")]
        for run in (with_evaluation, without)
    )
    assert len(actual) == config.run.steps and actual == expected
    for name in ("weights", "optimizer"):
        trained, alone = (
            load_file(list_checkpoints(run / "checkpoints")[-1] / f"{name}.safetensors")
            for run in (with_evaluation, without)
        )
        assert [key for key in alone if not torch.equal(trained[key], alone[key])] == []
    evaluated = read_log(with_evaluation / "log.jsonl", "eval")
    assert [row["step"] for row in evaluated] == ([4, 6] if changes else [4, 8, 12, 16, 20])
    assert {name: evaluated[-1][name] for name in METRICS} == result.metrics
    assert all(0 <= row[name] <= 1 for row in evaluated for name in METRICS)
    assert read_log(without / "log.jsonl", "eval") == []


def test_a_run_resumes_with_an_evaluation_it_did_not_have(config: Stage2Config) -> None:
    validation = config.data.validation
    config.data.validation, config.run.steps = "", 2
    run_stage2(config)
    config.data.validation, config.run.eval_questions, config.run.steps = validation, 2, 3
    assert run_stage2(config).metrics.keys() == METRICS


def test_a_perfect_answer_scores_one(config: Stage2Config, sets: Path) -> None:
    """A model that answers nothing but true names and boxes."""
    model, processor = build_mllm(config.model)
    questions = draw_questions(load_records(sets / "validation"), 6, seed=0)
    truth = [right for asked in questions for right in asked.references]

    class Perfect(GroundingPredictor):
        def answer(self, asked: Any, **options: Any) -> Any:
            answers = super().answer(asked, **options)
            return [
                dataclasses.replace(
                    answer,
                    text=right.labels[0],
                    boxes=dataclasses.replace(answer.boxes, xyxy=torch.tensor(right.boxes[:1])),
                    failure=None,
                )
                for answer, right in ((a, truth.pop(0)) for a in answers)
            ]

    metrics = quick_answer_metrics(Perfect(model, processor), questions)
    assert metrics == pytest.approx(dict.fromkeys(METRICS, 1.0))


def test_an_evaluation_draws_no_random_numbers(config: Stage2Config, sets: Path) -> None:
    model, processor = build_mllm(config.model)
    questions = draw_questions(load_records(sets / "validation"), 3, seed=0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    quick_answer_metrics(GroundingPredictor(model, processor), questions)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1] == after[1]


def test_the_questions_are_drawn_by_seed(sets: Path) -> None:
    records = load_records(sets / "validation")
    rec, referring = draw_questions(records, 5, seed=0)
    assert (rec.task, referring.task) == ("rec", "referring")
    assert len(rec.queries) == len(referring.queries) == 5
    again, other = (draw_questions(records, 5, seed)[0] for seed in (0, 1))
    assert rec.queries == again.queries != other.queries
    (everything, _) = draw_questions(records, 10_000, seed=0)
    assert len(everything.queries) > 30 and len(everything.records) == len(records)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("run.eval_questions", 0, r"run\.eval_questions is 0; ask at least one"),
        ("data.validation", "bare", r"bare have no regions to ask about"),
        ("data.validation", "nowhere", r"nowhere"),
    ],
    ids=["no question", "no region", "no records"],
)
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(
    config: Stage2Config, sets: Path, setting: str, value: Any, message: str
) -> None:
    part, name = setting.split(".")
    setattr(getattr(config, part), name, str(sets / value) if part == "data" else value)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_stage2(config, dry_run=True)
