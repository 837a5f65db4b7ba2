"""Stage 1 out of a feature cache: the same steps as without, on towers that stay as they were."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cloc_mllm.config import ModelConfig, Stage1Config, Stage1DataConfig, Stage1OptimConfig
from cloc_mllm.data.records import Record
from cloc_mllm.models.build import load_cloc
from cloc_mllm.models.text_encoder import TextEncoder
from cloc_mllm.models.vision_encoder import VisionEncoder
from cloc_mllm.train.entry import Plan
from cloc_mllm.train.logging import read_log
from cloc_mllm.train.stage1 import dry_run_stage1, run_stage1
from tests.distributed.ranks import run_ranks
from tests.train.tiny_stage1 import tiny_config, write_tiny_inputs

pytest.importorskip("deepspeed")

_TERMS = ("loss", "clip", "cloc", "grounding")
FROZEN = {"vision.encoder": 0.0, "text": 0.0, "logit_scale": 0.0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records, a tokenizer, and `start/model`, a CLOC to start from."""
    directory = tmp_path_factory.mktemp("inputs")
    write_tiny_inputs(directory)
    run_stage1(tiny_config(directory, directory / "start", steps=1))
    return directory


def frozen_config(inputs: Path, output_dir: Path, cache: Path | None, **run: Any) -> Stage1Config:
    config = tiny_config(inputs, output_dir, **run)
    feature_cache = str(cache) if cache else ""
    return dataclasses.replace(
        config,
        model=ModelConfig(init=str(inputs / "start" / "model")),
        data=dataclasses.replace(config.data, flip=True, feature_cache=feature_cache),
        optim=Stage1OptimConfig(lr=1e-3, warmup_steps=1, layer_lr=FROZEN),
    )


def curve(output_dir: Path) -> list[list[float]]:
    return [[row[term] for term in _TERMS] for row in read_log(output_dir / "log.jsonl")]


def test_it_learns_the_same_and_leaves_the_towers_alone(inputs: Path, tmp_path: Path) -> None:
    run_stage1(frozen_config(inputs, tmp_path / "plain", None))
    kept = frozen_config(inputs, tmp_path / "kept", tmp_path / "cache")
    kept.data.num_workers = Stage1DataConfig.num_workers  # the default is no number of processes
    run_stage1(kept)
    # pictures and texts are encoded in batches of other sizes, whose products round otherwise
    expected = torch.tensor(curve(tmp_path / "plain"))
    torch.testing.assert_close(torch.tensor(curve(tmp_path / "kept")), expected, atol=2e-5, rtol=0)
    assert len(expected) == 6
    start, (after, tokenizer, _) = (
        load_cloc(inputs / "start" / "model")[0],
        load_cloc(tmp_path / "kept" / "model"),
    )
    pixels, ids = torch.randn(2, 3, 64, 64), tokenizer(["a red square", "two dogs"])
    with torch.no_grad():
        actual = after.encode_image(pixels).image_features, after.encode_text(ids)
        untouched = start.encode_image(pixels).image_features, start.encode_text(ids)
    assert all(map(torch.equal, actual, untouched))
    assert not torch.equal(
        after.vision.region_encoder.prompter.query.weight,
        start.vision.region_encoder.prompter.query.weight,
    )


def test_a_second_run_neither_decodes_nor_encodes(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage1(frozen_config(inputs, tmp_path / "first", tmp_path / "cache"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    # 32 scenes, some of which are seen in both forms; one file of texts
    assert 32 < len(files) <= 65 and any("-mirrored" in path.name for path in files)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not needed")

    for owner, name in (
        (Record, "load_image"),
        (VisionEncoder, "run_tower"),
        (TextEncoder, "run_tower"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    run_stage1(frozen_config(inputs, tmp_path / "second", tmp_path / "cache"))
    assert curve(tmp_path / "second") == curve(tmp_path / "first")
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_it_resumes_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    run_stage1(frozen_config(inputs, tmp_path / "unbroken", tmp_path / "cache"))
    broken = frozen_config(inputs, tmp_path / "broken", tmp_path / "cache", max_seconds=1e-9)
    assert run_stage1(broken).step == 1
    broken.run.max_seconds = 0.0
    run_stage1(broken)
    assert curve(tmp_path / "broken") == curve(tmp_path / "unbroken")


def _train(inputs: Path, root: Path) -> None:
    run_stage1(frozen_config(inputs, root / "two", root / "cache of two"))


def test_two_ranks_learn_the_same(inputs: Path, tmp_path: Path) -> None:
    run_ranks(_train, inputs, tmp_path, num_ranks=2)
    run_stage1(frozen_config(inputs, tmp_path / "one", tmp_path / "cache of one"))
    actual, expected = (torch.tensor(curve(tmp_path / name)) for name in ("two", "one"))
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)


def test_a_text_tower_that_learns_reads_its_texts(inputs: Path, tmp_path: Path) -> None:
    curves = []
    for name, cache in (("plain", None), ("kept", tmp_path / "cache")):
        config = frozen_config(inputs, tmp_path / name, cache, steps=3)
        config.optim.layer_lr = {"vision.encoder": 0.0}
        run_stage1(config)
        curves.append(torch.tensor(curve(tmp_path / name)))
    torch.testing.assert_close(*curves, atol=2e-5, rtol=0)
    assert list((tmp_path / "cache").glob("texts-*")) == []


def test_heads_learn_above_frozen_trunks(inputs: Path, tmp_path: Path) -> None:
    """A CNN of two scales and a BERT, whose last linear maps learn; dropout of what is frozen is
    off."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertConfig(vocab_size=500, intermediate_size=32, hidden_dropout_prob=0.5, **sizes)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    curves = []
    for name, cache in (("plain", None), ("kept", tmp_path / "cache")):
        config = frozen_config(inputs, tmp_path / name, cache, steps=3)
        config.model = ModelConfig(
            clip_config={
                "embed_dim": 24,
                "vision_cfg": {
                    "timm_model_name": "resnet10t",
                    "timm_pool": "avg",
                    "timm_proj": "linear",
                },
                "text_cfg": {
                    "hf_model_name": str(tmp_path / "bert"),
                    "hf_model_pretrained": False,
                    "hf_pooler_type": "mean_pooler",
                },
            },
            image_size=64,
            token_strides=[16, 32],
            tokenizer=str(inputs / "tokenizer"),
            context_length=24,
        )
        config.model.prompter.width = 32
        config.optim.layer_lr = {
            "vision.encoder.visual.trunk": 0.0,
            "text.text.transformer": 0.0,
        }
        run_stage1(config)
        curves.append(torch.tensor(curve(tmp_path / name)))
    torch.testing.assert_close(*curves, atol=1e-4, rtol=0)  # through normed tokens of 768 numbers
    model = load_cloc(tmp_path / "kept" / "model")[0]
    assert model.vision.encoder.token_dims == (256, 512)


def test_validation_records_that_are_not_there_are_named_at_once(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = frozen_config(inputs, tmp_path / "run", tmp_path / "cache")
    config.data.validation = str(tmp_path / "nowhere")
    dry_run_stage1(config, Plan())
    assert f"not there yet:    {tmp_path / 'nowhere'}" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_stage1(config)
    assert not (tmp_path / "cache").exists()


def test_noisy_labels_of_a_mixture_are_kept(inputs: Path, tmp_path: Path) -> None:
    """Each set of a mixture has epochs of its own, so which samples are mirrored depends on it."""
    write_tiny_inputs(tmp_path / "more", num_scenes=5)
    config = frozen_config(inputs, tmp_path / "run", tmp_path / "cache", steps=3)
    config.data.mixture = {config.data.train: 1.0, str(tmp_path / "more" / "records"): 2.0}
    config.data.train, config.data.label_noise, config.data.flip = "", 0.5, True
    assert run_stage1(config).step == 3


def test_an_image_tower_that_learns_is_refused(inputs: Path, tmp_path: Path) -> None:
    config = frozen_config(inputs, tmp_path / "run", tmp_path / "cache")
    config.optim.layer_lr = {"text": 0.0}
    with pytest.raises(ValueError, match=r"parameters learn \(vision.encoder.visual\.\S+\); give"):
        dry_run_stage1(config, Plan())
    assert not (tmp_path / "cache").exists()
