"""Weights to start from (`model.init`, `pretrained_image`, `pretrained_text`).

Names are open_clip's: `visual.*`, `text.*` (or the old ones, without `text.`), `logit_scale`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cloc_mllm.config import ModelConfig
from cloc_mllm.data.transforms import PIXEL_MEAN, PIXEL_STD
from cloc_mllm.earlier import by_current_name
from cloc_mllm.models.clip_config import read_cloc_config

WEIGHTS_FILE = "model.safetensors"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_TOWERS = {"vision.encoder.visual.": "visual.", "text.text.": "text."}  # ours to open_clip's
# In checkpoints, but no weights: OpenAI's sizes, a buffer of old BERTs.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids")


def find_init(config: ModelConfig) -> Path | None:
    """The directory or file to start from, an open_clip tag's downloaded if need be.

    Raises:
        ValueError: there is no such thing; the message says what was expected.
    """
    from open_clip.pretrained import (
        download_pretrained,
        get_pretrained_cfg,
        list_pretrained_tags_by_model,
    )

    if not config.init or Path(config.init).is_dir():
        return Path(config.init) if config.init else None
    tag = get_pretrained_cfg(config.architecture, config.init) if config.architecture else {}
    if not tag:
        path = Path(config.init)
        if path.is_file() and path.suffix in _SUFFIXES:
            return path
        known = list_pretrained_tags_by_model(config.architecture) if config.architecture else []
        raise ValueError(
            f"model.init is {config.init!r}; expected an existing file ({', '.join(_SUFFIXES)}), "
            "the directory of a stage-1 model, or a tag of model.architecture"
            f" {config.architecture!r}: {', '.join(known) or 'it has none'}"
        )
    if bool(tag.get("quick_gelu")) != _is_quick_gelu(config):
        raise ValueError(
            f"{config.init} of {config.architecture} was trained with the other GELU; "
            f"use the architecture {_other_gelu(config.architecture)}"
        )
    pixels = (tuple(tag.get("mean") or PIXEL_MEAN), tuple(tag.get("std") or PIXEL_STD))
    if pixels != (PIXEL_MEAN, PIXEL_STD):
        warnings.warn(
            f"{config.init} of {config.architecture} was trained on pixels of mean, std "
            f"{pixels}; here they have OpenAI's, to which training has to adapt it",
            stacklevel=2,
        )
    return Path(download_pretrained(tag))


def load_init(clip: Any, source: Path) -> None:
    """Loads both towers and the temperature of `clip`, open_clip's CustomTextCLIP.

    Position embeddings of another grid are interpolated as open_clip does. Those of a shorter
    context are cut; a longer one repeats the last, so that texts that fitted keep their features.

    Raises:
        ValueError: the source cannot be read or does not fit; the message says what was expected.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

    if source.is_dir():
        state = _towers_of(source)
        set_timm_size(clip.visual, read_cloc_config(source).image_size)
    else:
        state = convert_state_dict(clip, _read_state(source))
        state = convert_to_custom_text_state_dict(state)
        state = {k: v for k, v in state.items() if not k.startswith("region.")}  # of our export
    resize_pos_embed(state, clip)
    _fit_context(state, clip.text)
    if "logit_bias" in state:  # of the sigmoid loss; open_clip's model is built without one
        clip.logit_bias = nn.Parameter(torch.zeros(()))
    for name in state.keys() & {"logit_scale", "logit_bias"}:
        state[name] = state[name].reshape(())
    _load_whole(clip, state, str(source))


def load_region_parts(cloc: nn.Module, config: ModelConfig) -> None:
    """Loads what CLOC adds to CLIP, if `init` is a model directory with the same `prompter`."""
    directory = Path(config.init or "missing")
    start = read_cloc_config(directory) if directory.is_dir() else None
    if start is None or start.prompter != config.prompter:
        return
    left_out = (*_TOWERS, "logit_")
    if start.contrastive_loss != config.contrastive_loss:  # its temperature says nothing here
        left_out = (*left_out, "region_logit_")
    state = read_weights(directory)
    parts = {k: v for k, v in state.items() if not k.startswith(left_out)}
    cloc.load_state_dict(parts, strict=False)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a stage-1 model directory by their name in `Cloc`, as the file holds them."""
    return by_current_name(load_file(directory / WEIGHTS_FILE))


def load_tower(tower: nn.Module, path: str) -> None:
    """Load a safetensors state dict into a tower; classifier heads it lacks are left out.

    Raises:
        ValueError: a weight of the tower is missing from the file or has another shape.
    """
    wanted = tower.state_dict().keys()
    _load_whole(tower, {k: v for k, v in load_file(path).items() if k in wanted}, path)


def set_timm_size(visual: Any, image_size: int) -> None:
    """Gives a timm tower with position embeddings another image size, interpolating them."""
    trunk = getattr(visual, "trunk", None)
    if hasattr(trunk, "set_input_size"):
        visual.set_input_size(image_size)


def _is_quick_gelu(config: ModelConfig) -> bool:
    import open_clip

    return bool((open_clip.get_model_config(config.architecture) or {}).get("quick_gelu"))


def _other_gelu(architecture: str) -> str:
    quick = "-quickgelu"
    return architecture.removesuffix(quick) if quick in architecture else architecture + quick


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a state dict or of an open_clip training checkpoint; no code in it runs."""
    if path.suffix == ".safetensors":
        contents: Any = load_file(path)
    else:
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
        except RuntimeError as error:  # a TorchScript archive is a program
            raise ValueError(
                f"{path} holds no plain state dict ({str(error).splitlines()[0]}); expected what "
                "torch.save(model.state_dict(), path) writes, or a checkpoint of open_clip's "
                "training"
            ) from error
    state = contents.get("state_dict", contents) if isinstance(contents, dict) else {}
    return {
        name.removeprefix("module."): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _towers_of(directory: Path) -> dict[str, Tensor]:
    state = {}
    for name, tensor in read_weights(directory).items():
        prefix = next((ours for ours in _TOWERS if name.startswith(ours)), None)
        if prefix is not None:
            state[_TOWERS[prefix] + name.removeprefix(prefix)] = tensor
        elif name in ("logit_scale", "logit_bias"):
            state[name] = tensor
    return state


def _fit_context(state: dict[str, Tensor], text: Any) -> None:
    name = "text.positional_embedding"
    saved, wanted = state.get(name), getattr(text, "positional_embedding", None)
    if saved is not None and wanted is not None:
        longer = len(wanted) - len(saved)
        repeated = saved[-1:].expand(max(0, longer), -1)
        state[name] = torch.cat([saved, repeated])[: len(wanted)]


def _load_whole(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Every weight of `module` from `state`, or an error that names what does not fit."""
    wanted = module.state_dict()
    unneeded = ("num_batches_tracked", *_NO_WEIGHTS)
    missing = [k for k in wanted if k not in state and not k.endswith(unneeded)]
    unknown = [k for k in state if k not in wanted and not k.endswith(unneeded)]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    wrong = {"missing": missing, "of another shape": shapes, "unknown": unknown}
    if any(wrong.values()):
        parts = [f"{len(v)} {what}, first {v[0]}" for what, v in wrong.items() if v]
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(parts)}. Expected the "
            "weights of the architecture that the model config names, by open_clip's names"
        )
    module.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)
