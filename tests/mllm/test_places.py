"""Places that the collator knows: the loss and gradients that the model's own look gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cloc_mllm.config import ConversationConfig, LoraConfig, MllmConfig
from cloc_mllm.mllm import build_mllm
from cloc_mllm.mllm.collate import ConversationCollator


def learn(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"box_head": True},
        {"box_head": True, "box_reader": "prompter", "max_tiles": 2},
        {"region_features": "roi", "max_tiles": 2},
        {"coordinate_smoothing": 1.5, "lora": LoraConfig(rank=2)},
    ],
    ids=["tokens", "box head", "prompter head, tiles", "roi, tiles", "smoothing, LoRA"],
)
def test_bit_for_bit(mllm_config: MllmConfig, tiny_scenes: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, processor = build_mllm(replace(mllm_config, **settings))
    asks = ConversationConfig(questions_per_image=3, locate=1.0)
    batch = ConversationCollator(processor, asks)(list(enumerate(tiny_scenes[:5])))
    without = {name: value for name, value in batch.inputs.items() if name != "places"}

    expected, expected_gradients = learn(model.train(), without)
    actual, gradients = learn(model, batch.inputs)

    assert torch.equal(actual, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert len(batch.inputs["places"].regions) > 0
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name


def test_too_few_regions_are_refused_by_row(mllm_config: MllmConfig, tiny_scenes: Any) -> None:
    model, processor = build_mllm(mllm_config)
    asks = ConversationConfig(questions_per_image=3, locate=1.0, pack=False)
    inputs = ConversationCollator(processor, asks)(list(enumerate(tiny_scenes[:2]))).inputs
    for name in ("region_boxes", "region_image_index"):
        inputs[name] = inputs[name][:-1]
    with pytest.raises(ValueError, match=r"sample 1 has \d+ <region> tokens but \d+ region boxes"):
        model(**inputs)
