"""The mean of the weights of models of one form."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cloc_mllm.cli import run
from cloc_mllm.config import PrompterConfig
from cloc_mllm.models.build import load_cloc, save_cloc
from cloc_mllm.train.average import main
from tests.tiny_mllm import cloc_dir, save_tiny_cloc

__all__ = ["cloc_dir"]


def test_weights_are_the_mean(cloc_dir: Path, tmp_path: Path) -> None:
    model, tokenizer, config = load_cloc(cloc_dir)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data += 3.0
    config = dataclasses.replace(config, phrase_prior=0.75)
    save_cloc(model, tmp_path / "other", config, tokenizer)
    models = [str(cloc_dir), str(tmp_path / "other"), str(cloc_dir)]
    assert run(main, [*models, "--output_dir", str(tmp_path / "mean")]) == 0
    mean = load_cloc(tmp_path / "mean")[0]
    assert mean.phrase_prior == 0.25
    for name, parameter in mean.named_parameters():
        torch.testing.assert_close(parameter.data, first[name] + 1.0)
    assert dict(mean.named_buffers()).keys() == dict(model.named_buffers()).keys()


def test_what_has_no_mean_is_refused(
    cloc_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output_dir", str(tmp_path / "mean")]
    assert run(main, [str(cloc_dir), *out]) == 2
    assert "expected two models or more" in capsys.readouterr().err
    other = save_tiny_cloc(tmp_path / "other", PrompterConfig(kind="none"))
    assert run(main, [str(cloc_dir), str(other), *out]) == 2
    said = capsys.readouterr().err
    assert "differ in form" in said and "none" in said
    assert not (tmp_path / "mean").exists()
