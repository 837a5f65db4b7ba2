"""Builds a CLOC from its config, and writes and reads its directory.

A model directory holds `config.json` (ModelConfig and preprocessing fingerprint),
`model.safetensors`, and the files of the tokenizer and of a Hugging Face text tower.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cloc_mllm.config import PrompterConfig
from cloc_mllm.data.tokenizer import TextTokenizer, load_text_tokenizer
from cloc_mllm.data.transforms import preprocessing_fingerprint
from cloc_mllm.distributed import launched_rank
from cloc_mllm.models.box_head import BoxHead
from cloc_mllm.models.clip_config import (
    CONFIG_FILE,
    ResolvedModel,
    check_timm_name,
    full_clip_config,
    read_cloc_config,
    reads_padding,
)
from cloc_mllm.models.cloc import Cloc, ClocVision
from cloc_mllm.models.initialize import (
    WEIGHTS_FILE,
    find_init,
    load_init,
    load_parts,
    load_tower,
    read_weights,
    set_timm_size,
)
from cloc_mllm.models.region_encoders import RegionEncoder
from cloc_mllm.models.region_encoders.clip_tokens import ClipTokenEncoder
from cloc_mllm.models.region_encoders.prompter import Prompter, PrompterEncoder
from cloc_mllm.models.region_encoders.roi_align import RoIAlignEncoder
from cloc_mllm.models.text_encoder import TextEncoder
from cloc_mllm.models.vision_encoder import VisionEncoder


def build_cloc(config: ResolvedModel, tokenizer: TextTokenizer | None = None) -> Cloc:
    """Builds a CLOC over open_clip towers, with the weights of `config.init` if it names any.

    `tokenizer` is the config's own unless it is given.

    Raises:
        ValueError: `init` or the tokenizer does not fit the towers.
    """
    tokenizer = tokenizer or load_tokenizer(config)
    clip, parts = _build_clip(config, tokenizer)
    embed_dim = int(full_clip_config(config)["embed_dim"])
    encoder = VisionEncoder(clip.visual, config.image_size, embed_dim)
    vision = ClocVision(encoder, _build_region_encoder(encoder, config.prompter))
    cloc = Cloc(vision, TextEncoder(clip.text), config.contrastive_loss)
    if cloc.logit_bias is None:  # open_clip's config may say where the scale starts
        cloc.logit_scale.data.copy_(clip.logit_scale.reshape(1))
    if config.init:
        report = load_parts(cloc, parts)
        if launched_rank() == 0:
            print(report.table(f"model.init {config.init}"), flush=True)
    return cloc


def load_tokenizer(config: ResolvedModel) -> TextTokenizer:
    """Loads the tokenizer of a model, which pads as the text tower needs it."""
    padded = reads_padding(full_clip_config(config)["text_cfg"])
    return load_text_tokenizer(config.tokenizer, config.context_length, full_length=padded)


def build_cloc_vision(config: ResolvedModel) -> ClocVision:
    """Builds the image side alone, with random weights, for instance inside an MLLM."""
    import open_clip.model

    clip_config = full_clip_config(config)
    check_timm_name(clip_config["vision_cfg"], "the vision encoder's config")
    clip_config["vision_cfg"]["timm_model_pretrained"] = False  # weights come from the MLLM's file
    visual = open_clip.model._build_vision_tower(
        clip_config["embed_dim"], clip_config["vision_cfg"], clip_config.get("quick_gelu", False)
    )
    set_timm_size(visual, config.image_size)
    encoder = VisionEncoder(visual, config.image_size, clip_config["embed_dim"])
    return ClocVision(encoder, _build_region_encoder(encoder, config.prompter))


def save_cloc(
    model: Cloc,
    directory: str | Path,
    config: ResolvedModel,
    tokenizer: TextTokenizer,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a model directory that `load_cloc` reads without the original tower files."""
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
        "fingerprint": preprocessing_fingerprint(config.image_size, tokenizer),
    }
    (directory / CONFIG_FILE).write_text(json.dumps(contents, indent=2) + "\n")
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    save_file({k: v.contiguous() for k, v in state.items()}, directory / WEIGHTS_FILE)


def load_cloc(
    directory: str | Path, device: torch.device | str = "cpu"
) -> tuple[Cloc, TextTokenizer, ResolvedModel]:
    """Reads a model directory, in float32 and eval mode.

    Raises:
        ValueError: the directory was written with another preprocessing than this version does.
    """
    config = read_cloc_config(directory)
    tokenizer = load_tokenizer(config)
    contents = json.loads((Path(directory) / CONFIG_FILE).read_text())
    check_fingerprint(
        contents["fingerprint"], preprocessing_fingerprint(config.image_size, tokenizer), directory
    )
    model = build_cloc(config, tokenizer)
    state = read_weights(Path(directory))
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
        encoder.token_dim,
        encoder.embed_dim,
        config.width or encoder.token_dim,
        readout=config.readout,
        spatial_prior=config.spatial_prior,
        text_prior=config.text_prior,
        free_form=config.free_form,
    )
    return PrompterEncoder(prompter, BoxHead(encoder.embed_dim))


def _build_clip(config: ResolvedModel, tokenizer: TextTokenizer) -> tuple[Any, dict[str, Tensor]]:
    """Builds open_clip's CustomTextCLIP, so that both kinds of text tower sit at `.text`.

    Returns:
        the model with the weights of `init`, and the other parts of `init` (see `load_init`).
    """
    from open_clip.model import CustomTextCLIP

    source = find_init(config)
    clip_config = full_clip_config(config, tokenizer)
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}
    model: Any = CustomTextCLIP(**{k: v for k, v in clip_config.items() if k in known})
    _check_tokenizer(model.text, clip_config["text_cfg"], tokenizer)
    parts = {} if source is None else load_init(model, source)
    if config.pretrained_image:
        load_tower(getattr(model.visual, "trunk", model.visual), config.pretrained_image)
    if config.pretrained_text:
        load_tower(model.text.transformer, config.pretrained_text)
    set_timm_size(model.visual, config.image_size)
    return model, parts


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
