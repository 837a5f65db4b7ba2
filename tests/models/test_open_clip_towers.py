"""The families that open_clip publishes: their features, texts and pixels are open_clip's own.

Every model has its family's own config with fewer blocks and a small text tower, random weights,
and lies in the layout that open_clip publishes (`save_for_hf`).
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.transform import merge_preprocess_dict
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection, SiglipVisionModel

from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.models.build import build_cloc, load_cloc, load_tokenizer, save_cloc
from cloc_mllm.models.clip_config import resolve_model
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.export import EXPORTS

TEXTS = ["a red crab, left of it: two boats!", "the sea"]


class Family(NamedTuple):
    """A name of open_clip, what makes its image tower shallow, and another side it can have."""

    architecture: str
    shallow: dict[str, Any]
    other_size: int


FAMILIES = {
    "eva02": Family("EVA02-B-16", {"depth": 2}, 128),
    "pe": Family("PE-Core-B-16", {"depth": 2}, 128),
    "vitamin": Family("ViTamin-S", {"depth": 2}, 128),
    "siglip2": Family("ViT-B-16-SigLIP2", {"depth": 2}, 128),
    "convnext": Family("convnext_base_w", {"depths": (1, 1, 1, 1)}, 128),
    "mobileclip2": Family("MobileCLIP2-S0", {"layers": (1, 1, 1, 1)}, 128),
    "dfn-metaclip": Family("ViT-B-16-quickgelu", {"layers": 2}, 128),
    "clipa": Family("ViT-L-14-CLIPA", {"layers": 2}, 140),
    "resnet": Family("RN50", {"layers": [1, 1, 1, 1]}, 0),  # open_clip cannot
}


def _photo(wh: tuple[int, int]) -> Image.Image:
    width, height = wh
    pixels = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    return Image.fromarray(pixels).resize(wh, Image.Resampling.BICUBIC)


def _shallow_timm(name: str, depth: dict[str, Any]) -> str:
    """Registers a tower of timm with fewer blocks, since open_clip's config has no such setting."""
    whole = timm.model_entrypoint(name)

    def shallow(pretrained: bool = False, **settings: Any) -> Any:
        return whole(pretrained, **depth | settings)

    shallow.__name__ = f"{name}_shallow"
    if not timm.is_model(shallow.__name__):
        timm.models.register_model(shallow)
    return shallow.__name__


def _clip_config(family: Family) -> dict[str, Any]:
    config: Any = copy.deepcopy(open_clip.get_model_config(family.architecture))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if name := vision.get("timm_model_name"):
        vision["timm_model_name"] = _shallow_timm(name, family.shallow)
    else:
        vision |= family.shallow
    text |= {"width": 32, "heads": 2, "layers": 1}
    return config


def _publish(family: Family, directory: Path) -> Any:
    """Writes random weights as open_clip does; returns what open_clip loads from there."""
    torch.manual_seed(0)
    config = _clip_config(family)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    if "hf_tokenizer_name" in config["text_cfg"]:
        builtin: Any = load_text_tokenizer("builtin")
        tokenizer = copy.deepcopy(builtin.tokenizer)
        tokenizer.sep_token = tokenizer.eos_token  # CLIPA strips it
        config["text_cfg"]["vocab_size"] = builtin.vocab_size
    else:
        tokenizer.save_pretrained = lambda _: None
    settings = {name: value for name, value in config.items() if name != "custom_text"}
    names = open_clip.model.CustomTextCLIP if "custom_text" in config else open_clip.model.CLIP
    model = names(**settings)
    tag = list_pretrained_tags_by_model(family.architecture)[0]
    pixels = get_pretrained_cfg(family.architecture, tag)
    known = {name: pixels[name] for name in ("mean", "std", "interpolation", "resize_mode")}
    open_clip.model.set_model_preprocess_cfg(model, merge_preprocess_dict({}, known))
    for parameter in model.parameters():  # what starts at 0 or 1 would hide a wrong name
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_for_hf(model, tokenizer, config, str(directory), safe_serialization=True)


def _open_clip(directory: Path, **settings: Any) -> tuple[Any, Any]:
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{directory}", **settings)
    return model.eval(), preprocess


def _started(directory: Path, **settings: Any) -> tuple[Cloc, Any, Any]:
    prompter = PrompterConfig(width=16)
    config = resolve_model(ModelConfig(init=str(directory), prompter=prompter, **settings))
    tokenizer = load_tokenizer(config)
    return build_cloc(config, tokenizer).eval(), tokenizer, config


def _features(cloc: Cloc, photo: Image.Image) -> Tensor:
    pixels, _ = cloc.vision.encoder.preprocessing(photo)
    return cloc.encode_image(pixels[None]).image_features


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_are_open_clips(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = FAMILIES[name]
    _publish(family, tmp_path / "hub")
    theirs, preprocess = _open_clip(tmp_path / "hub")
    cloc, tokenizer, config = _started(tmp_path / "hub")
    told = capsys.readouterr().out
    assert re.search(r"vision\.encoder +\d+ +0 +0", told) and re.search(r"text +\d+ +0 +0", told)
    assert re.search(r"vision\.region_encoder +0 +\d+ +0", told)

    # where open_clip crops the middle, the photo is square (docs/how-to/encoders.md)
    squashes = cloc.vision.encoder.preprocessing.resize == "squash"
    photo = _photo((320, 240) if squashes else (256, 256))
    expected = theirs.encode_image(preprocess(photo)[None])
    assert expected.std() > 1e-3
    _close(_features(cloc, photo), expected)

    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}/hub")(TEXTS)
    ours = tokenizer(TEXTS)
    assert torch.equal(ours, ids[:, : ours.shape[1]])
    _close(cloc.encode_text(ours), theirs.encode_text(ids))
    assert cloc.logit_scale.item() == pytest.approx(theirs.logit_scale.item())

    save_cloc(cloc, tmp_path / "cloc", config, tokenizer)
    loaded, tokenizer, _ = load_cloc(tmp_path / "cloc")
    _close(_features(loaded, photo), expected)
    assert torch.equal(tokenizer(TEXTS), ours)
    EXPORTS["open_clip"](tmp_path / "cloc", tmp_path / "out")
    theirs, preprocess = _open_clip(tmp_path / "out")
    _close(theirs.encode_image(preprocess(photo)[None]), expected)
    again = open_clip.get_tokenizer(f"local-dir:{tmp_path}/out")(TEXTS)
    assert torch.equal(again, ids)
    if name == "dfn-metaclip":
        EXPORTS["hf-clip"](tmp_path / "cloc", tmp_path / "hf")
        processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
        clip = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hf")
        _close(clip(**processor(photo, return_tensors="pt")).image_embeds, expected)
    if name == "siglip2":
        EXPORTS["hf-clip"](tmp_path / "cloc", tmp_path / "hf")
        processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
        siglip = SiglipVisionModel.from_pretrained(tmp_path / "hf")
        _close(siglip(**processor(photo, return_tensors="pt")).pooler_output, expected)


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].other_size])
@torch.no_grad()
def test_another_resolution_is_open_clips(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    _publish(family, tmp_path / "hub")
    theirs, preprocess = _open_clip(tmp_path / "hub", force_image_size=family.other_size)
    cloc, *_ = _started(tmp_path / "hub", image_size=family.other_size)
    photo = _photo((256, 256))
    _close(_features(cloc, photo), theirs.encode_image(preprocess(photo)[None]))


@torch.no_grad()
def test_a_resnet_at_another_resolution(tmp_path: Path) -> None:
    _publish(FAMILIES["resnet"], tmp_path / "hub")
    theirs, _ = _open_clip(tmp_path / "hub")
    cloc, *_ = _started(tmp_path / "hub", image_size=448)
    actual = cloc.vision.encoder.visual.attnpool.positional_embedding
    expected = theirs.visual.attnpool.positional_embedding
    assert actual.shape == (1 + 14 * 14, 2048) and cloc.vision.grid_hw == (14, 14)
    assert torch.equal(actual[0], expected[0])
    fine, coarse = (
        table[1:].T.unflatten(1, (side, side)) for table, side in ((actual, 14), (expected, 7))
    )
    # twice as fine: a coarse cell is where its four middle cells are, but for the border
    pooled = torch.nn.functional.avg_pool2d(fine, 2)
    assert torch.corrcoef(torch.stack([pooled.flatten(), coarse.flatten()]))[0, 1] > 0.95
    photo = _photo((256, 256))
    assert _features(cloc, photo).isfinite().all()
