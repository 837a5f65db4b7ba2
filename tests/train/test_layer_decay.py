from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloc_mllm.config import Stage1OptimConfig
from cloc_mllm.models.build import build_cloc
from cloc_mllm.train.layer_decay import lr_scales
from cloc_mllm.train.optim import freeze_by_lr, param_groups
from tests.models.batches import random_batch
from tests.models.tiny import tiny_cloc, tiny_config
from tests.train.toy import ToyModel


def peak_lrs(model: torch.nn.Module, optim: Stage1OptimConfig) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups(model, optim)
    rates = {names[id(p)]: group["peak_lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)  # each in one group
    return rates


def assert_rates(actual: dict[str, float], expected: dict[str, float]) -> None:
    assert {name: actual[name] for name in expected} == pytest.approx(expected)


def test_native_towers_decay_from_the_end_to_the_embeddings() -> None:
    cloc = tiny_cloc()  # one block a tower: depth 2
    rates = peak_lrs(cloc, Stage1OptimConfig(lr=1.0, layer_decay=0.5))
    assert rates.keys() == dict(cloc.named_parameters()).keys()
    image, text = "vision.encoder.visual.", "text.text."
    embeddings = ["conv1.weight", "class_embedding", "positional_embedding", "ln_pre.bias"]
    assert_rates(rates, {image + name: 0.25 for name in embeddings})
    tables = ["token_embedding.weight", "positional_embedding"]
    assert_rates(rates, {text + name: 0.25 for name in tables})
    block = "transformer.resblocks.0.attn.in_proj_weight"
    assert_rates(rates, {image + block: 0.5, text + block: 0.5})
    assert_rates(rates, {image + "ln_post.weight": 1.0, image + "proj": 1.0})
    assert_rates(rates, {text + "ln_final.bias": 1.0, text + "text_projection": 1.0})
    assert_rates(rates, {"vision.region_encoder.prompter.key.weight": 1.0, "logit_scale": 1.0})


def test_timm_and_hugging_face_towers_decay(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig(
        vocab_size=1100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    ).save_pretrained(tmp_path)
    config = tiny_config()
    config.clip_config["vision_cfg"] = {
        "timm_model_name": "resnet10t",
        "timm_pool": "avg",
        "timm_proj": "linear",
    }
    config.clip_config["text_cfg"] = {
        "hf_model_name": str(tmp_path),
        "hf_model_pretrained": False,
        "hf_pooler_type": "mean_pooler",
    }
    rates = peak_lrs(build_cloc(config), Stage1OptimConfig(lr=1.0, layer_decay=0.5))
    trunk, text = "vision.encoder.visual.trunk.", "text.text.transformer."
    assert_rates(rates, {trunk + "conv1.0.weight": 0.5**5, trunk + "layer1.0.conv1.weight": 0.5**4})
    assert_rates(rates, {trunk + "layer4.0.conv2.weight": 0.5})
    assert_rates(rates, {"vision.encoder.visual.head.proj.weight": 1.0})
    assert_rates(rates, {text + "embeddings.word_embeddings.weight": 0.125})
    assert_rates(rates, {text + "encoder.layer.0.output.dense.weight": 0.25})
    assert_rates(rates, {text + "encoder.layer.1.output.dense.weight": 0.5})
    assert_rates(rates, {"text.text.proj.0.weight": 1.0})


def test_decay_multiplies_what_layer_lr_says_and_new_parts_have_their_own() -> None:
    optim = Stage1OptimConfig(
        lr=1.0,
        new_lr=4.0,
        layer_decay=0.5,
        layer_lr={"vision.encoder": 0.1, "text": 0.0, "vision.region_encoder.box_head": 2.0},
    )
    cloc = tiny_cloc()
    freeze_by_lr(cloc, optim)
    rates = peak_lrs(cloc, optim)
    assert_rates(rates, {"vision.encoder.visual.conv1.weight": 0.025, "logit_scale": 1.0})
    assert_rates(
        rates, {"vision.region_encoder.prompter.key.weight": 4.0, "region_logit_scale": 4.0}
    )
    assert {rate for name, rate in rates.items() if "box_head" in name} == {2.0}
    assert not any(name.startswith("text.") for name in rates)


def test_the_bias_of_regions_is_new_like_their_temperature() -> None:
    rates = peak_lrs(tiny_cloc(0, "sigmoid"), Stage1OptimConfig(lr=1.0, new_lr=4.0))
    assert_rates(rates, {"region_logit_scale": 4.0, "region_logit_bias": 4.0, "logit_bias": 1.0})


def test_a_locked_tower_keeps_no_graph() -> None:
    """So its backward costs nothing and its activations are freed as it goes."""
    cloc = tiny_cloc().train()
    freeze_by_lr(cloc, Stage1OptimConfig(layer_lr={"vision.encoder": 0.0, "text": 0.0}))
    batch = random_batch(cloc)
    image = cloc.encode_image(batch.pixel_values)
    assert image.tokens.grad_fn is None and image.image_features.grad_fn is None
    assert cloc.encode_text(batch.caption_input_ids).grad_fn is None
    z = cloc.embed_boxes(image, batch.boxes, batch.region_image_index)
    z.sum().backward()
    assert cloc.vision.region_encoder.prompter.key.weight.grad is not None


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5])
def test_a_decay_that_is_no_factor_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"layer_decay is .*in \(0, 1\]"):
        lr_scales(tiny_cloc(), decay)


def test_a_model_without_towers_is_refused() -> None:
    with pytest.raises(ValueError, match="no image or text tower"):
        lr_scales(ToyModel(), 0.5)
    assert lr_scales(ToyModel(), 1.0) == {}


def test_muon_needs_an_lr() -> None:
    with pytest.raises(ValueError, match=r"optim.lr is 0.0; muon needs it above 0"):
        param_groups(ToyModel(), Stage1OptimConfig(optimizer="muon", lr=0.0))
