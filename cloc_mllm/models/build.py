"""Builds a CLOC from its config, and writes and reads its directory.

A model directory holds `config.json` (ModelConfig and preprocessing fingerprint),
`model.safetensors`, and the files of the tokenizer and of a Hugging Face text tower.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cloc_mllm.config import PrompterConfig
from cloc_mllm.data.tokenizer import TextTokenizer, load_text_tokenizer
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.distributed import launched_rank
from cloc_mllm.models.box_head import BoxHead
from cloc_mllm.models.box_refiner import BoxRefiner
from cloc_mllm.models.clip_config import (
    CONFIG_FILE,
    ResolvedModel,
    check_timm_name,
    full_clip_config,
    read_cloc_config,
    reads_padding,
)
from cloc_mllm.models.cloc import Cloc, ClocVision
from cloc_mllm.models.hf_towers import HfTextTower, HfVisionTower
from cloc_mllm.models.initialize import (
    WEIGHTS_FILE,
    find_init,
    load_init,
    load_parts,
    load_tower,
    read_weights,
    set_timm_size,
)
from cloc_mllm.models.int8_tables import large_tables, pack
from cloc_mllm.models.region_encoders import RegionEncoder
from cloc_mllm.models.region_encoders.clip_tokens import ClipTokenEncoder
from cloc_mllm.models.region_encoders.prompter import Prompter, PrompterEncoder
from cloc_mllm.models.region_encoders.roi_align import RoIAlignEncoder
from cloc_mllm.models.text_encoder import TextEncoder
from cloc_mllm.models.vision_encoder import VisionEncoder
from cloc_mllm.shipped import find_model


def build_cloc(config: ResolvedModel, tokenizer: TextTokenizer | None = None) -> Cloc:
    """Builds a CLOC over open_clip towers, with the weights of `config.init` if it names any.

    `tokenizer` is the config's own unless it is given.

    Raises:
        ValueError: `init` or the tokenizer does not fit the towers.
    """
    tokenizer = tokenizer or load_tokenizer(config)
    clip, parts, fresh = _build_clip(config, tokenizer)
    cloc = _add_regions(clip, config)
    if config.init:
        report = load_parts(cloc, parts, fresh)
        if launched_rank() == 0:
            print(report.table(f"model.init {config.init}"), flush=True)
    return cloc


def build_cloc_shapes(config: ResolvedModel, tokenizer: TextTokenizer) -> Cloc:
    """Builds a CLOC on the meta device: parameters have shapes and no memory, and no weights are
    read or downloaded, whatever `config.init` names."""
    clip_config = full_clip_config(config, tokenizer)
    clip_config["vision_cfg"]["timm_model_pretrained"] = False
    clip_config["text_cfg"]["hf_model_pretrained"] = False
    with torch.device("meta"):
        clip = _Towers(clip_config)
        set_timm_size(clip.visual, config.image_size)
        cloc = _add_regions(clip, config)
    _check_tokenizer(clip.text, clip_config["text_cfg"], tokenizer)
    return cloc


def _add_regions(clip: Any, config: ResolvedModel) -> Cloc:
    """Wraps both towers of open_clip's model and adds the region encoder."""
    embed_dim = int(full_clip_config(config)["embed_dim"])
    preprocessing = Preprocessing.of(config)
    encoder = VisionEncoder(clip.visual, preprocessing, embed_dim, config.token_strides)
    vision = ClocVision(encoder, _build_region_encoder(encoder, config.prompter))
    loss: Literal["softmax", "sigmoid"] = "softmax"
    if config.contrastive_loss == "sigmoid":
        loss = "sigmoid"
    cloc = Cloc(vision, TextEncoder(clip.text), loss)
    cloc.phrase_prior = config.phrase_prior or 0.0
    if cloc.logit_bias is None:  # open_clip's config may say where the scale starts
        cloc.logit_scale.data.copy_(clip.logit_scale.reshape(1))
    return cloc


def load_tokenizer(config: ResolvedModel) -> TextTokenizer:
    """Loads the tokenizer of a model, which cleans and pads texts as the text tower needs it."""
    text = full_clip_config(config)["text_cfg"]
    own: dict[str, Any] = {}
    if text.get("hf_tokenizer_name"):
        own = {"clean": "whitespace"} | text.get("tokenizer_kwargs", {})  # open_clip's default
    return load_text_tokenizer(
        config.tokenizer, config.context_length, full_length=reads_padding(text), **own
    )


def build_cloc_vision(config: ResolvedModel) -> ClocVision:
    """Builds the image side alone, with random weights, for instance inside an MLLM."""
    clip_config = full_clip_config(config)
    check_timm_name(clip_config["vision_cfg"], "the vision encoder's config")
    clip_config["vision_cfg"]["timm_model_pretrained"] = False  # weights come from the MLLM's file
    visual = _build_image_tower(clip_config)
    set_timm_size(visual, config.image_size)
    encoder = VisionEncoder(
        visual, Preprocessing.of(config), clip_config["embed_dim"], config.token_strides
    )
    return ClocVision(encoder, _build_region_encoder(encoder, config.prompter))


def save_cloc(
    model: Cloc,
    directory: str | Path,
    config: ResolvedModel,
    tokenizer: TextTokenizer,
    dtype: torch.dtype = torch.float32,
    *,
    pack_tables: bool = False,
) -> None:
    """Writes a model directory that `load_cloc` reads without the original tower files.

    Args:
        dtype: of all weights.
        pack_tables: stores large embedding tables in int8 instead (`int8_tables`).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    saved = dataclasses.replace(
        config,
        architecture="",
        init="",
        pretrained_image="",
        pretrained_text="",
        clip_config=_clip_config_to_save(model, config, tokenizer, directory),
        tokenizer=tokenizer.save(directory),
    )
    contents = {
        "model": dataclasses.asdict(saved),
        "fingerprint": Preprocessing.of(config).fingerprint(tokenizer),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(contents, indent=2) + "\n")
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    if pack_tables:
        state = pack(state, large_tables(model))
    save_file({k: v.contiguous() for k, v in state.items()}, directory / WEIGHTS_FILE)


def load_cloc(
    directory: str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[Cloc, TextTokenizer, ResolvedModel]:
    """Reads a model directory or a shipped model (see `find_model`), in float32 and eval mode.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: the directory was written with another preprocessing than this version does.
    """
    directory = find_model("cloc", directory)
    config = read_cloc_config(directory)
    tokenizer = load_tokenizer(config)
    contents = json.loads((directory / CONFIG_FILE).read_text())
    check_fingerprint(
        contents["fingerprint"], Preprocessing.of(config).fingerprint(tokenizer), directory
    )
    model = build_cloc(config, tokenizer)
    state = read_weights(directory)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.to(device).eval(), tokenizer, config


def check_fingerprint(expected: dict[str, Any], actual: dict[str, Any], source: object) -> None:
    """
    Raises:
        ValueError: two preprocessing fingerprints differ; it names every difference.
    """
    different = [
        f"{key}: {source} has {expected.get(key)!r}, now {actual.get(key)!r}"
        for key in sorted(expected.keys() | actual.keys())
        if expected.get(key) != actual.get(key)
    ]
    if different:
        raise ValueError("preprocessing differs from training; " + "; ".join(different))


def _build_region_encoder(encoder: VisionEncoder, config: PrompterConfig) -> RegionEncoder:
    if config.kind == "roi_align":
        return RoIAlignEncoder(encoder.token_dim, encoder.embed_dim)
    if config.kind == "none":
        return ClipTokenEncoder(encoder.project_tokens)
    prompter = Prompter(
        encoder.token_dims,
        encoder.embed_dim,
        config.width or encoder.token_dims[-1],
        readout=config.readout,
        spatial_prior=config.spatial_prior,
        text_prior=config.text_prior,
        free_form=config.free_form,
    )
    width = config.width or encoder.token_dims[-1]
    looks = config.box_looks
    refiner = BoxRefiner(width, encoder.embed_dim, looks) if looks else None
    return PrompterEncoder(prompter, BoxHead(encoder.embed_dim), refiner)


def _build_clip(
    config: ResolvedModel, tokenizer: TextTokenizer
) -> tuple[_Towers, dict[str, Tensor], list[str]]:
    """Builds the towers, with the weights of `init`.

    Returns:
        the towers, and what `load_init` returns of `init`.
    """
    source = find_init(config)
    clip_config = full_clip_config(config, tokenizer)
    model = _Towers(clip_config)
    _check_tokenizer(model.text, clip_config["text_cfg"], tokenizer)
    parts: dict[str, Tensor] = {}
    fresh: list[str] = []
    if source is not None:
        parts, fresh = load_init(model, source, config.image_size)
    if config.pretrained_image:
        load_tower(getattr(model.visual, "trunk", model.visual), config.pretrained_image)
    if config.pretrained_text:
        load_tower(model.text.transformer, config.pretrained_text)
    set_timm_size(model.visual, config.image_size)
    return model, parts, fresh


class _Towers(nn.Module):
    """Both towers and the temperature by the names of open_clip's CustomTextCLIP, which knows no
    towers of Transformers."""

    visual: Any
    text: Any

    def __init__(self, clip_config: dict[str, Any]) -> None:
        super().__init__()
        self.visual = _build_image_tower(clip_config)
        self.text = _build_text_tower(clip_config)
        scale = clip_config.get("init_logit_scale", math.log(1 / 0.07))
        self.logit_scale = nn.Parameter(torch.ones([]) * scale)
        self.logit_bias: nn.Parameter | None = None


def _build_image_tower(clip_config: dict[str, Any]) -> Any:
    import open_clip.model

    vision, embed_dim = clip_config["vision_cfg"], clip_config["embed_dim"]
    if "hf_config" in vision:
        return HfVisionTower(vision["hf_config"], vision["image_size"], embed_dim)
    return open_clip.model._build_vision_tower(
        embed_dim, vision, clip_config.get("quick_gelu", False)
    )


def _build_text_tower(clip_config: dict[str, Any]) -> Any:
    import open_clip.model

    text = clip_config["text_cfg"]
    if "hf_config" in text:
        return HfTextTower(text["hf_config"])
    return open_clip.model._build_text_tower(
        clip_config["embed_dim"], text, clip_config.get("quick_gelu", False)
    )


def _check_tokenizer(text: Any, text_cfg: dict[str, Any], tokenizer: TextTokenizer) -> None:
    """
    Raises:
        ValueError: an id has no embedding, or the tower takes another id for padding.
    """
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the text tower embeds only "
            f"{text.vocab_size}; use the tokenizer that the tower was trained with"
        )
    hf_config = getattr(text, "config", None)
    if hf_config is not None and tokenizer.pad_id != hf_config.pad_token_id:
        raise ValueError(
            f"the tokenizer pads with {tokenizer.pad_id}, but the text tower takes "
            f"{hf_config.pad_token_id} for padding; use the tokenizer that it was trained with"
        )
    if reads_padding(text_cfg) and tokenizer(["a"]).shape[1] != text.context_length:
        raise ValueError(
            "the features of this text tower depend on the padding, but the tokenizer does not pad "
            f"to {text.context_length} tokens; load it with load_tokenizer(config)"
        )


def _clip_config_to_save(
    model: Cloc, config: ResolvedModel, tokenizer: TextTokenizer, directory: Path
) -> dict[str, Any]:
    clip_config = full_clip_config(config, tokenizer)
    clip_config["vision_cfg"]["timm_model_pretrained"] = False
    text = clip_config["text_cfg"]
    if text.get("hf_model_name"):
        model.text.text.config.save_pretrained(directory / "text_tower")
        text |= {"hf_model_name": "text_tower", "hf_model_pretrained": False}
    return clip_config
