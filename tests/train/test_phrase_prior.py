"""`model.phrase_prior` through stage 1, into the model, its list of phrases and a run after it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cloc_mllm.config import ModelConfig
from cloc_mllm.inference.cloc_predictor import ClocPredictor
from cloc_mllm.inference.name_list import list_phrases
from cloc_mllm.models.clip_config import resolve_model
from cloc_mllm.train.logging import read_log
from cloc_mllm.train.stage1 import run_stage1
from tests.train.tiny_stage1 import tiny_config, write_tiny_inputs

pytest.importorskip("deepspeed")


def test_a_run_learns_the_prior_and_what_it_leaves_behind_knows_so(tmp_path: Path) -> None:
    write_tiny_inputs(tmp_path)
    losses = {}
    for prior in (0.0, 0.75):
        config = tiny_config(tmp_path, tmp_path / f"{prior}", steps=1)
        model = dataclasses.replace(config.model, phrase_prior=prior)
        run_stage1(dataclasses.replace(config, model=model))
        losses[prior] = read_log(tmp_path / f"{prior}" / "log.jsonl")[0]
    assert losses[0.0]["cloc"] != losses[0.75]["cloc"]
    assert losses[0.0]["clip"] == losses[0.75]["clip"]

    learnt = tmp_path / "0.75" / "model"
    predictor = ClocPredictor.from_pretrained(learnt)
    assert predictor.model.phrase_prior == 0.75
    assert list_phrases(predictor, str(tmp_path / "records")).prior == 0.75
    assert resolve_model(ModelConfig(init=str(learnt))).phrase_prior == 0.75
    assert resolve_model(ModelConfig(init=str(learnt), phrase_prior=0.0)).phrase_prior == 0.0
    with pytest.raises(ValueError, match=r"phrase_prior is 1.5; give a number from 0 to 1"):
        resolve_model(ModelConfig(init=str(learnt), phrase_prior=1.5))
