"""Weights to start from (`model.init`, `pretrained_image`, `pretrained_text`).

Names of the towers are open_clip's: `visual.*`, `text.*` (or the old ones, without `text.`),
`logit_scale`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cloc_mllm.config import ModelConfig
from cloc_mllm.earlier import by_current_name
from cloc_mllm.models.clip_config import read_cloc_config
from cloc_mllm.models.int8_tables import unpack
from cloc_mllm.models.starts import foreign_state, interpolated, is_foreign, start_directory

WEIGHTS_FILE = "model.safetensors"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_TOWERS = {"vision.encoder.visual.": "visual.", "text.text.": "text."}  # ours to open_clip's
# region parts: ours to the file's of `cloc-mllm export --to safetensors`, the longer prefix first
EXPORTED = {"region_logit_": "region.logit_", "vision.region_encoder.": "region."}
_TEMPERATURE = ("logit_scale", "logit_bias")
_NUM_SHOWN = 3  # names in the report
# Entries of checkpoints that are no weights: OpenAI's sizes, a buffer of old BERTs.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids")


def find_init(config: ModelConfig) -> Path | None:
    """Finds the directory or file to start from, and downloads an open_clip tag's if need be.

    Raises:
        ValueError: `init` names nothing that exists; the message says what was expected.
    """
    from open_clip.pretrained import (
        download_pretrained,
        get_pretrained_cfg,
        list_pretrained_tags_by_model,
    )

    if not config.init or (directory := start_directory(config.init)) is not None:
        return directory if config.init else None
    tag = get_pretrained_cfg(config.architecture, config.init) if config.architecture else {}
    if not tag:
        path = Path(config.init)
        if path.is_file() and path.suffix in _SUFFIXES:
            return path
        known = list_pretrained_tags_by_model(config.architecture) if config.architecture else []
        raise ValueError(
            f"model.init is {config.init!r}; expected an existing file ({', '.join(_SUFFIXES)}), "
            "the directory of a stage-1, open_clip or Hugging Face model, or a tag of "
            "model.architecture"
            f" {config.architecture!r}: {', '.join(known) or 'it has none'}"
        )
    if bool(tag.get("quick_gelu")) != _is_quick_gelu(config):
        raise ValueError(
            f"{config.init} of {config.architecture} was trained with the other GELU; "
            f"use the architecture {_other_gelu(config.architecture)}"
        )
    return Path(download_pretrained(tag))


def load_init(clip: Any, source: Path, image_size: int) -> tuple[dict[str, Tensor], list[str]]:
    """Loads both towers and the temperature of `clip`, which is like open_clip's CustomTextCLIP.

    Position embeddings of another grid are interpolated as open_clip does. For a shorter context
    they are cut; for a longer one the last is repeated, so that texts that fitted keep their
    features. An image model alone leaves the text side and the projection as they are.

    Returns:
        the region parts and all temperatures of the source, by their names in `Cloc`, and the names
        of what the source has nothing for.

    Raises:
        ValueError: the source cannot be read or does not fit; the message says what was expected.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

    parts: dict[str, Tensor] = {}
    if is_foreign(source):
        state = convert_to_custom_text_state_dict(foreign_state(source, image_size))
    elif source.is_dir():
        weights = read_weights(source)
        state = _towers_of(weights)
        parts = {k: v for k, v in weights.items() if not k.startswith(tuple(_TOWERS))}
        set_timm_size(clip.visual, read_cloc_config(source).image_size)
    else:
        weights = read_state(source)
        parts = _exported_region_parts(weights)
        weights = {k: v for k, v in weights.items() if not k.startswith("region.")}
        state = convert_to_custom_text_state_dict(convert_state_dict(clip, weights))
    resize_pos_embed(state, clip)
    _fit_attention_pool(state, clip.visual)
    _fit_context(state, clip.text)
    if "logit_bias" in state:  # from the sigmoid loss; open_clip's model is built without one
        clip.logit_bias = nn.Parameter(torch.zeros(()))
    for name in state.keys() & set(_TEMPERATURE):
        state[name], parts[name] = state[name].reshape(()), state[name].reshape(1)
    fresh = _lacking_of_image_model(clip, state)
    _load_whole(clip, state, str(source), fresh)
    return parts, [_our_name(name) for name in fresh]


class InitReport(NamedTuple):
    """Names of the tensors that a CLOC took from `model.init` or did not.

    Attributes:
        loaded, new: together all tensors of the CLOC.
        left_out: tensors of `init` that it has no use for, with both shapes if they differ.
    """

    loaded: list[str]
    new: list[str]
    left_out: list[str]

    def table(self, source: str) -> str:
        """Formats the counts per part of the model, and the first names of what is new and left
        out."""
        parts = dict.fromkeys(_part_of(name) for names in self for name in names)
        width = max(map(len, (source, *parts)))
        lines = [f"{source:<{width}}  loaded   new  left out"]
        for part in parts:
            counts = [sum(_part_of(name) == part for name in names) for names in self]
            lines.append(f"{part:<{width}}  {counts[0]:6} {counts[1]:5} {counts[2]:9}")
        for title, names in (("new", self.new), ("left out", self.left_out)):
            if names:
                more = ", ..." if len(names) > _NUM_SHOWN else ""
                lines.append(f"{title}: {', '.join(names[:_NUM_SHOWN])}{more}")
        return "\n".join(lines)


def load_parts(cloc: nn.Module, parts: dict[str, Tensor], fresh: Sequence[str] = ()) -> InitReport:
    """Loads those of `load_init`'s parts that `cloc` has by the same name, in the same shape.

    `fresh` names the weights of the towers that `load_init` found nothing for.
    A temperature is left out if it was learnt without a bias (softmax loss) but has one here
    (sigmoid loss), where it means something else.
    """
    wanted = cloc.state_dict()

    def fits(name: str) -> bool:
        if name not in wanted or wanted[name].shape != parts[name].shape:
            return False
        bias = name.replace("logit_scale", "logit_bias")
        return not name.endswith("logit_scale") or bias in parts or bias not in wanted

    fitting = {name: tensor for name, tensor in parts.items() if fits(name)}
    cloc.load_state_dict(fitting, strict=False)
    towers = {name for name in wanted if name.startswith(tuple(_TOWERS))} - {*fresh}
    loaded = [name for name in wanted if name in fitting or name in towers]
    left_out = [
        f"{name} {list(tensor.shape)} instead of {list(wanted[name].shape)}"
        if name in wanted and wanted[name].shape != tensor.shape
        else name
        for name, tensor in parts.items()
        if name not in fitting
    ]
    return InitReport(loaded, [name for name in wanted if name not in set(loaded)], left_out)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Reads all tensors of a stage-1 model directory by their name in `Cloc`, in the file's types;
    tables stored in int8 (`int8_tables`) are float32."""
    path = directory / WEIGHTS_FILE
    return by_current_name(unpack(load_file(path), path))


def load_tower(tower: nn.Module, path: str) -> None:
    """Loads a safetensors state dict into a tower; a classifier head in the file is left out.

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


def read_state(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a state dict or an open_clip training checkpoint without running code
    in it."""
    try:
        if path.suffix == ".safetensors":
            contents: Any = load_file(path)
        else:
            contents = torch.load(path, map_location="cpu", weights_only=True)
    # a TorchScript archive is a program, and a pickle may hold one
    except (RuntimeError, UnpicklingError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"{path} holds no plain state dict ({str(error).partition(chr(10))[0]}); expected what "
            "torch.save(model.state_dict(), path) or safetensors writes, or a checkpoint of "
            "open_clip's training"
        ) from error
    state = contents.get("state_dict", contents) if isinstance(contents, dict) else {}
    return {
        name.removeprefix("module."): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _towers_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Towers and temperature of a `Cloc`, by open_clip's names."""
    state = {}
    for name, tensor in weights.items():
        prefix = next((ours for ours in _TOWERS if name.startswith(ours)), None)
        if prefix is not None:
            state[_TOWERS[prefix] + name.removeprefix(prefix)] = tensor
        elif name in _TEMPERATURE:
            state[name] = tensor
    return state


def _exported_region_parts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Region parts of a file that `cloc-mllm export` wrote, by their names in `Cloc`."""
    parts = {}
    for name, tensor in by_current_name(weights).items():
        ours = next((ours for ours, theirs in EXPORTED.items() if name.startswith(theirs)), None)
        if ours is not None:
            parts[ours + name.removeprefix(EXPORTED[ours])] = tensor
    return parts


def _part_of(name: str) -> str:
    parts = ("vision.encoder", "vision.region_encoder", "text")
    return next((part for part in parts if name.startswith(f"{part}.")), "temperatures")


def _fit_attention_pool(state: dict[str, Tensor], visual: Any) -> None:
    """Interpolates the positions of a ResNet's attention pooling, which open_clip does not."""
    name = "visual.attnpool.positional_embedding"
    if name in state and hasattr(visual, "attnpool"):
        side = round((len(visual.attnpool.positional_embedding) - 1) ** 0.5)
        pooling, grid = state[name].split([1, len(state[name]) - 1])
        state[name] = torch.cat([pooling, interpolated(grid, side)])


def _fit_context(state: dict[str, Tensor], text: Any) -> None:
    name = "text.positional_embedding"
    saved, wanted = state.get(name), getattr(text, "positional_embedding", None)
    if saved is not None and wanted is not None:
        longer = len(wanted) - len(saved)
        repeated = saved[-1:].expand(max(0, longer), -1)
        state[name] = torch.cat([saved, repeated])[: len(wanted)]


def _lacking_of_image_model(clip: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """The weights of `clip` that an image model alone has nothing for; [] for a pair of towers."""
    if any(name.startswith("text.") for name in state):
        return []
    others = ("text.", "visual.projection.", *_TEMPERATURE)
    return [name for name in clip.state_dict() if name.startswith(others) and name not in state]


def _our_name(name: str) -> str:
    """The name in `Cloc` of a weight of open_clip's towers."""
    prefix = next((ours for ours, theirs in _TOWERS.items() if name.startswith(theirs)), None)
    return name if prefix is None else prefix + name.removeprefix(_TOWERS[prefix])


def _load_whole(
    module: nn.Module, state: dict[str, Tensor], source: str, fresh: Sequence[str] = ()
) -> None:
    """Loads every weight of `module` from `state`, but for `fresh`.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; the message names the first.
    """
    wanted = module.state_dict()
    unneeded = ("num_batches_tracked", *_NO_WEIGHTS)
    missing = [k for k in wanted if k not in {*state, *fresh} and not k.endswith(unneeded)]
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
