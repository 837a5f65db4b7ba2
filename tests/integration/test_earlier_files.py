"""Files of earlier versions: the same tensors under other names load to the same model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cloc_mllm.config import LoraConfig, MllmConfig, Stage1Config
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.earlier import current_run_settings
from cloc_mllm.models.build import load_cloc, save_cloc
from cloc_mllm.train.checkpoint import FILES, MANIFEST, _digest
from tests.models.tiny import tiny_cloc, tiny_config
from tests.train.tiny_stage1 import tiny_config as tiny_stage1
from tests.train.tiny_stage1 import write_tiny_inputs

EARLIER = {
    "vision.region_encoder.prompter.": "vision.prompter.",
    "vision.region_encoder.box_head.": "vision.box_head.",
    "vision.region_encoder.projection.": "vision.roi_align.projection.",
}


def under_earlier_names(path: Path) -> None:
    """Renames the tensors of a safetensors file as they were called before."""
    state = {}
    for name, tensor in load_file(path).items():
        for now, before in EARLIER.items():
            name = name.replace(now, before)
        state[name] = tensor
    assert state.keys() != load_file(path).keys()
    save_file(state, path, {"format": "pt"})


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("kind", ["prompter", "roi_align"])
def test_a_stage_1_model(kind: str, tmp_path: Path) -> None:
    cloc = tiny_cloc(kind=kind)
    save_cloc(cloc, tmp_path, tiny_config(kind=kind), load_text_tokenizer("builtin", 24))
    under_earlier_names(tmp_path / "model.safetensors")
    assert_same(load_cloc(tmp_path)[0].state_dict(), cloc.state_dict())


def test_an_mllm(mllm_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    import cloc_mllm.mllm  # noqa: F401  registers it with the Auto classes

    before = tmp_path / "before"
    shutil.copytree(mllm_dir, before)
    under_earlier_names(before / "model.safetensors")
    actual, expected = (AutoModelForImageTextToText.from_pretrained(d) for d in (before, mllm_dir))
    assert_same(actual.state_dict(), expected.state_dict())
    for model, out in ((actual, tmp_path / "again"), (expected, tmp_path / "same")):
        model.save_pretrained(out)
        saved = AutoModelForImageTextToText.from_pretrained(out)
        assert_same(saved.state_dict(), expected.state_dict())
    assert load_file(tmp_path / "same" / "model.safetensors").keys() == (
        load_file(mllm_dir / "model.safetensors").keys()
    )


def test_an_adapter(mllm_config: MllmConfig, tmp_path: Path) -> None:
    from cloc_mllm.mllm import build_mllm
    from cloc_mllm.mllm.adapter import load_adapter, save_adapter

    model, processor = build_mllm(dataclasses.replace(mllm_config, lora=LoraConfig(rank=2)))
    save_adapter(model, processor, tmp_path)
    under_earlier_names(tmp_path / "parts.safetensors")
    actual, _ = load_adapter(tmp_path)
    assert_same(actual.vision.state_dict(), model.vision.state_dict())


def test_an_mllm_resumes_under_the_prefixes_of_its_rates() -> None:
    optim = {"lr": 1e-3, "layer_lr": {"vision.roi_align": 0.0, "box_head": 1.0, "vision": 2.0}}
    actual = current_run_settings({"model": {"cloc": "x"}, "optim": optim})
    rates = {"vision.region_encoder": 0.0, "box_head": 1.0, "vision": 2.0}
    assert actual == {"model": {"cloc": "x"}, "optim": {"lr": 1e-3, "layer_lr": rates}}


def test_a_run_resumes_to_the_same_weights_and_moments(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from cloc_mllm.train.stage1 import run_stage1

    write_tiny_inputs(tmp_path, num_scenes=16)

    def config_of(run: str, steps: int) -> Stage1Config:
        config = tiny_stage1(tmp_path, tmp_path / run, steps=steps)
        config.optim.layer_lr = {"vision.region_encoder.prompter": 5e-4}
        config.model.prompter.text_prior, config.loss.box = "region", "mse"
        return config

    for steps in (2, 3):  # the second run resumes the first
        run_stage1(config_of("unbroken", steps))
        if steps == 2:
            shutil.copytree(tmp_path / "unbroken", tmp_path / "before")
    (checkpoint,) = (tmp_path / "before" / "checkpoints").iterdir()
    for name in ("weights.safetensors", "optimizer.safetensors"):
        under_earlier_names(checkpoint / name)
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["model"]["prompter"]["box_head_loss"] = state["config"]["loss"].pop("box")
    del state["config"]["model"]["prompter"]["text_prior"]
    state["config"]["optim"]["layer_lr"] = {"vision.prompter": 5e-4}
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = {name: _digest(checkpoint / name) for name in FILES}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))

    run_stage1(config_of("before", 3))

    actual, expected = (
        {
            name: load_file(tmp_path / run / "checkpoints" / "step_00000003" / name)
            for name in ("weights.safetensors", "optimizer.safetensors")
        }
        for run in ("before", "unbroken")
    )
    for name in expected:
        assert_same(actual[name], expected[name])
