"""Stage 2 end to end on the smallest models: what trains, what is saved, what is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.llama import modeling_llama

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
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.devices import resolve_precision
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.train.alignment import AlignmentCollator, align_projectors, alignment_step
from cloc_mllm.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from cloc_mllm.train.export import load_trained
from cloc_mllm.train.optim import freeze_by_lr, param_groups
from cloc_mllm.train.stage2 import answer_step, main, run_stage2
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]


@pytest.fixture(scope="module")
def records_dir(tiny_scenes, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("records") / "train"
    write_records(tiny_scenes[:8], directory)
    return directory


@pytest.fixture
def config(mllm_config: MllmConfig, records_dir: Path, tmp_path: Path) -> Stage2Config:
    return Stage2Config(
        model=dataclasses.replace(mllm_config, lora=LoraConfig(rank=2, alpha=4)),
        data=Stage2DataConfig(train=str(records_dir), num_workers=0),
        conversations=ConversationConfig(questions_per_image=3),
        optim=TowerOptimConfig(lr=1e-2, warmup_steps=0),
        run=Stage2RunConfig(
            output_dir=str(tmp_path / "run"), steps=3, global_batch_size=4, precision="fp32"
        ),
    )


def arguments(config: Stage2Config) -> list[str]:
    return [
        *("--model.cloc", config.model.cloc),
        *("--model.language_model", config.model.language_model),
        *("--model.num_bins", "20", "--model.lora.rank", "2"),
        *("--data.train", config.data.train),
        *("--run.output_dir", config.run.output_dir),
    ]


def test_dry_run_shows_what_is_learnt_and_trains_nothing(config, capsys) -> None:
    assert main([*arguments(config), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    first = load_records(config.data.train)[0]
    assert f"one sample ({first.id})" in shown
    assert "<image> x 16" in shown
    learnt = [piece.split("]]")[0] for piece in shown.split("[[")[2:]]
    assert learnt and all(piece.endswith("</s>") for piece in learnt)
    assert not Path(config.run.output_dir).exists()


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
def test_records_that_do_not_fit_are_refused_before_the_first_step(config, dry_run: bool) -> None:
    config.conversations.max_length = 30
    with pytest.raises(ValueError, match=r"8 records cannot .*\n  8 x too_long: .* of 30; "):
        run_stage2(config, dry_run=dry_run)
    assert not Path(config.run.output_dir).exists()


def test_a_run_shows_its_data_first(config, capsys) -> None:
    config.run.steps = 1
    run_stage2(config)
    shown = capsys.readouterr().out
    assert "preflight: 8 of 8 records checked, all can be trained on\none sample (" in shown


def test_a_mixture_is_reported_resumed_and_not_changed(
    config, tiny_scenes, tmp_path: Path, capsys
) -> None:
    write_records(tiny_scenes[8:11], tmp_path / "other")
    mixture = {config.data.train: 3, str(tmp_path / "other"): 1}
    config.data = dataclasses.replace(config.data, train="", mixture=mixture)
    run_stage2(config, dry_run=True)
    shown = capsys.readouterr().out
    # 3 steps of 4: 9 and 3 samples
    assert re.search(r"train +8 +3 +75\.00% +1\.12\n", shown)
    assert re.search(r"other +3 +1 +25\.00% +1\.00\n", shown)
    assert "preflight: 11 of 11 records" in shown
    run_stage2(config)
    unbroken = load_file(Path(config.run.output_dir) / "model" / "model.safetensors")

    config.run.output_dir = str(tmp_path / "resumed")
    run_stage2(
        dataclasses.replace(config, run=dataclasses.replace(config.run, steps=3, save_every=1))
    )
    last = Path(config.run.output_dir) / "checkpoints" / "step_00000003"
    shutil.rmtree(last)
    run_stage2(config)
    resumed = load_file(Path(config.run.output_dir) / "model" / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())

    config.data.mixture = {**mixture, str(tmp_path / "other"): 2}
    with pytest.raises(ValueError, match=r"config data\.mixture\..*other: 1 != 2"):
        run_stage2(config)


def test_it_trains_and_saves_a_plain_model(config) -> None:
    torch.manual_seed(config.run.seed)
    before, _ = build_mllm(config.model)
    assert run_stage2(config).exit_code == 0

    model = AutoModelForImageTextToText.from_pretrained(Path(config.run.output_dir) / "model")
    processor = AutoProcessor.from_pretrained(Path(config.run.output_dir) / "model")
    card = (Path(config.run.output_dir) / "model" / "README.md").read_text()
    assert "GroundingPredictor" in card and config.data.train in card
    assert not any("lora" in name for name in model.state_dict())
    for name, tensor in before.vision.state_dict().items():
        assert torch.equal(model.vision.state_dict()[name], tensor), f"frozen {name} moved"
    moved = dict(model.projector.named_parameters())
    assert all(not torch.equal(moved[n], p) for n, p in before.projector.named_parameters())

    record = load_records(config.data.train)[0]
    question = [
        {"type": "image", "image": record.load_image()},
        {"type": "text", "text": "Describe the image."},
    ]
    chat = [{"role": "user", "content": question}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_training_keeps_no_keys_for_an_answer_to_go_on(config, monkeypatch) -> None:
    monkeypatch.setattr(modeling_llama, "DynamicCache", None)
    config.run.steps, config.data.validation = 1, ""
    assert run_stage2(config).step == 1


def test_each_trainable_parameter_gets_a_gradient(config) -> None:
    model, processor = build_mllm(config.model)
    records = load_records(config.data.train)
    batch = ConversationCollator(processor, config.conversations)([(i, records[i]) for i in (0, 1)])
    answer_step(model, batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # LoRA's A starts with zero gradient because B is zero
            assert "lora_A" in name or parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_rates_and_freezing_by_module(config) -> None:
    config.model.freeze_vision_encoder, config.model.box_head = False, True
    rates = {"projector": 1e-3, "vision": 0.0, "vision.region_encoder": 1e-5, "box_head": 0.0}
    optim = TowerOptimConfig(lr=1e-4, layer_lr=rates)
    model, _ = build_mllm(config.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    freeze_by_lr(model, optim)

    learnt = {
        names[id(p)]: group["lr"] for group in param_groups(model, optim) for p in group["params"]
    }
    by_part: dict[str, set[float]] = {}
    for name, rate in learnt.items():
        in_region_encoder = name.startswith("vision.region_encoder.")
        part = "vision.region_encoder" if in_region_encoder else name.split(".")[0]
        by_part.setdefault(part, set()).add(rate)
    assert by_part == {
        "projector": {1e-3},
        "region_projector": {1e-4},
        "vision.region_encoder": {1e-5},
        "language_model": {1e-4},
    }


def test_a_rate_for_what_is_frozen_is_refused(config) -> None:
    config.optim.layer_lr = {"vision": 1e-5}
    with pytest.raises(ValueError, match=r"'vision' the rate 1e-05.*freeze_vision_encoder"):
        run_stage2(config)


def test_alignment_moves_the_projectors_alone_and_resumes_finished(config) -> None:
    config = dataclasses.replace(
        config, alignment=AlignmentConfig(steps=4, global_batch_size=4, lr=1e-2)
    )
    records = load_records(config.data.train)
    torch.manual_seed(0)
    model, processor = build_mllm(config.model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = AlignmentCollator(processor)([(i, records[i]) for i in range(8)])
    step = alignment_step(processor)
    first = step(model, batch)["loss"]

    align_projectors(model, processor, records, config)
    assert step(model, batch)["loss"] < first
    for name, parameter in model.named_parameters():
        is_projector = name.startswith(("projector.", "region_projector."))
        assert torch.equal(parameter, before[name]) != is_projector, name

    torch.manual_seed(1)
    again, _ = build_mllm(config.model)
    align_projectors(again, processor, records, config)
    assert torch.equal(again.projector.output.weight, model.projector.output.weight)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_alignment_may_teach_the_encoder(config) -> None:
    config.alignment = AlignmentConfig(
        steps=2, global_batch_size=4, optimizer="muon", lr=1e-2, vision_lr=1e-3
    )
    records = load_records(config.data.train)
    model, processor = build_mllm(config.model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    align_projectors(model, processor, records, config)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert any(name.startswith("vision.encoder") for name in moved)
    assert not any(name.startswith("language_model") for name in moved)


def test_a_checkpoint_holds_what_alignment_taught_and_stage_2_froze(config) -> None:
    config.alignment = AlignmentConfig(steps=2, global_batch_size=4, lr=1e-2, vision_lr=1e-3)
    config.optim.layer_lr = {"projector": 0}
    assert config.model.freeze_vision_encoder
    run_stage2(config)
    run = Path(config.run.output_dir)
    saved = AutoModelForImageTextToText.from_pretrained(run / "model").state_dict()
    exported, _ = load_trained(run)
    frozen = {
        name: p
        for name, p in exported.named_parameters()
        if name.startswith(("vision.", "projector."))
    }
    for name, parameter in frozen.items():
        assert torch.equal(parameter, saved[name]), name
    config.data.feature_cache = "cache"
    with pytest.raises(ValueError, match=r"alignment\.vision_lr changes it"):
        run_stage2(config, dry_run=True)


def test_alignment_of_images_without_regions_is_finite(config) -> None:
    model, processor = build_mllm(config.model)
    record = dataclasses.replace(load_records(config.data.train)[0], regions=[])
    losses = alignment_step(processor)(model, AlignmentCollator(processor)([(0, record)]))
    assert losses["regions"] == 0 and torch.isfinite(losses["loss"])


@pytest.mark.parametrize("projector", ["linear", "pixel_shuffle"])
def test_alignment_follows_the_projectors_tokens(config, projector) -> None:
    config.model.projector = projector
    config.alignment = AlignmentConfig(steps=2, global_batch_size=2, lr=1e-2)
    model, processor = build_mllm(config.model)
    records = load_records(config.data.train)
    batch = AlignmentCollator(processor)([(0, records[0])])
    before = alignment_step(processor)(model, batch)["cells"]

    align_projectors(model, processor, records, config)

    assert batch.scene.cell_names.shape[1] == processor.num_image_tokens
    assert alignment_step(processor)(model, batch)["cells"] < before


def test_a_resampler_cannot_be_aligned(config) -> None:
    config.model.projector, config.alignment.steps = "resampler", 1
    with pytest.raises(ValueError, match=r"resampler's tokens have none; set alignment.steps to 0"):
        run_stage2(config, dry_run=True)


def test_dry_run_shows_the_projectors_tokens(config, capsys) -> None:
    config.model.projector = "pixel_shuffle"
    run_stage2(config, dry_run=True)
    assert "<image> x 4" in capsys.readouterr().out


def test_alignment_needs_location_tokens(config) -> None:
    config.model.box_format = "integers"
    config.alignment.steps = 1
    with pytest.raises(ValueError, match="alignment needs location tokens"):
        run_stage2(config)


def test_a_checkpoint_from_before_there_was_a_setting_resumes_with_its_default(config) -> None:
    config.run.steps, config.alignment = 1, AlignmentConfig(steps=1, global_batch_size=4)
    run_stage2(config)
    run = Path(config.run.output_dir)
    for root in (run / "checkpoints", run / "alignment" / "checkpoints"):
        (directory,) = list_checkpoints(root)
        checkpoint = load_checkpoint(directory)
        del checkpoint.state["config"]["model"]["coordinate_smoothing"]
        shutil.rmtree(directory)
        save_checkpoint(root, checkpoint, keep=2)
    config.model.coordinate_smoothing = 1.0
    with pytest.raises(ValueError, match=r"config model\.coordinate_smoothing: '\(absent\)' != 1"):
        run_stage2(config)
    config.model.coordinate_smoothing, config.run.steps = 0.0, 2
    assert run_stage2(config).step == 2


def test_every_checkpoint_holds_the_precision_that_was_used(config) -> None:
    config.run.precision = "auto"
    config.run.steps, config.alignment = 1, AlignmentConfig(steps=1, global_batch_size=4)
    run_stage2(config)
    run = Path(config.run.output_dir)
    for root in (run / "checkpoints", run / "alignment" / "checkpoints"):
        (directory,) = list_checkpoints(root)
        stored = load_checkpoint(directory).state["config"]["run"]["precision"]
        assert stored == resolve_precision("auto")


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry_run", "run"])
@pytest.mark.parametrize("name", ["runs/none", "runs/none/model"])
def test_a_language_model_that_is_not_there_is_named(config, name: str, dry_run: bool) -> None:
    config.model.language_model = name
    with pytest.raises(FileNotFoundError, match=rf"model\.language_model {name} is neither"):
        run_stage2(config, dry_run)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("data.train", "data.train is empty; name a directory"),
        ("model.cloc", r"model\.cloc is empty.*training/stage1.py"),
        ("model.language_model", r"model\.language_model is empty.*training/tiny_llm.py"),
    ],
)
def test_what_is_missing_is_named(config, missing: str, message: str) -> None:
    part, name = missing.split(".")
    setattr(getattr(config, part), name, "")
    with pytest.raises(ValueError, match=message):
        run_stage2(config)
