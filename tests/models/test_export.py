"""Files of `cloc-mllm export`, loaded by the code they are for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from cloc_mllm.cli import main
from cloc_mllm.config import ModelConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.models.build import build_cloc, load_cloc, save_cloc
from cloc_mllm.models.cloc import Cloc
from tests.models.tiny import built, tiny_cloc, tiny_config


@pytest.fixture
def cloc_directory(tmp_path: Path) -> Path:
    tokenizer = load_text_tokenizer("builtin", 24)
    save_cloc(tiny_cloc(), tmp_path / "cloc", tiny_config(), tokenizer)
    return tmp_path / "cloc"


def export(source: Path, target: str) -> Path:
    out = source.parent / target
    assert main(["export", "--cloc", str(source), "--to", target, "--out", str(out)]) == 0
    return out


def test_nothing_is_overwritten(cloc_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(cloc_directory, "hf-clip")
    taken = cloc_directory.parent / "hf-clip"
    again = ["export", "--cloc", str(cloc_directory), "--to", "hf-clip", "--out", str(taken)]
    assert main(again) == 2
    assert f"{taken} already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "library", "use"),
    [
        ("open_clip", "open_clip", "open_clip.create_model_from_pretrained"),
        ("hf-clip", "transformers", "CLIPVisionModelWithProjection.from_pretrained"),
        ("safetensors", "safetensors", "load_file"),
    ],
)
def test_the_card_says_what_loads_it(
    target: str, library: str, use: str, cloc_directory: Path
) -> None:
    card = (export(cloc_directory, target) / "README.md").read_text()
    assert f"library_name: {library}\n" in card and use in card


def test_open_clip_loads_it_and_gives_the_same_features(cloc_directory: Path) -> None:
    out = export(cloc_directory, "open_clip")
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{out}")
    theirs.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    cloc, own_tokenizer, _ = load_cloc(cloc_directory)
    picture = Image.fromarray(
        np.arange(90 * 50 * 3, dtype=np.uint32).astype(np.uint8).reshape(90, 50, 3)
    )
    pixels = transform(picture)[None]
    torch.testing.assert_close(pixels[0], Preprocessing(64)(picture)[0], atol=0.05, rtol=0)
    ids = own_tokenizer(["two crabs left of the clock"])
    assert tokenizer(["two crabs left of the clock"])[0, : ids.shape[1]].tolist() == ids[0].tolist()
    padded = torch.nn.functional.pad(ids, (0, 24 - ids.shape[1]))
    with torch.no_grad():
        assert torch.equal(theirs.encode_image(pixels), cloc.encode_image(pixels).image_features)
        assert torch.equal(theirs.encode_text(padded), cloc.encode_text(padded))
        assert theirs.logit_scale == cloc.logit_scale


def test_transformers_loads_it_as_a_clip_vision_model(cloc_directory: Path) -> None:
    out = export(cloc_directory, "hf-clip")
    theirs = CLIPVisionModelWithProjection.from_pretrained(out).eval()
    square = Image.new("RGB", (64, 64), "teal")
    pixels = CLIPImageProcessor.from_pretrained(out)(square, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels[0], Preprocessing(64)(square)[0])
    cloc: Cloc = load_cloc(cloc_directory)[0]
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        actual, expected = theirs(pixels), cloc.encode_image(pixels)
        torch.testing.assert_close(actual.image_embeds, expected.image_features, atol=1e-5, rtol=0)
        tokens = theirs.vision_model.post_layernorm(actual.last_hidden_state[:, 1:])
        torch.testing.assert_close(tokens, expected.tokens, atol=1e-5, rtol=0)


def test_one_file_holds_all_weights_by_the_names_it_explains(cloc_directory: Path) -> None:
    """Read with safetensors alone; the towers go into open_clip, the region parts into ours."""
    out = export(cloc_directory, "safetensors")
    contents = json.loads((out / "cloc.json").read_text())
    weights = load_file(out / "cloc.safetensors")
    assert all(name.startswith(tuple(contents["names"])) for name in weights)
    cloc = load_cloc(cloc_directory)[0]
    assert len(weights) == len(cloc.state_dict())
    towers = {k: v for k, v in weights.items() if not k.startswith("region.")}
    theirs = CustomTextCLIP(**contents["clip_config"]).eval()
    theirs.load_state_dict(towers)
    pixels, ids = torch.randn(2, 3, 64, 64), torch.randint(1, 200, (3, 24))
    fresh = tiny_cloc(seed=9)
    part = "region.prompter."
    fresh.vision.region_encoder.prompter.load_state_dict(
        {k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)}
    )
    with torch.no_grad():
        image = cloc.encode_image(pixels)
        assert torch.equal(theirs.encode_image(pixels), image.image_features)
        assert torch.equal(theirs.encode_text(ids), cloc.encode_text(ids))
        boxes, index = torch.tensor([[0.1, 0.2, 0.5, 0.9]]), torch.tensor([1])
        actual = fresh.vision.embed_boxes(image, boxes, index)
        assert torch.equal(actual, cloc.embed_boxes(image, boxes, index))
    assert torch.equal(weights["region.logit_scale"], cloc.region_logit_scale)
    config = ModelConfig(
        clip_config=contents["clip_config"],
        tokenizer=str(out / contents["tokenizer"]),
        init=str(out / "cloc.safetensors"),
    )
    again = built(config).eval()
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels).image_features, image.image_features)


def test_a_tower_that_transformers_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config()
    config.clip_config["vision_cfg"] = {"timm_model_name": "resnet10t", "timm_pool": "avg"}
    tokenizer = load_text_tokenizer("builtin", 24)
    save_cloc(build_cloc(config, tokenizer), tmp_path / "cloc", config, tokenizer)
    arguments = ["--cloc", str(tmp_path / "cloc"), "--to", "hf-clip", "--out", str(tmp_path / "x")]
    assert main(["export", *arguments]) == 2
    assert "Export it with --to open_clip" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("target", ["open_clip", "safetensors"])
def test_the_bias_of_the_sigmoid_loss_is_exported(tmp_path: Path, target: str) -> None:
    cloc = tiny_cloc(0, "sigmoid")
    with torch.no_grad():
        cloc.logit_bias.fill_(-6.0)
    save_cloc(cloc, tmp_path / "cloc", tiny_config("sigmoid"), load_text_tokenizer("builtin", 24))
    out = export(tmp_path / "cloc", target)
    if target == "open_clip":
        theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}")
        assert theirs.logit_bias.item() == -6.0
        return
    contents = json.loads((out / "cloc.json").read_text())
    weights = load_file(out / "cloc.safetensors")
    assert weights["logit_bias"].item() == -6.0
    assert weights["region.logit_bias"].item() == -10.0
    assert len(weights) == len(cloc.state_dict())
    assert all(name.startswith(tuple(contents["names"])) for name in weights)
    towers = {k: v for k, v in weights.items() if not k.startswith("region.")}
    CustomTextCLIP(**contents["clip_config"]).load_state_dict(towers)
