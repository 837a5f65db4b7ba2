"""Stage 2 on chats: from conversation files to a model, alone and mixed with records."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cloc_mllm import cli
from cloc_mllm.config import (
    AlignmentConfig,
    ConversationConfig,
    LoraConfig,
    MllmConfig,
    Stage2Config,
    Stage2DataConfig,
    Stage2RunConfig,
    TowerOptimConfig,
)
from cloc_mllm.data.parquet import load_chats, write_records
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.train.logging import read_log
from cloc_mllm.train.preflight import check_records
from cloc_mllm.train.stage2 import run_stage2
from tests.data.formats import write_lines
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]
BOX = "[0.1, 0.3, 0.4, 0.7]"


def row(*talk: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(talk)]
    return {"conversations": turns, **more}


ROWS = [
    row("<image>\nWhere is the crab?", BOX, "Sure?", "Yes.", image="a.png"),
    row(f"<image>\nWhat is in {BOX}?", "a boat", image="b.png"),
    row("<image><image>\nCompare.", f"a crab {BOX} and none", image=["a.png", "b.png"]),
    row("Hello", "Hi there"),
    row("<image>\nDescribe the image.", "a crab", *["More?", "a clock"] * 60, image="a.png"),
]


def built(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (80, 60), color).save(folder / name)
    write_lines(folder / "rows.jsonl", rows)
    build = ["data", "build", "llava", "--frame", "original", "--rows", str(folder / "rows.jsonl")]
    assert cli.main([*build, "--images", str(folder), "--out", str(folder / "set")]) == 0
    return folder / "set"


@pytest.fixture
def config(mllm_config: MllmConfig, tiny_scenes: Any, tmp_path: Path) -> Stage2Config:
    chats = built(tmp_path / "chats", ROWS)
    write_records(tiny_scenes[:8], tmp_path / "records")
    return Stage2Config(
        model=dataclasses.replace(mllm_config, lora=LoraConfig(rank=2, alpha=4)),
        data=Stage2DataConfig(mixture={str(chats): 1, str(tmp_path / "records"): 1}, num_workers=0),
        conversations=ConversationConfig(questions_per_image=2, max_length=400),
        optim=TowerOptimConfig(lr=1e-2, warmup_steps=0),
        run=Stage2RunConfig(
            output_dir=str(tmp_path / "run"),
            steps=20,
            global_batch_size=4,
            precision="fp32",
            log_every=1,
        ),
    )


def metrics_of(config: Stage2Config) -> list[dict[str, Any]]:
    return read_log(Path(config.run.output_dir) / "log.jsonl")


def test_validation_chats_give_perplexity(config: Stage2Config, tmp_path: Path) -> None:
    """Taught by heart, the chats become less and less perplexing; training does not notice."""
    config.data.validation = str(built(tmp_path / "validation", ROWS))
    config.run.steps, config.run.eval_every, config.run.eval_questions = 10, 5, 4
    run_stage2(config)
    halfway, end = read_log(Path(config.run.output_dir) / "log.jsonl", "eval")
    assert end["chats/perplexity"] == pytest.approx(math.exp(end["chats/loss"]))
    assert end["chats/loss"] < halfway["chats/loss"]
    with_evaluation = [row["loss"] for row in metrics_of(config)]
    config.data.validation, config.run.output_dir = "", str(tmp_path / "without")
    run_stage2(config)
    assert [row["loss"] for row in metrics_of(config)] == with_evaluation


@pytest.mark.parametrize("box_head", [False, True], ids=["written", "head"])
def test_twenty_steps_of_chats_and_records(config: Stage2Config, box_head: bool) -> None:
    config.model.box_head = box_head
    assert run_stage2(config).step == 20
    metrics = metrics_of(config)
    losses = [row["loss"] for row in metrics]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert any(row["dropped_questions"] > 0 for row in metrics)  # of the long chat
    assert (Path(config.run.output_dir) / "model" / "config.json").is_file()


def test_features_are_kept_of_the_pictures_of_chats(config: Stage2Config, tmp_path: Path) -> None:
    config.run.steps = 3
    plain = dataclasses.replace(config)
    run_stage2(plain)
    expected = [row["loss"] for row in metrics_of(plain)]
    config.data.feature_cache = str(tmp_path / "features")
    config.run = dataclasses.replace(config.run, output_dir=str(tmp_path / "cached"))
    run_stage2(config)
    # encoded in batches of another size: see tests/train/test_features.py
    assert [row["loss"] for row in metrics_of(config)] == pytest.approx(expected, rel=1e-5)


def test_a_dry_run_shows_a_chat(config: Stage2Config, capsys: pytest.CaptureFixture[str]) -> None:
    config.data = Stage2DataConfig(train=min(config.data.mixture), num_workers=0)
    run_stage2(config, dry_run=True)
    shown = capsys.readouterr().out
    assert "preflight: 5 of 5 records checked, all can be trained on" in shown
    assert "Where is the crab?" in shown and "[[" in shown


def test_alignment_needs_records(config: Stage2Config) -> None:
    config.alignment = AlignmentConfig(steps=1)
    with pytest.raises(ValueError, match=r"holds chats, but stage 1 and the alignment .* --as reg"):
        run_stage2(config)


def test_chats_that_do_not_fit_are_skipped_and_counted(
    config: Stage2Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        row("<image>\nHi", "a crab " * 400, "Sure?", "Yes.", image="a.png"),
        row("Say it", "a </s> b"),
    ]
    mixture = config.data.mixture
    records = str(tmp_path / "records")
    config.data.mixture = {str(built(tmp_path / "more", [bad[0], *ROWS, bad[1]])): 1, records: 1}
    with pytest.raises(ValueError, match=r"2 records cannot be .* chats with data\.skip_chats"):
        run_stage2(config)
    config.data.skip_chats = True
    run_stage2(config, dry_run=True)
    assert not Path(config.run.output_dir).exists()
    assert "chats:               5 kept         2 dropped" in capsys.readouterr().out
    config.run.steps = 4
    run_stage2(config)
    lines = (Path(config.run.output_dir) / "skipped_chats.jsonl").read_text().splitlines()
    skipped = list(map(json.loads, lines))
    reasons = [(of["kind"], of["reason"]) for of in skipped]
    expected = [("chat", "too_long"), *[("turn", "too_long")] * 4]
    assert reasons == [*expected, ("chat", "end_tokens"), *[("turn", "end_tokens")] * 2]
    with_skips = [row["loss"] for row in metrics_of(config)]
    config.data = dataclasses.replace(config.data, mixture=mixture)  # without the bad ones
    config.run = dataclasses.replace(config.run, output_dir=str(tmp_path / "clean"))
    run_stage2(config)
    assert [row["loss"] for row in metrics_of(config)] == with_skips


def test_a_set_of_which_every_chat_is_skipped_is_refused(
    config: Stage2Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = built(tmp_path / "more", [row("Say it", "a </s> b")])
    config.data = Stage2DataConfig(train=str(chats), num_workers=0, skip_chats=True)
    with pytest.raises(ValueError, match=r"none of the 1 chats can be learnt from"):
        run_stage2(config)
    assert "1 dropped (end_tokens 1)" in capsys.readouterr().out


def test_a_chat_template_that_refuses_a_turn_is_a_fault_of_the_chat(
    mllm_config: MllmConfig, tmp_path: Path
) -> None:
    rows = [row("Hi", "Hello"), row("Hi", "Hello", system="Be brief."), row("Hi", "Hello")]
    items = list(load_chats(built(tmp_path / "chats", rows)).without_images())
    _, processor = build_mllm(mllm_config)
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    processor.chat_template = refuses + processor.chat_template
    collator = ConversationCollator(processor, ConversationConfig(max_length=300))
    found = check_records(items, 3, collator, seed=0, num_epochs=[1, 1, 1])
    assert list(found.ids) == ["template"] and len(found.ids["template"]) == 1
    assert found.ids["template"] == ["line 2, no system"]


@pytest.mark.parametrize(
    ("answer", "changes", "reason"),
    [
        ("a <region> b", {}, "region_tokens"),
        ("a </s> b", {}, "end_tokens"),
        ("a <box> b", {"box_head": True}, "box_tokens"),
        ("a crab " * 200, {}, "too_long"),
    ],
)
def test_chats_that_would_stop_a_run_are_refused_before_it(
    answer: str, changes: dict[str, Any], reason: str, mllm_config: MllmConfig, tmp_path: Path
) -> None:
    rows = [row("Hi", "Hello"), row("<image>\nHi", "x", "More", answer, image="a.png")]
    if reason == "too_long":
        rows[1] = row("<image>\nHi", answer, image="a.png")
    if reason == "box_tokens":
        rows[1]["conversations"][3]["value"] = "a b"
    chats = load_chats(built(tmp_path / "chats", rows))
    items = list(chats.without_images())
    if reason == "box_tokens":  # the reader of LLaVA's rows refuses the mark itself
        last = items[1].turns[3]
        piece = dataclasses.replace(last.pieces[0], text=answer)
        items[1].turns[3] = dataclasses.replace(last, pieces=(piece,))
    _, processor = build_mllm(dataclasses.replace(mllm_config, **changes))
    collator = ConversationCollator(processor, ConversationConfig(max_length=300))
    found = check_records(items, 2, collator, seed=0, num_epochs=[1, 1])
    assert list(found.ids) == [reason] and len(found.ids[reason]) == 1
    assert found.ids[reason][0].startswith("line 2")
