"""Stage 1 from a finished plain CLIP, through the whole run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cloc_mllm.config import ModelConfig, PrompterConfig, Stage1OptimConfig
from cloc_mllm.models.build import load_cloc
from cloc_mllm.train.logging import read_log
from cloc_mllm.train.stage1 import run_stage1
from tests.train.tiny_stage1 import tiny_config, write_tiny_inputs

pytest.importorskip("deepspeed")


def test_a_finished_clip_goes_on_as_cloc_and_resumes(tmp_path: Path) -> None:
    write_tiny_inputs(tmp_path)
    first = tiny_config(tmp_path, tmp_path / "clip", steps=2)
    plain = dataclasses.replace(first.model, prompter=PrompterConfig(kind="none"))
    run_stage1(dataclasses.replace(first, model=plain))
    clip = load_cloc(tmp_path / "clip" / "model")[0].state_dict()

    model = ModelConfig(init=str(tmp_path / "clip" / "model"))
    towers = {"vision.encoder": 0.0, "text": 0.0, "logit_scale": 0.0}
    optim = Stage1OptimConfig(lr=1e-4, new_lr=1e-3, layer_lr=towers, warmup_steps=1)
    for steps in (2, 3):  # the second run resumes the first
        config = tiny_config(tmp_path, tmp_path / "cloc", steps=steps)
        result = run_stage1(dataclasses.replace(config, model=model, optim=optim))
    assert result.step == 3
    steps_logged = [row["step"] for row in read_log(tmp_path / "cloc" / "log.jsonl")]
    assert steps_logged == [1, 2, 3]
    cloc, _, saved = load_cloc(tmp_path / "cloc" / "model")
    state = cloc.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in clip.items())
    assert state.keys() - clip.keys() >= {"region_logit_scale"}
    assert (saved.init, saved.image_size, saved.context_length) == ("", 64, 24)
