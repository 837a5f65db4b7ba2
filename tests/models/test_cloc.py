"""The CLOC model: equal to CLIP where it is CLIP, promptable where it is more."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CustomTextCLIP

from cloc_mllm.config import LossConfig, ModelConfig, PrompterConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer
from cloc_mllm.losses.cloc_loss import cloc_loss
from cloc_mllm.models.build import build_cloc, build_cloc_vision, load_cloc, save_cloc
from cloc_mllm.models.cloc import Cloc, ClocVision
from cloc_mllm.models.region_encoders import RegionPrompts
from cloc_mllm.models.vision_encoder import ImageFeatures
from tests.models.batches import random_batch
from tests.models.tiny import built, tiny_cloc, tiny_config

KINDS = [
    {"kind": "prompter", "readout": "prompt", "spatial_prior": "both"},
    {"kind": "prompter", "readout": "prompt", "spatial_prior": "text"},
    {"kind": "prompter", "readout": "mean", "spatial_prior": "box"},
    {"kind": "prompter", "readout": "mean", "spatial_prior": "none"},
    {"kind": "roi_align"},
    {"kind": "none"},
]
BOXES = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.9, 0.9]])
IMAGE_INDEX = torch.tensor([0, 1, 1])


def _id(kind: dict[str, object]) -> str:
    return "-".join(str(value) for value in kind.values())


def test_towers_equal_open_clip_bit_for_bit() -> None:
    """Built from an open_clip architecture; weights moved into open_clip's own class."""
    config = ModelConfig(
        architecture="ViT-B-32", image_size=64, tokenizer="open_clip:ViT-B-32", context_length=77
    )
    base = open_clip.get_model_config("ViT-B-32")
    base["vision_cfg"] |= {"layers": 2, "width": 64, "image_size": 64}
    base["text_cfg"] |= {"layers": 2, "width": 32, "heads": 2}
    config.clip_config, config.architecture = base, ""
    cloc = build_cloc(config).eval()
    clip = CustomTextCLIP(**base).eval()
    clip.visual.load_state_dict(cloc.vision.encoder.visual.state_dict())
    clip.text.load_state_dict(cloc.text.text.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    ids = open_clip.get_tokenizer("ViT-B-32")(["a cat", "two red mugs on a table"])
    with torch.no_grad():
        assert torch.equal(cloc.encode_image(pixels).image_features, clip.encode_image(pixels))
        assert torch.equal(cloc.encode_text(ids), clip.encode_text(ids))
        short = cloc.encode_text(ids[:, :8])
    torch.testing.assert_close(short, clip.encode_text(ids).detach())


@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_every_region_encoder_embeds_and_locates(kind: dict[str, object]) -> None:
    cloc = tiny_cloc(**kind)
    image = cloc.encode_image(torch.randn(2, 3, 64, 64))
    z = cloc.embed_boxes(image, BOXES, IMAGE_INDEX)
    boxes = cloc.locate(image, torch.randn(3, 24), IMAGE_INDEX)
    assert z.shape == (3, 24) and boxes.shape == (3, 4)
    assert torch.isfinite(z).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_a_region_does_not_change_when_others_are_added(kind: dict[str, object]) -> None:
    cloc = tiny_cloc(**kind)
    image = cloc.encode_image(torch.randn(2, 3, 64, 64))
    together = cloc.embed_boxes(image, BOXES, IMAGE_INDEX)
    alone = cloc.embed_boxes(image, BOXES[1:2], IMAGE_INDEX[1:2])
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_no_regions_at_all(kind: dict[str, object]) -> None:
    cloc = tiny_cloc(**kind)
    image = cloc.encode_image(torch.randn(2, 3, 64, 64))
    none = torch.zeros(0, dtype=torch.long)
    assert cloc.embed_boxes(image, torch.zeros(0, 4), none).shape == (0, 24)
    assert cloc.locate(image, torch.zeros(0, 24), none).shape == (0, 4)


def test_prompter_equals_a_plain_transformer_layer() -> None:
    """The shared keys and values against the whole layer written out, `mean` readout, no prior."""
    cloc = tiny_cloc(kind="prompter", readout="mean", spatial_prior="none")
    prompter = cloc.vision.region_encoder.prompter
    image = cloc.encode_image(torch.randn(1, 3, 64, 64))
    context = prompter.prepare(image)
    text = torch.randn(1, 24)
    actual = prompter.embed_texts(context, text, torch.zeros(1, dtype=torch.long))

    prompt = prompter.text_token(prompter.text_norm(text))
    tokens = torch.cat([prompt, context.tokens[0]])
    normed = prompter.norm_attention(tokens)
    attended = F.scaled_dot_product_attention(
        prompter.query(normed)[None], prompter.key(normed)[None], prompter.value(normed)[None]
    )[0]
    hidden = tokens + prompter.output(attended)
    hidden = hidden + prompter.mlp(prompter.norm_mlp(hidden))
    torch.testing.assert_close(actual, prompter.projection(hidden.mean(0))[None])


def test_spatial_prior_attends_to_the_box() -> None:
    """With a large gate the attention of a box prompt stays on the tokens under the box."""
    cloc = tiny_cloc(kind="prompter", spatial_prior="both")
    prompter = cloc.vision.region_encoder.prompter
    torch.nn.init.constant_(prompter.box_gate, 1e4)
    image = cloc.encode_image(torch.randn(1, 3, 64, 64))
    box, index = torch.tensor([[0.0, 0.0, 0.25, 0.25]]), torch.zeros(1, dtype=torch.long)
    before = cloc.embed_boxes(image, box, index)
    tokens = image.tokens.clone()
    tokens[:, 5:] += 10  # tokens outside the box
    after = cloc.embed_boxes(image._replace(tokens=tokens), box, index)
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_saved_model_loads_equal(kind: dict[str, object], tmp_path: Path) -> None:
    config = tiny_config(**kind)
    cloc = build_cloc(config).eval()
    save_cloc(cloc, tmp_path, config, load_text_tokenizer("builtin", 24))
    loaded, tokenizer, loaded_config = load_cloc(tmp_path)
    assert loaded_config.prompter == config.prompter
    for name, tensor in cloc.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert tokenizer(["a crab"]).tolist() == load_text_tokenizer("builtin")(["a crab"]).tolist()
    vision = build_cloc_vision(loaded_config)
    vision.load_state_dict(cloc.vision.state_dict())


def test_another_preprocessing_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config()
    save_cloc(build_cloc(config), tmp_path, config, load_text_tokenizer("builtin", 24))
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"text": "lower-case"', '"text": "as it is"'))
    with pytest.raises(ValueError, match=r"text: .*as it is.*lower-case"):
        load_cloc(tmp_path)


def test_missing_or_wrong_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_cloc(tmp_path)
    with pytest.raises(ValueError, match="no architecture 'ViT-Z-1'"):
        built(ModelConfig(architecture="ViT-Z-1"))
    with pytest.raises(ValueError, match="architecture` or `clip_config"):
        built(ModelConfig())
    with pytest.raises(ValueError, match="clip_config lacks text_cfg, vision_cfg"):
        built(ModelConfig(clip_config={"embed_dim": 8}))
    with pytest.raises(ValueError, match="unknown tokenizer 'words'"):
        load_text_tokenizer("words")
    with pytest.raises(ValueError, match=r"expected pixel_values\[B, 3, 64, 64\]"):
        tiny_cloc().encode_image(torch.zeros(1, 3, 32, 32))


def test_timm_tower_gives_tokens_and_open_clips_features() -> None:
    config = ModelConfig(
        clip_config={
            "embed_dim": 24,
            "vision_cfg": {
                "timm_model_name": "tf_efficientnet_lite0",
                "timm_pool": "avg",
                "timm_proj": "linear",
            },
            "text_cfg": {"width": 16, "heads": 2, "layers": 1},
        },
        image_size=64,
        tokenizer="builtin",
        prompter=PrompterConfig(),
    )
    cloc = built(config).eval()
    pixels = torch.randn(2, 3, 64, 64)
    image = cloc.encode_image(pixels)
    assert image.tokens.shape == (2, 4, 1280) and image.grid_hw == (2, 2)
    # in another memory layout, convolutions round differently
    same_layout = pixels.contiguous(memory_format=torch.channels_last)
    assert torch.equal(image.image_features, cloc.vision.encoder.visual(same_layout))


def test_gradients_reach_every_parameter() -> None:
    from tests.models.batches import random_batch

    cloc: Cloc = tiny_cloc().train()
    out = cloc(random_batch(cloc))
    total = sum(t.float().square().sum() for t in out if isinstance(t, torch.Tensor))
    (total + cloc.logit_scale.sum() + cloc.region_logit_scale.sum()).backward()
    without = [name for name, p in cloc.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_each_token_is_read_as_the_region_it_points_at(kind: dict[str, object]) -> None:
    cloc = tiny_cloc(**kind)
    image = cloc.encode_image(torch.randn(2, 3, 64, 64))
    embeddings, boxes = cloc.vision.read_tokens(image)
    assert embeddings.shape == (2, 16, 24) and boxes.shape == (2, 16, 4)
    if kind["kind"] == "prompter":
        index = torch.tensor([1])
        expected = cloc.embed_boxes(image, boxes[1, 7:8], index)
        torch.testing.assert_close(embeddings[1, 7:8], expected)


def test_a_mask_prompts_what_it_covers() -> None:
    """Tokens outside the mask do not matter to a sharp prior, whatever shape the mask has."""
    cloc = tiny_cloc(kind="prompter", free_form=True)
    prompter = cloc.vision.region_encoder.prompter
    assert prompter.box_gate is not None
    torch.nn.init.constant_(prompter.box_gate, 1e4)
    image = cloc.encode_image(torch.randn(1, 3, 64, 64))
    masks, index = torch.zeros(1, 8, 8), torch.zeros(1, dtype=torch.long)
    masks[0, :2, :2] = masks[0, 6:, 6:] = 1  # the first and the last token of the 4 x 4
    before = cloc.vision.embed_masks(image, masks, index)
    tokens = image.tokens.clone()
    tokens[:, 1:-1] += torch.randn_like(tokens[:, 1:-1])
    after = cloc.vision.embed_masks(image._replace(tokens=tokens), masks, index)
    torch.testing.assert_close(before, after)
    tokens[:, 0] += torch.randn_like(tokens[:, 0])
    moved = cloc.vision.embed_masks(image._replace(tokens=tokens), masks, index)
    assert (moved - before).abs().max() > 1e-2


def test_a_mask_of_the_box_is_the_box_to_a_prompter_that_knows_no_masks() -> None:
    cloc = tiny_cloc(kind="prompter")
    image = cloc.encode_image(torch.randn(1, 3, 64, 64))
    masks, index = torch.zeros(1, 16, 16), torch.zeros(1, dtype=torch.long)
    masks[0, 4:12, 4:16] = 1
    box = torch.tensor([[0.25, 0.25, 1.0, 0.75]])
    torch.testing.assert_close(
        cloc.vision.embed_masks(image, masks, index), cloc.embed_boxes(image, box, index)
    )


def test_masked_regions_train_what_masks_need_and_others_stay() -> None:
    cloc = tiny_cloc(kind="prompter", free_form=True)
    prompter = cloc.vision.region_encoder.prompter
    assert prompter.mask is not None
    batch = random_batch(cloc)
    plain = cloc(batch).region_features
    cloc(batch).region_features.sum().backward()
    assert prompter.mask.weight.grad is not None  # every rank touches every parameter
    batch.region_masks, batch.masked_regions = torch.ones(1, 8, 8), torch.tensor([3])
    masked = cloc(batch).region_features
    assert not torch.equal(plain[3], masked[3])
    torch.testing.assert_close(plain[[0, 1, 2, 4]], masked[[0, 1, 2, 4]])


def test_a_sigmoid_model_starts_as_siglip_does_and_loads_again(tmp_path: Path) -> None:
    model = tiny_cloc(contrastive_loss="sigmoid")
    for temperature in ("", "region_"):
        scale, bias = (getattr(model, f"{temperature}logit_{name}") for name in ("scale", "bias"))
        assert scale.exp().item() == pytest.approx(10) and bias.tolist() == [-10.0]
    config = tiny_config("sigmoid")
    with torch.no_grad():
        model.region_logit_bias.fill_(-7.5)  # type: ignore[union-attr]
    save_cloc(model, tmp_path, config, load_text_tokenizer(config.tokenizer, config.context_length))
    loaded, _, loaded_config = load_cloc(tmp_path)
    assert loaded_config.contrastive_loss == "sigmoid"
    assert loaded.region_logit_bias is not None and loaded.region_logit_bias.item() == -7.5
    assert tiny_cloc().logit_bias is None


class CentreTokenEncoder(torch.nn.Module):
    """A region encoder that no other code knows: the token at the middle of the box."""

    has_region_loss, predicts_boxes, takes_masks = True, False, False

    def __init__(self, token_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(token_dim, embed_dim)

    def forward(
        self, image: ImageFeatures, prompts: RegionPrompts, text_features: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        height, width = image.grid_hw
        x, y = ((prompts.boxes[:, :2] + prompts.boxes[:, 2:]) / 2).clamp(0, 0.999).unbind(1)
        token = (y * height).long() * width + (x * width).long()
        return self.projection(image.tokens[prompts.image_index, token]), None


@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_a_region_encoder_of_ones_own_trains(micro_batch_size: int) -> None:
    encoder = tiny_cloc().vision.encoder
    vision = ClocVision(encoder, CentreTokenEncoder(encoder.token_dim, encoder.embed_dim))
    cloc = Cloc(vision, tiny_cloc().text, "softmax").train()
    cloc.micro_batch_size = micro_batch_size
    batch = random_batch(cloc)
    terms = cloc_loss(cloc(batch), batch, LossConfig())
    terms["loss"].backward()
    assert terms.keys() == {"loss", "clip", "cloc", "same_text"}
    assert vision.region_encoder.projection.weight.grad.any()
