"""A model's preprocessing: where it comes from, and that it stays with the model everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from cloc_mllm.config import ModelConfig, PreprocessConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.data.transforms import CLIP_MEAN, CLIP_STD, Preprocessing
from cloc_mllm.models.build import build_cloc, load_cloc, save_cloc
from cloc_mllm.models.clip_config import ResolvedModel, resolve_model
from cloc_mllm.models.export import EXPORTS
from tests.models.tiny import tiny_config

GREY = ((0.5,) * 3, (0.5,) * 3)
SQUASHED = PreprocessConfig("squash", "bilinear", [0.5, 0.4, 0.3], [0.5, 0.6, 0.7])


@pytest.mark.parametrize(
    ("architecture", "init", "resize", "interpolation", "numbers"),
    [
        ("ViT-B-16", "", "letterbox", "bicubic", (CLIP_MEAN, CLIP_STD)),
        ("ViT-B-16-SigLIP", "", "squash", "bicubic", GREY),
        ("ViT-B-16-SigLIP2", "", "squash", "bicubic", GREY),
        ("PE-Core-B-16", "", "squash", "bilinear", GREY),
        ("MobileCLIP-B", "", "letterbox", "bilinear", ((0.0,) * 3, (1.0,) * 3)),
        ("ViT-L-14", "", "letterbox", "bicubic", (CLIP_MEAN, CLIP_STD)),  # its weights disagree
        ("ViT-L-14", "laion2b_s32b_b82k", "letterbox", "bicubic", GREY),
    ],
)
def test_a_tower_brings_its_own(architecture, init, resize, interpolation, numbers) -> None:
    config = resolve_model(ModelConfig(architecture=architecture, init=init))
    actual = Preprocessing.of(config)
    assert (actual.resize, actual.interpolation) == (resize, interpolation)
    assert (actual.mean, actual.std) == numbers
    assert config.preprocess == actual.config()  # nothing is left open


def test_settings_come_first() -> None:
    preprocess = PreprocessConfig(resize="letterbox", std=[0.25, 0.25, 0.25])
    config = resolve_model(ModelConfig("ViT-B-16-SigLIP", preprocess=preprocess))
    assert Preprocessing.of(config) == Preprocessing(
        224, "letterbox", "bicubic", (0.5,) * 3, (0.25,) * 3, (128, 128, 128)
    )


def _squashed(directory: Path) -> ResolvedModel:
    config = tiny_config()
    config.preprocess = SQUASHED
    torch.manual_seed(0)
    save_cloc(build_cloc(config), directory, config, load_text_tokenizer("builtin", 24))
    return config


def test_it_is_saved_and_continues(tmp_path: Path) -> None:
    expected = Preprocessing.of(_squashed(tmp_path))
    cloc, _, config = load_cloc(tmp_path)
    assert cloc.vision.encoder.preprocessing == expected
    assert Preprocessing.of(config) == expected
    assert Preprocessing.of(resolve_model(ModelConfig(init=str(tmp_path)))) == expected


@pytest.mark.parametrize(("name", "value"), [("mean", [0.5] * 3), ("resize", "letterbox")])
def test_another_one_cannot_be_used_unnoticed(name: str, value: object, tmp_path: Path) -> None:
    _squashed(tmp_path)
    path = tmp_path / "config.json"
    contents = json.loads(path.read_text())
    contents["model"]["preprocess"][name] = value
    path.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"preprocessing differs from training; .*(mean|resize): "):
        load_cloc(tmp_path)


def test_a_model_without_the_setting_has_clips(tmp_path: Path) -> None:
    """As written before it could be chosen."""
    config = tiny_config()
    save_cloc(build_cloc(config), tmp_path, config, load_text_tokenizer("builtin", 24))
    path = tmp_path / "config.json"
    contents = json.loads(path.read_text())
    del contents["model"]["preprocess"], contents["model"]["token_strides"]
    path.write_text(json.dumps(contents))
    assert load_cloc(tmp_path)[0].vision.encoder.preprocessing == Preprocessing(64)
    resolved = resolve_model(ModelConfig(init=str(tmp_path)))
    assert Preprocessing.of(resolved) == Preprocessing(64)


@torch.no_grad()
def test_exports_carry_it(tmp_path: Path) -> None:
    _squashed(tmp_path / "cloc")
    cloc, *_ = load_cloc(tmp_path / "cloc")
    photo = Image.effect_noise((90, 40), 80).convert("RGB")
    pixels, _ = cloc.vision.encoder.preprocessing(photo)
    expected = cloc.encode_image(pixels[None]).image_features

    EXPORTS["open_clip"](tmp_path / "cloc", tmp_path / "open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}/open_clip")
    torch.testing.assert_close(model.encode_image(preprocess(photo)[None]), expected)

    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    EXPORTS["hf-clip"](tmp_path / "cloc", tmp_path / "hf")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    theirs = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(
        theirs(**processor(photo, return_tensors="pt")).image_embeds, expected, atol=1e-5, rtol=1e-5
    )
