"""Starting from a CLIP: features equal open_clip's own, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP, resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor

from cloc_mllm.config import ModelConfig, PrompterConfig
from cloc_mllm.data.tokenizer import load_text_tokenizer, train_byte_level_bpe
from cloc_mllm.models.build import load_cloc, load_tokenizer, save_cloc
from cloc_mllm.models.clip_config import resolve_model
from cloc_mllm.models.cloc import Cloc
from cloc_mllm.models.export import export_safetensors
from tests.models.tiny import built, tiny_cloc, tiny_config

VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 64}
TEXT = {"layers": 1, "width": 16, "heads": 2, "context_length": 16, "vocab_size": 49408}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}
TIMM |= {"timm_proj": "linear"}
IDS = open_clip.get_tokenizer("ViT-B-32", context_length=16)(["a red crab", "two boats, left"])


def clip_config(**changes: Any) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": dict(VIT), "text_cfg": dict(TEXT)} | changes


def random_clip(kind: type, config: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    return kind(**json.loads(json.dumps(config))).eval()


def assert_same_features(cloc: Cloc, theirs: Any, ids: Tensor = IDS, size: int = 64) -> None:
    cloc.eval()
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(cloc.encode_image(pixels).image_features, theirs.encode_image(pixels))
        assert torch.equal(cloc.encode_text(ids), theirs.encode_text(ids))
    assert cloc.logit_scale.item() == theirs.logit_scale.item()


def write(state: dict[str, Tensor], path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(state, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if kind == "training checkpoint":
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {}}, path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    if kind == "half precision":
        state = {name: tensor.half() for name, tensor in state.items()}
    torch.save(state, path.with_suffix(".bin"))
    return path.with_suffix(".bin")


@pytest.mark.parametrize("kind", ["safetensors", "training checkpoint", "state dict"])
@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
def test_a_file_of_open_clip_gives_open_clips_features(
    tmp_path: Path, kind: str, quick_gelu: bool
) -> None:
    """In the names of OpenAI's CLIP (no `text.`), through a registered architecture."""
    contents = clip_config(quick_gelu=quick_gelu)
    name = f"tiny-{tmp_path.name}"
    (tmp_path / f"{name}.json").write_text(json.dumps(contents))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    theirs = random_clip(CLIP, contents)
    theirs.logit_scale.data.fill_(3.0)
    path = write(theirs.state_dict(), tmp_path / "clip", kind)
    cloc = built(ModelConfig(architecture=name, init=str(path)))
    assert_same_features(cloc, theirs)
    assert cloc.vision.encoder.image_size == 64


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    theirs = random_clip(CLIP, clip_config())
    path = write(theirs.state_dict(), tmp_path / "clip", "half precision")
    cloc = built(ModelConfig(clip_config=clip_config(), init=str(path)))
    assert_same_features(cloc, theirs.half().float())


def test_a_timm_tower_at_its_own_and_at_another_size(tmp_path: Path) -> None:
    contents = clip_config(vision_cfg=TIMM)
    theirs = random_clip(CustomTextCLIP, contents)
    path = write(theirs.state_dict(), tmp_path / "clip", "state dict")
    config = ModelConfig(clip_config=contents, init=str(path))
    cloc = built(config).eval()
    pixels = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    assert torch.equal(cloc.encode_image(pixels).image_features, theirs.encode_image(pixels))

    theirs.visual.set_input_size(96)
    other = dataclasses.replace(config, image_size=96)
    cloc, tokenizer = built(other).eval(), load_tokenizer(resolve_model(config))
    pixels = torch.randn(1, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    expected = theirs.encode_image(pixels)
    assert torch.equal(cloc.encode_image(pixels).image_features, expected)
    save_cloc(cloc, tmp_path / "model", resolve_model(other), tokenizer)
    loaded = load_cloc(tmp_path / "model")[0]
    assert torch.equal(loaded.encode_image(pixels).image_features, expected)
    again = ModelConfig(init=str(tmp_path / "model"), image_size=64)
    assert built(again).vision.encoder.grid_hw == (4, 4)


def test_a_hugging_face_text_tower(tmp_path: Path) -> None:
    from transformers import BertConfig

    tokenizer = train_byte_level_bpe(["two red crabs"] * 9, 300)
    tokenizer.save_pretrained(tmp_path / "bert")
    BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_model_pretrained": False}
    contents = clip_config(text_cfg=text | {"hf_pooler_type": "mean_pooler"})
    theirs = random_clip(CustomTextCLIP, contents)
    path = write(theirs.state_dict(), tmp_path / "clip", "safetensors")
    config = ModelConfig(clip_config=contents, init=str(path), context_length=16)
    ids = load_tokenizer(resolve_model(config))(["two red crabs", "red"])
    assert_same_features(built(config), theirs, ids)

    saved = (tmp_path / "bert" / "config.json").read_text()
    (tmp_path / "bert" / "config.json").write_text(
        saved.replace('"pad_token_id": 0', '"pad_token_id": 7')
    )
    with pytest.raises(ValueError, match="pads with 0, but the text tower takes 7"):
        built(config)


def test_another_grid_is_interpolated_as_open_clip_does(tmp_path: Path) -> None:
    theirs = random_clip(CustomTextCLIP, clip_config())
    path = write(theirs.state_dict(), tmp_path / "clip", "safetensors")
    config = ModelConfig(clip_config=clip_config(), init=str(path), image_size=96)
    larger = random_clip(CustomTextCLIP, clip_config(vision_cfg=VIT | {"image_size": 96}))
    state = theirs.state_dict()
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    assert_same_features(built(config), larger, size=96)


@pytest.mark.parametrize("context_length", [10, 30])
def test_texts_that_fit_another_context_keep_their_features(
    tmp_path: Path, context_length: int
) -> None:
    theirs = random_clip(CustomTextCLIP, clip_config())
    path = write(theirs.state_dict(), tmp_path / "clip", "safetensors")
    config = ModelConfig(clip_config=clip_config(), init=str(path), context_length=context_length)
    cloc, tokenizer = built(config).eval(), load_tokenizer(resolve_model(config))
    with torch.no_grad():
        actual = cloc.encode_text(tokenizer(["a red crab", "two boats, left"]))
        # another length of padding: another kernel, another order of sums
        torch.testing.assert_close(actual, theirs.encode_text(IDS))
        assert cloc.encode_text(tokenizer(["boat " * 40])).isfinite().all()


def saved_model(directory: Path, **prompter: Any) -> Cloc:
    cloc = tiny_cloc(seed=5, **prompter)
    with torch.no_grad():
        cloc.logit_scale.fill_(3.0)
    save_cloc(cloc, directory, tiny_config(**prompter), load_text_tokenizer("builtin", 24))
    return cloc


def test_cloc_continues_a_plain_clip_of_ours(tmp_path: Path) -> None:
    clip = saved_model(tmp_path / "clip", kind="none")
    config = ModelConfig(init=str(tmp_path / "clip"), prompter=PrompterConfig())
    cloc = built(config)
    state = cloc.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in clip.state_dict().items())
    assert state.keys() - clip.state_dict().keys() >= {"region_logit_scale"}
    tokenizer = load_tokenizer(resolve_model(config))
    assert tokenizer(["a crab"]).tolist() == load_text_tokenizer("builtin")(["a crab"]).tolist()
    save_cloc(cloc, tmp_path / "cloc", resolve_model(config), tokenizer)  # stands on its own
    (tmp_path / "clip" / "model.safetensors").unlink()
    loaded = load_cloc(tmp_path / "cloc")[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_config_that_also_names_the_towers_takes_the_tokenizer_s_size(tmp_path: Path) -> None:
    """As when `--model.init` is added to a config that trained the CLIP from scratch."""
    clip = saved_model(tmp_path, kind="none")
    cloc = built(dataclasses.replace(tiny_config(), init=str(tmp_path)))
    assert torch.equal(cloc.text.text.token_embedding.weight, clip.text.text.token_embedding.weight)


def test_the_same_prompter_is_continued_too(tmp_path: Path) -> None:
    before = saved_model(tmp_path / "cloc").state_dict()
    same = built(ModelConfig(init=str(tmp_path / "cloc"))).state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in before.items())
    torch.manual_seed(6)
    config = ModelConfig(init=str(tmp_path / "cloc"), prompter=PrompterConfig(width=16))
    other = built(config)
    assert other.vision.region_encoder.prompter.key.weight.shape == (16, 16)
    assert torch.equal(other.logit_scale, before["logit_scale"])


def test_region_parts_go_on_under_other_settings_of_the_prompter(tmp_path: Path) -> None:
    """As the shipped CLOC does with the default text prior."""
    before = saved_model(tmp_path, text_prior="region").state_dict()
    torch.manual_seed(6)
    after = built(ModelConfig(init=str(tmp_path))).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_was_loaded_and_what_is_new_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = saved_model(tmp_path)
    other = PrompterConfig(width=16, spatial_prior="box", free_form=True)
    cloc = built(ModelConfig(init=str(tmp_path), prompter=other))
    said = capsys.readouterr().out
    rows = {line.rsplit(maxsplit=3)[0]: line.split()[-3:] for line in said.splitlines()[1:5]}
    names = [name for name in cloc.state_dict() if name.startswith("vision.region_encoder.")]
    shapes = {name: tensor.shape for name, tensor in saved.state_dict().items()}
    fits = [name for name in names if shapes.get(name) == cloc.state_dict()[name].shape]
    num_left_out = sum(name.startswith("vision.region_encoder.") for name in shapes) - len(fits)
    expected = [str(n) for n in (len(fits), len(names) - len(fits), num_left_out)]
    assert rows["vision.region_encoder"] == expected
    assert rows["temperatures"] == ["2", "0", "0"] and rows["text"][1:] == ["0", "0"]
    assert "new: vision.region_encoder.prompter.adapt.0.weight, " in said
    wrong_shape = "vision.region_encoder.prompter.corners.weight [64, 32] instead of [32, 16]"
    assert wrong_shape in said.splitlines()[-1]
    for name in fits:
        assert torch.equal(cloc.state_dict()[name], saved.state_dict()[name]), name
    monkeypatch.setenv("RANK", "1")
    built(ModelConfig(init=str(tmp_path)))
    assert capsys.readouterr().out == ""


def test_an_exported_file_brings_its_region_parts(tmp_path: Path) -> None:
    before = saved_model(tmp_path / "cloc").state_dict()
    export_safetensors(tmp_path / "cloc", tmp_path / "out")
    towers = dataclasses.replace(tiny_config(), init=str(tmp_path / "out" / "cloc.safetensors"))
    torch.manual_seed(6)
    after = built(towers).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_cannot_be_a_start_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    state = random_clip(CustomTextCLIP, clip_config()).state_dict()
    path = write(state, tmp_path / "clip", "safetensors")

    def build(init: Path | str, **changes: Any) -> Cloc:
        contents = changes.pop("clip_config", clip_config())
        return built(ModelConfig(clip_config=contents, init=str(init), **changes))

    with pytest.raises(ValueError, match=r"'absent.pt'; expected an existing file \(.safetensors"):
        build("absent.pt")
    with pytest.raises(ValueError, match=r"tag of model.architecture 'ViT-B-32'.*openai"):
        built(ModelConfig(architecture="ViT-B-32", init="open-ai"))
    with pytest.raises(ValueError, match="use the architecture ViT-B-32-quickgelu"):
        built(ModelConfig(architecture="ViT-B-32", init="openai"))
    with pytest.raises(ValueError, match=r"missing, first visual.transformer.resblocks.2"):
        build(path, clip_config=clip_config(vision_cfg=VIT | {"layers": 3}))
    with pytest.raises(ValueError, match=r"of another shape, first visual.*instead of"):
        build(path, clip_config=clip_config(vision_cfg=VIT | {"width": 48}))
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        build(tmp_path)
    with pytest.raises(ValueError, match=r"\d+ tokens, but the text tower embeds only 200"):
        small = clip_config(text_cfg=TEXT | {"vocab_size": 200})
        build(path, clip_config=small, tokenizer="builtin")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "archive.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Path("/")))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 9)
    for name in ("archive.pt", "pickle.pt", "empty.pt", "cut.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} holds no plain state dict \(.*\); expected"):
            build(tmp_path / name)


def test_a_siglip_brings_its_temperature_and_bias(tmp_path: Path) -> None:
    config = clip_config()
    theirs = random_clip(CustomTextCLIP, config | {"init_logit_bias": -7.0})
    path = write(theirs.state_dict(), tmp_path / "siglip", "state dict")
    start = ModelConfig(clip_config=config, tokenizer="open_clip:ViT-B-32", init=str(path))
    cloc = built(dataclasses.replace(start, contrastive_loss="sigmoid"))
    assert cloc.logit_bias is not None and cloc.logit_bias.item() == -7.0
    assert cloc.logit_scale.item() == theirs.logit_scale.item()
    assert built(start).logit_bias is None  # the softmax loss has none


def test_a_plain_clip_of_the_sigmoid_loss_goes_on_with_its_bias(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tiny_cloc(5, "sigmoid", kind="none")
    with torch.no_grad():
        clip.logit_bias.fill_(-6.0)
    config = tiny_config("sigmoid", kind="none")
    save_cloc(clip, tmp_path, config, load_text_tokenizer("builtin", 24))
    start = ModelConfig(init=str(tmp_path), contrastive_loss="sigmoid")
    cloc = built(start)
    assert (cloc.logit_bias.item(), cloc.region_logit_bias.item()) == (-6.0, -10.0)
    assert "left out: " not in capsys.readouterr().out
    assert built(ModelConfig(init=str(tmp_path))).logit_bias.item() == -6.0  # as it was trained
    assert built(dataclasses.replace(start, contrastive_loss="softmax")).logit_bias is None
    assert capsys.readouterr().out.endswith("left out: logit_bias\n")


def test_the_same_prompter_under_another_loss_starts_its_temperature_anew(tmp_path: Path) -> None:
    saved = saved_model(tmp_path)
    cloc = built(ModelConfig(init=str(tmp_path), contrastive_loss="sigmoid"))
    fresh = tiny_cloc(0, "sigmoid")
    assert cloc.region_logit_scale.item() == fresh.region_logit_scale.item()
    assert torch.equal(
        cloc.vision.region_encoder.prompter.key.weight,
        saved.vision.region_encoder.prompter.key.weight,
    )
