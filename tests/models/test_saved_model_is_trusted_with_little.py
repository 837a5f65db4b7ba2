"""A model directory from a stranger: it names no other place, and none of its code runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.mllm.configuration import ClocMllmConfig
from cloc_mllm.mllm.processing import ClocMllmProcessor
from cloc_mllm.models.build import build_cloc_vision, load_cloc
from tests.tiny_mllm import cloc_dir, llm_dir, mllm_dir

__all__ = ["cloc_dir", "llm_dir", "mllm_dir"]


def edited(directory: Path, target: Path, edit: Callable[[dict], object], name: str) -> Path:
    shutil.copytree(directory, target, dirs_exist_ok=True)
    contents = json.loads((target / name).read_text())
    edit(contents)
    (target / name).write_text(json.dumps(contents))
    return target


ELSEWHERE = {
    "init": lambda model: model.update(init="/elsewhere"),
    "pretrained_text": lambda model: model.update(pretrained_text="/elsewhere/model.safetensors"),
    "tokenizer": lambda model: model.update(tokenizer="huggingface:org/name"),
    "tokenizer of a hub": lambda model: model.update(tokenizer="open_clip:hf-hub:org/name"),
    "timm_model_name": lambda model: model["clip_config"]["vision_cfg"].update(
        timm_model_name="hf-hub:org/name"
    ),
    "timm_model_pretrained": lambda model: model["clip_config"]["vision_cfg"].update(
        timm_model_pretrained=True
    ),
    "hf_model_name": lambda model: model["clip_config"]["text_cfg"].update(
        hf_model_name="org/name"
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_saved_cloc_names_nothing_elsewhere(cloc_dir: Path, tmp_path: Path, name: str) -> None:
    edited(cloc_dir, tmp_path, lambda contents: ELSEWHERE[name](contents["model"]), "config.json")
    with pytest.raises(ValueError, match=rf"{name.split()[0]} is .* from its own directory alone"):
        load_cloc(tmp_path)


def test_nor_does_the_encoder_of_an_mllm(mllm_dir: Path) -> None:
    config = ClocMllmConfig.from_pretrained(mllm_dir)
    config.cloc_config["clip_config"]["vision_cfg"]["timm_model_name"] = "local-dir:/elsewhere"
    with pytest.raises(ValueError, match="timm_model_name is 'local-dir:/elsewhere'"):
        build_cloc_vision(config.cloc_model_config())


def with_code(directory: Path, target: Path, canary: Path) -> Path:
    """A copy whose tokenizer names code of its own, which leaves a file when it is run."""

    def name_code(contents: dict) -> None:
        contents["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
        contents["tokenizer_class"] = "Own"

    edited(directory, target, name_code, "tokenizer_config.json")
    code = f"from transformers import PreTrainedTokenizerFast\nopen({str(canary)!r}, 'w')\n"
    (target / "own.py").write_text(code + "class Own(PreTrainedTokenizerFast): pass\n")
    return target


@pytest.mark.parametrize(
    "load",
    [
        lambda directory: load_text_tokenizer(f"huggingface:{directory}"),
        ClocMllmProcessor.from_pretrained,
    ],
    ids=["text tokenizer", "processor"],
)
def test_code_of_a_tokenizer_is_not_run(
    mllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable
) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what `yes |` answers
    try:
        load(with_code(mllm_dir, tmp_path / "model", canary))
    except (ValueError, OSError) as error:
        assert "trust_remote_code" in str(error) or "Own" in str(error)
    assert not canary.exists()
