"""Pictures out of the feature cache: what the encoder would say, bit for bit, and nothing stale."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cloc_mllm.config import (
    ConversationConfig,
    LoraConfig,
    MllmConfig,
    Stage2Config,
    Stage2DataConfig,
    Stage2RunConfig,
    TowerOptimConfig,
)
from cloc_mllm.data.feature_cache import FeatureCache
from cloc_mllm.data.parquet import load_records, write_records
from cloc_mllm.data.records import Record
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.build import hold_frozen
from cloc_mllm.mllm.collate import ConversationCollator
from cloc_mllm.mllm.feature_cache import encoder_identity
from cloc_mllm.models.vision_encoder import VisionEncoder
from cloc_mllm.train.features import fill_features
from cloc_mllm.train.logging import read_log
from cloc_mllm.train.stage2 import answer_step, run_stage2
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_config

__all__ = ["cloc_dir", "llm_dir", "mllm_config"]


@pytest.fixture
def config(mllm_config: MllmConfig, tiny_scenes, tmp_path: Path) -> Stage2Config:
    write_records(tiny_scenes[:8], tmp_path / "records")
    return Stage2Config(
        model=dataclasses.replace(mllm_config, lora=LoraConfig(rank=2, alpha=4)),
        data=Stage2DataConfig(
            train=str(tmp_path / "records"), num_workers=0, feature_cache=str(tmp_path / "cache")
        ),
        conversations=ConversationConfig(questions_per_image=3),
        optim=TowerOptimConfig(lr=1e-2, warmup_steps=0),
        run=Stage2RunConfig(
            output_dir=str(tmp_path / "run"),
            steps=3,
            global_batch_size=4,
            precision="fp32",
            log_every=1,
        ),
    )


def files_in(config: Stage2Config) -> list[Path]:
    return sorted(path for path in Path(config.data.feature_cache).rglob("*") if path.is_file())


def losses_of(config: Stage2Config) -> list[float]:
    return [row["loss"] for row in read_log(Path(config.run.output_dir) / "log.jsonl")]


@pytest.mark.parametrize("prompter_learns", [False, True])
@pytest.mark.parametrize(
    ("precision", "held"),
    [("fp32", torch.float32), ("bf16", torch.float32), ("bf16", torch.bfloat16)],
    ids=["fp32", "bf16", "bf16 weights"],
)
def test_loss_and_gradients_are_equal(
    config, prompter_learns: bool, precision: str, held: torch.dtype
) -> None:
    """Bit for bit: the pictures are encoded in the batch that they are learnt from. In one of
    another size matrix products may round otherwise, here by up to 5e-7 of a token's number."""
    config.run.precision, config.conversations.pack = precision, False
    torch.manual_seed(0)
    model, processor = build_mllm(config.model)
    model.vision.requires_grad_(prompter_learns)
    model.vision.encoder.requires_grad_(False)
    hold_frozen(model, held)
    assert next(model.vision.encoder.parameters()).dtype == held
    records = load_records(config.data.train)[:3]
    cache = fill_features(model, processor, records, config)
    actual, expected = {}, {}
    for features, result in ((cache, actual), (None, expected)):
        collator = ConversationCollator(processor, config.conversations, features=features)
        batch = collator(list(enumerate(records)))
        assert batch.inputs["pixel_values"].ndim == (4 if features is None else 3)
        model.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            result["loss"] = answer_step(model, batch)["loss"]
        result["loss"].backward()
        result |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith("vision.region_encoder") for name in expected) == prompter_learns
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_second_run_neither_decodes_nor_encodes(
    config: Stage2Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, feature_cache=""))
    plain.run = dataclasses.replace(config.run, output_dir=str(tmp_path / "plain"))
    run_stage2(plain)
    assert files_in(config) == []
    run_stage2(config)
    assert losses_of(config) == pytest.approx(losses_of(plain), rel=1e-5)  # see above
    assert len(files_in(config)) == 8

    def refuse(*_: object) -> None:
        raise AssertionError("not needed")

    monkeypatch.setattr(Record, "load_image", refuse)
    monkeypatch.setattr(VisionEncoder, "forward", refuse)
    again = dataclasses.replace(config.run, output_dir=str(tmp_path / "again"))
    run_stage2(dataclasses.replace(config, run=again))
    assert losses_of(dataclasses.replace(config, run=again)) == losses_of(config)


def test_only_what_the_run_sees_is_encoded(config: Stage2Config) -> None:
    config.run.steps = 1
    fill_features(*build_mllm(config.model), load_records(config.data.train), config)
    assert len(files_in(config)) == 4


def test_another_encoder_finds_nothing(config: Stage2Config) -> None:
    model, processor = build_mllm(config.model)
    names = {encoder_identity(model, processor, bf16=bf16) for bf16 in (False, True)}
    assert encoder_identity(model, processor, bf16=False) in names
    processor.fingerprint["resize"] = "another"
    names.add(encoder_identity(model, processor, bf16=False))
    model.config.cloc_config["image_size"] = 1
    names.add(encoder_identity(model, processor, bf16=False))
    with torch.no_grad():
        next(model.vision.encoder.parameters()).flatten()[0] += 1e-3
    names.add(encoder_identity(model, processor, bf16=False))
    hold_frozen(model, torch.bfloat16)
    names.add(encoder_identity(model, processor, bf16=True))
    assert len(names) == 6


def test_another_picture_of_the_same_id_finds_nothing(config: Stage2Config, tiny_scenes) -> None:
    cache = FeatureCache(config.data.feature_cache, "encoder")
    expected = torch.ones(2, 3, dtype=torch.bfloat16)
    cache.save(tiny_scenes[0], {"tokens": expected})
    assert torch.equal(cache.load(tiny_scenes[0])["tokens"], expected)
    assert cache.has(tiny_scenes[0]) and not cache.has(tiny_scenes[0], mirrored=True)
    assert not cache.has(dataclasses.replace(tiny_scenes[0], image=tiny_scenes[1].image))


def test_what_a_kill_leaves_is_no_file_of_the_cache(config, monkeypatch) -> None:
    model, processor = build_mllm(config.model)
    records = load_records(config.data.train)
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *_: exit_hard())
        with pytest.raises(KeyboardInterrupt):
            fill_features(model, processor, records, config)
    assert files_in(config) == []
    cache = fill_features(model, processor, records, config)
    assert cache is not None and all(map(cache.has, records))


def exit_hard() -> None:
    raise KeyboardInterrupt


def test_missing_and_damaged_files_are_named(config: Stage2Config, tiny_scenes) -> None:
    cache = FeatureCache(config.data.feature_cache, "encoder")
    record = tiny_scenes[0]
    with pytest.raises(ValueError, match=f"no features of {record.id}.*shared by all"):
        cache.load(record)
    cache.save(record, {"tokens": torch.ones(2, 3)})
    [file] = files_in(config)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{record.id}.*is damaged.*remove it"):
        cache.load(record)


def test_an_encoder_that_learns_is_refused(config: Stage2Config) -> None:
    config.model.freeze_vision_encoder = False
    with pytest.raises(ValueError, match=r"but \d+ of its parameters learn \(vision\.encoder\."):
        run_stage2(config, dry_run=True)
    config.optim.layer_lr = {"vision.encoder": 0.0}
    assert run_stage2(config, dry_run=True).exit_code == 0
