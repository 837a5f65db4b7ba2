"""Both sides of the step benchmark do the same work, on a small architecture."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch

import step
from cloc_mllm.data.collate import ClocBatch
from cloc_mllm.data.tokenizer import load_text_tokenizer
from prompter import prompter_and_tower
from step import matched_steps, read_batch, region_text
from tests.models.tiny import tiny_cloc

TOKENIZER = load_text_tokenizer("open_clip:ViT-B-16")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ViT-B/16 of two narrow layers, known to open_clip by name."""
    config = open_clip.get_model_config("ViT-B-16")
    config["vision_cfg"] |= {"layers": 2, "width": 64}
    config["text_cfg"] |= {"layers": 2, "width": 64, "heads": 2}
    path = tmp_path_factory.mktemp("configs") / "bench-tiny.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return "bench-tiny"


@pytest.fixture(scope="module")
def batch() -> ClocBatch:
    return read_batch("", 4, TOKENIZER, 224)


def test_plain_clip_stays_equal_to_open_clip_through_a_step(
    architecture: str, batch: ClocBatch
) -> None:
    ours, theirs = matched_steps(architecture, batch, TOKENIZER, "clip", bf16=False)
    for _ in range(2):
        with torch.no_grad():
            actual, expected = ours.forward()["loss"], theirs.forward()
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        ours()
        theirs()


def test_other_losses_are_not_compared(
    architecture: str, batch: ClocBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "copy_towers", lambda *_: None)
    with pytest.raises(ValueError, match="CLIP losses differ by"):
        matched_steps(architecture, batch, TOKENIZER, "cloc", bf16=False)


def test_region_text_of_both_sides_is_equal(architecture: str, batch: ClocBatch) -> None:
    model = matched_steps(architecture, batch, TOKENIZER, "cloc", bf16=False)[0].model
    distinct, padded = region_text(model, batch, bf16=False)
    torch.testing.assert_close(distinct(), padded())
    assert len(batch.phrase_input_ids) < len(batch.boxes)


def test_prompter_side_leaves_the_tower_alone() -> None:
    vision = tiny_cloc().vision
    inputs = {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "boxes": torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.2, 0.3, 0.9, 0.8]]),
        "texts": torch.randn(2, vision.embed_dim),
        "image_index": torch.tensor([0, 1]),
    }
    prompter, tower = prompter_and_tower(vision, inputs, bf16=False, backward=True)
    prompter()
    assert all(p.grad is None for p in vision.encoder.parameters())
    assert all(p.grad is not None for p in vision.region_encoder.parameters())
    tower()
    assert any(p.grad is not None for p in vision.encoder.parameters())
