"""Tokens of several scales: the right cells, through every region encoder, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.models.build import build_cloc, load_cloc, save_cloc
from cloc_mllm.models.clip_config import ResolvedModel
from cloc_mllm.models.cloc import Cloc
from tests.models.batches import random_batch

SIDE = 128
TOWERS: dict[str, dict[str, Any]] = {
    "efficientnet": {"timm_model_name": "tf_efficientnet_lite0"},
    "convnext": {"timm_model_name": "convnext_atto"},
    "resnet": {"timm_model_name": "resnet10t"},
    "swin": {"timm_model_name": "swinv2_cr_tiny_ns_224"},  # tokens with channels last
    "native-resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
}
# widths of the tokens at strides 16 and 32
DIMS = {
    "efficientnet": (112, 1280),
    "convnext": (160, 320),
    "resnet": (256, 512),
    "swin": (384, 768),
    "native-resnet": (128, 256),
}


def _config(tower: str, *strides: int, **prompter: Any) -> ResolvedModel:
    vision = {"timm_pool": "avg", "timm_proj": "linear"} | TOWERS[tower]
    return ResolvedModel(
        ModelConfig(
            clip_config={
                "embed_dim": 24,
                "vision_cfg": vision if "timm_model_name" in vision else TOWERS[tower],
                "text_cfg": {"width": 16, "heads": 2, "layers": 1},
            },
            image_size=SIDE,
            token_strides=list(strides),
            tokenizer="builtin",
            context_length=24,
            prompter=PrompterConfig(**{"width": 32} | prompter),
        )
    )


def _built(tower: str, *strides: int, **prompter: Any) -> Cloc:
    torch.manual_seed(0)
    return build_cloc(_config(tower, *strides, **prompter)).eval()


def _with_square() -> Tensor:
    """A plain picture, and the same with a square: rows 4 and 5, columns 0 and 1 of 16 px cells."""
    pixels = torch.zeros(2, 3, SIDE, SIDE)
    pixels[1, :, 64:96, :32] = 2.0
    return pixels


# a deep EfficientNet with random weights sees the whole picture in every cell
@pytest.mark.parametrize("tower", [tower for tower in TOWERS if tower != "efficientnet"])
@torch.no_grad()
def test_tokens_of_a_painted_square_change_in_its_cells(tower: str) -> None:
    cloc = _built(tower, 16, 32)
    image = cloc.encode_image(_with_square())
    assert image.grid_hw == (8, 8) and cloc.vision.token_dims == DIMS[tower]
    scales = cloc.vision.split_scales(image.tokens)
    assert [scale.shape[-1] for scale in scales] == list(DIMS[tower])
    fine, coarse = ((scale[1] - scale[0]).norm(dim=-1).view(8, 8) for scale in scales)
    # random kernels blur and shift what they see by about a cell; a wrong order of cells would
    # bring it to another corner
    row, column = divmod(int(fine.argmax()), 8)
    assert row in (3, 4, 5, 6) and column in (0, 1, 2)
    assert (coarse == coarse.max()).nonzero().tolist() == [[4, 0], [4, 1], [5, 0], [5, 1]]


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_the_last_scale_is_the_one_without_the_setting(tower: str) -> None:
    several, one = _built(tower, 16, 32), _built(tower)
    one.vision.encoder.load_state_dict(several.vision.encoder.state_dict())
    pixels = _with_square()
    expected, image = one.encode_image(pixels), several.encode_image(pixels)
    assert torch.equal(image.image_features, expected.image_features)
    _, coarse = several.vision.split_scales(image.tokens)
    assert expected.grid_hw == (4, 4)
    assert torch.equal(coarse.unflatten(1, (8, 8))[:, ::2, ::2].flatten(1, 2), expected.tokens)


@pytest.mark.parametrize(
    "prompter",
    [
        {"kind": "prompter"},
        {"kind": "prompter", "width": 0},
        {"kind": "roi_align"},
        {"kind": "none"},
    ],
    ids=lambda prompter: "-".join(map(str, prompter.values())),
)
@torch.no_grad()
def test_the_region_of_a_painted_square_changes_most(prompter: dict[str, Any]) -> None:
    cloc = _built("resnet", 16, 32, **prompter)
    if prompter["kind"] == "prompter":
        torch.nn.init.constant_(cloc.vision.region_encoder.prompter.box_gate, 50.0)
    image = cloc.encode_image(_with_square())
    square, far = [0.0, 4 / 8, 2 / 8, 6 / 8], [6 / 8, 0.0, 1.0, 2 / 8]
    boxes = torch.tensor([square, far]).repeat(2, 1)
    plain_square, plain_far, painted_square, painted_far = cloc.embed_boxes(
        image, boxes, torch.tensor([0, 0, 1, 1])
    )
    change, elsewhere = (painted_square - plain_square).norm(), (painted_far - plain_far).norm()
    assert change > 2 * elsewhere
    embeddings, token_boxes = cloc.vision.read_tokens(image)
    assert embeddings.shape == (2, 64, 24) and token_boxes.shape == (2, 64, 4)
    assert cloc.locate(image, torch.randn(1, 24), torch.tensor([0])).shape == (1, 4)


def test_it_trains_and_loads_again(tmp_path: Path) -> None:
    config = _config("efficientnet", 16, 32)
    cloc = build_cloc(config)
    cloc(random_batch(cloc)).region_features.square().sum().backward()
    adapt = cloc.vision.region_encoder.prompter.adapt
    for dim, weight in zip((112, 1280), adapt[1].weight.grad.split([112, 1280], 1), strict=True):
        assert weight.shape == (32, dim) and weight.abs().sum() > 0
    save_cloc(cloc, tmp_path, config, load_text_tokenizer("builtin", 24))
    loaded, _, loaded_config = load_cloc(tmp_path)
    assert loaded_config.token_strides == [16, 32] and loaded.vision.grid_hw == (8, 8)
    for name, tensor in cloc.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("strides", [(16,), (32, 16), (7, 32), (16, 32, 64)])
def test_strides_that_the_tower_lacks_are_named(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens of strides 2, 4, 8, 16, 32; .* 32 at the end"):
        _built("efficientnet", *strides)


def test_a_canvas_that_does_not_divide_is_refused() -> None:
    config = _config("efficientnet", 16, 32)
    config.image_size = 144
    with pytest.raises(ValueError, match="multiple of the largest, 32"):
        build_cloc(config)
