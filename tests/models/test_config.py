"""Configurations that earlier versions wrote."""

import dataclasses

from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.earlier import current_run_settings


def test_a_config_survives_its_own_dict() -> None:
    config = ModelConfig("ViT-B-16", prompter=PrompterConfig(text_prior="region", width=64))
    assert ModelConfig.from_dict(dataclasses.asdict(config)) == config


def test_a_model_from_before_the_linear_text_prior_keeps_its_own_and_drops_its_loss() -> None:
    prompter = {"kind": "prompter", "box_head_loss": "mse"}
    values = {"architecture": "ViT-B-16", "pretrained": "", "prompter": prompter}
    config = ModelConfig.from_dict(values)
    assert config.prompter.text_prior == "region"
    assert PrompterConfig().text_prior == "linear"


def test_a_run_from_before_the_phrase_prior_learnt_none_and_goes_on() -> None:
    run = {"model": dataclasses.asdict(ModelConfig("ViT-B-16"))}
    del run["model"]["phrase_prior"]
    assert current_run_settings(run)["model"]["phrase_prior"] == 0.0
    assert ModelConfig.from_dict(run["model"]).phrase_prior == 0.0
