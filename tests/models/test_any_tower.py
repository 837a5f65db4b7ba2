"""Towers of every family, saved as they are published, give the features of their own library.

All are small and have random weights. The photo is square, or the model squashes, because a CLIP's
own crop of the middle is a letterbox here (docs/how-to/encoders.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.models.build import build_cloc, load_cloc, load_tokenizer, save_cloc
from cloc_mllm.models.clip_config import resolve_model
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.export import EXPORTS

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = SHAPE | {"image_size": 64, "patch_size": 16}
TEXTS = ["a red crab", "two blue boats on the sea"]


def _photo(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def _pil_processor(directory: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")


def _continued(init: Path | str, tmp_path: Path, **settings: Any) -> tuple[Cloc, Any]:
    """Starts a CLOC, saves it and loads it again."""
    config = resolve_model(
        ModelConfig(init=str(init), prompter=PrompterConfig(width=16), **settings)
    )
    tokenizer = load_tokenizer(config)
    save_cloc(build_cloc(config, tokenizer), tmp_path / "cloc", config, tokenizer)
    cloc, tokenizer, _ = load_cloc(tmp_path / "cloc")
    return cloc, tokenizer


@torch.no_grad()
def _features(cloc: Cloc, photo: Image.Image) -> Tensor:
    pixels, _ = cloc.vision.encoder.preprocessing(photo)
    return cloc.encode_image(pixels[None]).image_features


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def _save_clip(directory: Path) -> Any:
    text = SHAPE | {"vocab_size": 49408, "max_position_embeddings": 24, "eos_token_id": 49407}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=VISION | {"hidden_act": "quick_gelu"}, projection_dim=24
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(directory, max_shard_size="200KB")
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.3, 0.2, 0.1],
    ).save_pretrained(directory)
    return model


@torch.no_grad()
def test_hugging_face_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = _save_clip(tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors.index.json").is_file()  # shards
    cloc, tokenizer = _continued(tmp_path / "hf", tmp_path)
    photo = _photo(96, 96)
    inputs = _pil_processor(tmp_path / "hf")(photo, return_tensors="pt")
    expected = theirs.get_image_features(**inputs).pooler_output
    _close(_features(cloc, photo), expected)
    ids = tokenizer(TEXTS)
    texts = theirs.get_text_features(ids, attention_mask=(ids != 0).long()).pooler_output
    _close(cloc.encode_text(ids), texts)
    assert cloc.logit_scale.item() == pytest.approx(theirs.logit_scale.item())

    EXPORTS["hf-clip"](tmp_path / "cloc", tmp_path / "out")
    exported = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out")
    inputs = _pil_processor(tmp_path / "out")(photo, return_tensors="pt")
    _close(exported(**inputs).image_embeds, expected)
    EXPORTS["open_clip"](tmp_path / "cloc", tmp_path / "open_clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}/open_clip")
    _close(model.encode_image(preprocess(photo)[None]), expected)
    # and what open_clip's directory says starts the same model
    again, _ = _continued(f"local-dir:{tmp_path}/open_clip", tmp_path)
    _close(_features(again, photo), expected)


def _save_siglip(directory: Path) -> Any:
    tokenizer = load_text_tokenizer("builtin", 16).tokenizer  # type: ignore[attr-defined]
    tokenizer.save_pretrained(directory)
    text = SHAPE | {
        "vocab_size": 1100,  # more than the tokenizer has
        "max_position_embeddings": 16,
        "projection_size": 32,
        "pad_token_id": 0,
    }
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    model = transformers.SiglipModel(config).eval()
    model.logit_bias.data.fill_(-9.5)
    model.save_pretrained(directory)
    transformers.SiglipImageProcessor(
        size={"height": 64, "width": 64}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(directory)
    return model


@torch.no_grad()
def test_hugging_face_siglip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    theirs = _save_siglip(tmp_path / "hf")
    cloc, tokenizer = _continued(tmp_path / "hf", tmp_path)
    assert re.search(r"text +\d\d +0 +0", capsys.readouterr().out)
    photo = _photo(120, 80)
    expected = theirs.get_image_features(
        **_pil_processor(tmp_path / "hf")(photo, return_tensors="pt")
    ).pooler_output
    _close(_features(cloc, photo), expected)
    ids = tokenizer(TEXTS)
    assert ids.shape == (2, 16)
    _close(cloc.encode_text(ids), theirs.get_text_features(ids).pooler_output)
    assert cloc.logit_bias is not None and cloc.logit_bias.item() == -9.5

    EXPORTS["hf-clip"](tmp_path / "cloc", tmp_path / "out")
    exported = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out")
    inputs = _pil_processor(tmp_path / "out")(photo, return_tensors="pt")
    _close(exported(**inputs).pooler_output, expected)
    with pytest.raises(ValueError, match="--to hf-clip"):
        EXPORTS["open_clip"](tmp_path / "cloc", tmp_path / "open_clip")


def _save_tipsv2(directory: Path) -> Any:
    load_text_tokenizer("builtin", 16).tokenizer.save_pretrained(directory)  # type: ignore[attr-defined]
    text = SHAPE | {"vocab_size": 1100, "max_position_embeddings": 16, "pad_token_id": 0}
    config = transformers.Tipsv2Config(text_config=text, vision_config=_dino())
    model = transformers.Tipsv2Model(config).eval()
    model.temperature.data.fill_(0.05)
    model.save_pretrained(directory)
    transformers.Tipsv2ImageProcessor(size={"height": 64, "width": 64}).save_pretrained(directory)
    return model


@torch.no_grad()
def test_hugging_face_tipsv2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = _save_tipsv2(tmp_path / "hf")
    cloc, tokenizer = _continued(tmp_path / "hf", tmp_path)
    # its processor knows torchvision's resize alone, which rounds other than Pillow's
    photo = _photo(64, 64)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(photo, return_tensors="pt")
    expected = theirs.get_image_features(**inputs).pooler_output
    _close(_features(cloc, photo), expected)
    wide = _photo(120, 80)
    pixels = processor(wide, return_tensors="pt")["pixel_values"][0]
    ours = cloc.vision.encoder.preprocessing(wide)[0]
    torch.testing.assert_close(ours, pixels, atol=1.5 / 255, rtol=0)
    ids = tokenizer(TEXTS)
    texts = theirs.get_text_features(ids, attention_mask=(ids != 0).long()).pooler_output
    _close(cloc.encode_text(ids), texts)
    assert cloc.logit_scale.exp().item() == pytest.approx(20)

    EXPORTS["hf-clip"](tmp_path / "cloc", tmp_path / "out")
    exported = transformers.Tipsv2VisionModel.from_pretrained(tmp_path / "out")
    inputs = _pil_processor(tmp_path / "out")(photo, return_tensors="pt")
    _close(exported(**inputs).pooler_output, expected)


def test_tipsv2_starts_within_the_scale_that_the_loss_allows(tmp_path: Path) -> None:
    model = _save_tipsv2(tmp_path / "hf")
    model.temperature.data.fill_(0.005)  # as published
    model.save_pretrained(tmp_path / "hf")
    cloc, _ = _continued(tmp_path / "hf", tmp_path)
    assert cloc.logit_scale.exp().item() == pytest.approx(100)


@torch.no_grad()
def test_siglip_at_another_resolution(tmp_path: Path) -> None:
    theirs = _save_siglip(tmp_path / "hf")
    cloc, _ = _continued(tmp_path / "hf", tmp_path, image_size=128)
    assert cloc.vision.grid_hw == (8, 8)
    image = cloc.encode_image(torch.randn(1, 3, 128, 128))
    assert image.tokens.shape == (1, 64, 32)
    table = cloc.state_dict()["vision.encoder.visual.model.embeddings.position_embedding.weight"]
    old = theirs.state_dict()["vision_model.embeddings.position_embedding.weight"]
    assert table.shape == (64, 32) and (table.mean(0) - old.mean(0)).abs().max() < 0.01


IMAGE_MODELS: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**_dino())),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**VISION, num_register_tokens=2)
    ),
    "radio": lambda: transformers.RadioModel(
        transformers.RadioConfig(**SHAPE, patch_size=16, max_img_size=128)
    ),
}


def _dino() -> dict[str, Any]:
    shape = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    return shape | {"mlp_ratio": 2}


@pytest.mark.parametrize("family", IMAGE_MODELS)
@torch.no_grad()
def test_an_image_model_starts_with_a_fresh_text_side(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    theirs = IMAGE_MODELS[family]().eval()
    theirs.save_pretrained(tmp_path / "hf")
    transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=[0.4] * 3, image_std=[0.2] * 3
    ).save_pretrained(tmp_path / "hf")
    cloc, _ = _continued(tmp_path / "hf", tmp_path, architecture="ViT-B-16")
    table = capsys.readouterr().out
    assert re.search(r"text +0 +\d+ +0", table) and re.search(r"vision.encoder +\d\d+ +1 +0", table)
    photo = _photo(120, 80)
    pixels = _pil_processor(tmp_path / "hf")(photo, return_tensors="pt")["pixel_values"]
    out = theirs(pixels)
    actual = cloc.encode_image(cloc.vision.encoder.preprocessing(photo)[0][None])
    _close(actual.tokens, out.last_hidden_state[:, -16:])
    pooled = out.summary if family == "radio" else out.pooler_output
    _close(actual.image_features, cloc.vision.encoder.visual.projection(pooled))


NATIVE: dict[str, dict[str, Any]] = {
    "vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
}


@pytest.mark.parametrize("layout", ["training.pt", "plain.bin", "model.safetensors"])
@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_open_clip_files(family: str, layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip_config = {
        "embed_dim": 24,
        "vision_cfg": NATIVE[family] | {"image_size": 64},
        "text_cfg": {"width": 16, "heads": 2, "layers": 1, "context_length": 77},
    }
    theirs = open_clip.CLIP(**clip_config).eval()
    state = theirs.state_dict()
    path = tmp_path / layout
    if layout == "training.pt":
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, path)
    elif layout == "plain.bin":
        torch.save(state, path)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    cloc, tokenizer = _continued(path, tmp_path, clip_config=clip_config)
    photo = _photo(80, 80)
    preprocess = open_clip.image_transform(64, is_train=False)
    _close(_features(cloc, photo), theirs.encode_image(preprocess(photo)[None]))
    ids = open_clip.get_tokenizer("ViT-B-16")(TEXTS)
    assert torch.equal(tokenizer(TEXTS), ids[:, : tokenizer(TEXTS).shape[1]])
    _close(cloc.encode_text(tokenizer(TEXTS)), theirs.encode_text(ids))


def test_a_tokenizer_smaller_than_the_tower_loads_again(tmp_path: Path) -> None:
    clip_config = {
        "embed_dim": 24,
        "vision_cfg": NATIVE["vit"] | {"image_size": 64},
        "text_cfg": {"width": 16, "heads": 2, "layers": 1, "vocab_size": 2000},
    }
    torch.save(open_clip.CLIP(**clip_config).state_dict(), tmp_path / "clip.pt")
    settings = {"clip_config": clip_config, "tokenizer": "builtin"}
    cloc, tokenizer = _continued(tmp_path / "clip.pt", tmp_path, **settings)
    assert tokenizer.vocab_size < 2000 == cloc.text.text.token_embedding.num_embeddings


def test_what_is_no_encoder_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="is a Hugging Face 'llama'; expected clip, siglip"):
        resolve_model(ModelConfig(init=str(tmp_path)))
    transformers.Siglip2Config().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"NaFlex .* take one of a fixed size: google/siglip2-base"
    ):
        resolve_model(ModelConfig(init=str(tmp_path)))
    _save_siglip(tmp_path / "hf")
    for path in (tmp_path / "hf").glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match="brings no tokenizer; name it"):
        resolve_model(ModelConfig(init=str(tmp_path / "hf")))
