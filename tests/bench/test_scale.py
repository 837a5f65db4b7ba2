"""The formulas against what torch counts on the real model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cloc_mllm.config import ModelConfig
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.region_encoders import RegionPrompts
from prompter import make_inputs
from scale import (
    Recipe,
    Shapes,
    communication,
    image_tower_flops,
    memory,
    num_parameters,
    prompter_flops,
    text_tower_flops,
)
from tests.models.tiny import built

SHAPES = Shapes.of("ViT-B-16", 224)


@pytest.fixture(scope="module")
def cloc() -> Cloc:
    return built(ModelConfig("ViT-B-16")).eval()


def counted(call: Callable[[], Any]) -> int:
    # plain attention, with gradient: torch counts neither its fused kernels nor its fast path
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def test_towers_cost_what_torch_counts(cloc: Cloc) -> None:
    image = counted(lambda: cloc.encode_image(torch.zeros(1, 3, 224, 224)))
    assert image == pytest.approx(image_tower_flops(SHAPES), rel=1e-3)
    text = counted(lambda: cloc.encode_text(torch.ones(1, 40, dtype=torch.long)))
    assert text == pytest.approx(text_tower_flops(SHAPES, 40), rel=1e-3)


def test_prompter_costs_what_torch_counts(cloc: Cloc) -> None:
    """What is made once a batch, not once an image, is left out: positions of the tokens, and the
    product of two layers in the text prior."""
    inputs = make_inputs(cloc.vision, 4)
    with torch.no_grad():
        image = cloc.encode_image(inputs["pixel_values"])
    none = (torch.zeros(0, 1, 1), torch.zeros(0, dtype=torch.long))
    prompts = RegionPrompts(inputs["boxes"], inputs["image_index"], *none)
    actual = counted(lambda: cloc.vision.region_encoder(image, prompts, inputs["texts"]))
    once = 2 * (SHAPES.num_tokens + SHAPES.embed_dim) * SHAPES.width**2
    assert actual - once == pytest.approx(4 * prompter_flops(SHAPES, 4), rel=0.01)


def test_parameters_are_counted(cloc: Cloc) -> None:
    actual = sum(p.numel() for p in cloc.parameters())
    assert actual == pytest.approx(num_parameters(SHAPES), rel=1e-3)


def test_zero_shares_out_one_thing_more_at_each_stage() -> None:
    recipe = Recipe()
    stages = [
        memory(SHAPES, recipe, gpus=64, stage=stage, images=64, checkpointing=False)
        for stage in (0, 1, 2, 3)
    ]
    totals = [each.total for each in stages]
    assert totals == sorted(totals, reverse=True)
    assert stages[1].optimizer == stages[0].optimizer / 64
    assert stages[2].gradients == stages[0].gradients / 64
    assert len({each.activations for each in stages}) == 1
    assert communication(SHAPES, recipe, stage=3) > communication(SHAPES, recipe, stage=2)
