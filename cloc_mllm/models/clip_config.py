"""Completes open_clip's model config from CLOC's settings, `init` and the tokenizer."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NewType

from cloc_mllm.config import ModelConfig, PreprocessConfig
from cloc_mllm.data.tokenizer import TextTokenizer, end_token_id
from cloc_mllm.data.transforms import Preprocessing
from cloc_mllm.models.starts import as_preprocess, foreign_config, start_directory
from cloc_mllm.shipped import find_model

CONFIG_FILE = "config.json"
_DEFAULT_ARCHITECTURE = "ViT-B-16"  # all native text towers have its BPE

# A ModelConfig that leaves nothing to `architecture`, `clip_config` or `init`. `resolve_model` and
# `read_cloc_config` make one; whatever builds or saves a model takes one.
ResolvedModel = NewType("ResolvedModel", ModelConfig)


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Spells out every setting that was left to follow `architecture`, `clip_config` or `init`.

    Raises:
        ValueError: the architecture is unknown, or nothing names one.
        FileNotFoundError: `init` is a directory, but of no known layout.
    """
    config, start = _with_towers_of_start(config)
    base = _base(config)
    if "multimodal_cfg" in base or base["text_cfg"].get("embed_cls"):
        raise ValueError(
            f"{config.architecture or 'clip_config'} is a CoCa, which is no pair of towers; "
            "use a CLIP"
        )
    image_size = start.image_size if start else base["vision_cfg"].get("image_size", 224)
    context_length = start.context_length if start else base["text_cfg"].get("context_length", 77)
    tokenizer = start.tokenizer if start else _tokenizer_of(config, base["text_cfg"])
    own = start.preprocess if start else _preprocess_of_tower(config)
    loss = start.contrastive_loss if start else _loss_of(base)
    prior = start.phrase_prior if start else None
    if config.phrase_prior is not None:
        prior = config.phrase_prior
    if prior is not None and not 0 <= prior <= 1:
        raise ValueError(f"model.phrase_prior is {prior}; give a number from 0 to 1")
    if not (tokenizer or config.tokenizer):
        raise ValueError(
            f"model.init {config.init} brings no tokenizer; name it in model.tokenizer, for "
            "instance huggingface:DIR with its tokenizer files"
        )
    resolved = dataclasses.replace(
        config,
        image_size=config.image_size or image_size,
        token_strides=config.token_strides or (start.token_strides if start else []),
        context_length=config.context_length or context_length,
        tokenizer=config.tokenizer or tokenizer,
        contrastive_loss=loss if config.contrastive_loss == "auto" else config.contrastive_loss,
        phrase_prior=prior or 0.0,
        preprocess=_filled(config.preprocess, own),
    )
    whole = Preprocessing.of(resolved).config()
    return ResolvedModel(dataclasses.replace(resolved, preprocess=whole))


def _with_towers_of_start(config: ModelConfig) -> tuple[ModelConfig, ModelConfig | None]:
    """`config` with the towers of the directory that `init` names, and that directory's config.

    The towers of a stage-1 directory may be replaced by `architecture`; those of other layouts have
    their own classes.
    """
    directory = start_directory(config.init)
    if directory is None:
        return config, None
    foreign = foreign_config(directory, config.architecture)
    if foreign is not None:
        towers = dataclasses.replace(config, architecture="", clip_config=foreign.clip_config)
        return towers, foreign
    start = read_cloc_config(directory)
    if config.architecture or config.clip_config:
        return config, start
    return dataclasses.replace(config, clip_config=start.clip_config), start


def read_cloc_config(directory: str | Path) -> ResolvedModel:
    """Reads the config of a model directory or a shipped model, and makes its paths absolute.

    Raises:
        FileNotFoundError, ValueError: `directory` is not what `save_cloc` wrote.
    """
    directory = find_model("cloc", directory)
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} is no CLOC model directory ({CONFIG_FILE} is missing); expected what "
            "stage 1 writes to OUTPUT_DIR/model"
        )
    contents = json.loads(path.read_text())
    if "model" not in contents or "fingerprint" not in contents:
        raise ValueError(
            f"{path} was not written by save_cloc: 'model' or 'fingerprint' is missing"
        )
    config = ModelConfig.from_dict(contents["model"])
    _check_self_contained(config, path)
    if config.tokenizer == "tokenizer":
        config.tokenizer = str(directory / "tokenizer")
    text = config.clip_config.get("text_cfg", {})
    if text.get("hf_model_name") == "text_tower":
        text["hf_model_name"] = str(directory / "text_tower")
    return ResolvedModel(config)


def check_timm_name(vision_cfg: dict[str, Any], source: object) -> None:
    """Raises `ValueError` for a tower of timm that lies in a directory or on the model hub."""
    name = str(vision_cfg.get("timm_model_name") or "")
    if ":" in name or "/" in name:
        raise ValueError(
            f"{source}: vision_cfg.timm_model_name is {name!r}, but a saved model is loaded from "
            "its own directory alone; expected the plain name of an architecture"
        )


def full_clip_config(
    config: ResolvedModel, tokenizer: TextTokenizer | None = None
) -> dict[str, Any]:
    """open_clip's model config, with the text tower fitted to the tokenizer if one is given."""
    assert config.image_size, "the config was not resolved"
    base = copy.deepcopy(_base(config))
    vision, text = base["vision_cfg"], base["text_cfg"]
    vision["image_size"] = config.image_size
    if config.init:  # its weights replace all others
        vision["timm_model_pretrained"] = text["hf_model_pretrained"] = False
    if not text.get("hf_model_name") and "hf_config" not in text:
        text["context_length"] = config.context_length
        if tokenizer is not None:
            text |= _text_changes(text, tokenizer, _vocabulary(config, text, tokenizer))
    return base


def _check_self_contained(config: ModelConfig, path: Path) -> None:
    """Refuses a saved config that names other directories or the model hub.

    Raises:
        ValueError: names the field.
    """
    vision, text = (config.clip_config.get(name) or {} for name in ("vision_cfg", "text_cfg"))
    kind, _, name = config.tokenizer.partition(":")
    text_tower = text.get("hf_model_name") or ""
    is_own = config.tokenizer in ("tokenizer", "builtin") or (
        kind == "open_clip" and not set(":/") & set(name)
    )
    elsewhere = {
        "init": config.init,
        "architecture": config.architecture,
        "pretrained_image": config.pretrained_image,
        "pretrained_text": config.pretrained_text,
        "tokenizer": "" if is_own else config.tokenizer,
        "hf_model_name": "" if text_tower == "text_tower" else text_tower,
        "hf_model_pretrained": text_tower and text.get("hf_model_pretrained"),
        "timm_model_pretrained": vision.get("timm_model_pretrained"),
    }
    if named := [field for field, value in elsewhere.items() if value]:
        raise ValueError(
            f"{path}: {named[0]} is {elsewhere[named[0]]!r}, but a saved model is loaded from its "
            "own directory alone; expected what save_cloc writes"
        )
    check_timm_name(vision, path)
    tower = path.parent / text_tower / "config.json"
    if text_tower and "auto_map" in json.loads(tower.read_text()):
        raise ValueError(f"{tower} names code of its own (auto_map), which is never run")


def reads_padding(text_cfg: dict[str, Any]) -> bool:
    """Whether the features of a text tower depend on the padding, as those of SigLIP, CLIPA and
    MobileCLIP do. Every text must then be padded to the context length, as in its training."""
    if "hf_config" in text_cfg:
        return True
    native = not text_cfg.get("hf_model_name")
    causal = not text_cfg.get("no_causal_mask")
    return native and not (causal and text_cfg.get("pool_type") in (None, "argmax", "eos"))


def _base(config: ModelConfig) -> dict[str, Any]:
    import open_clip

    if config.clip_config:
        if lacking := {"embed_dim", "vision_cfg", "text_cfg"} - set(config.clip_config):
            raise ValueError(
                f"model.clip_config lacks {', '.join(sorted(lacking))}; expected all "
                "that a model's JSON file in open_clip holds"
            )
        return config.clip_config
    if not config.architecture:
        raise ValueError(
            "the model config needs `architecture` or `clip_config`, or `init` with the directory "
            "of a model"
        )
    base = open_clip.get_model_config(config.architecture)
    if base is None:
        raise ValueError(
            f"open_clip knows no architecture {config.architecture!r}; "
            "`python -c 'import open_clip; print(open_clip.list_models())'` lists them"
        )
    return dict(base)


def _tokenizer_of(config: ModelConfig, text_cfg: dict[str, Any]) -> str:
    named = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    if named and not config.architecture:
        return f"huggingface:{named}"
    return f"open_clip:{config.architecture or _DEFAULT_ARCHITECTURE}"


def _loss_of(clip_config: dict[str, Any]) -> Literal["softmax", "sigmoid"]:
    return "sigmoid" if "init_logit_bias" in clip_config else "softmax"


def _preprocess_of_tower(config: ModelConfig) -> PreprocessConfig:
    """The preprocessing that open_clip gives the weights `init` names, or, for weights of one's
    own, all weights of the architecture."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(config.architecture) if config.architecture else []
    tags = [config.init] if config.init in tags else tags
    known = [as_preprocess(get_pretrained_cfg(config.architecture, tag)) for tag in tags]
    return known[0] if known and all(of == known[0] for of in known) else PreprocessConfig()


def _vocabulary(config: ModelConfig, text_cfg: dict[str, Any], tokenizer: TextTokenizer) -> int:
    """How many tokens a native text tower embeds: as many as its weights, if there are any.

    A tokenizer may have fewer, also in a saved model. A named architecture without weights fits
    itself to the tokenizer.
    """
    known = int(text_cfg.get("vocab_size", 0))
    if config.init and known:
        return known
    return max(known, tokenizer.vocab_size) if config.clip_config else tokenizer.vocab_size


def _filled(given: PreprocessConfig, own: PreprocessConfig) -> PreprocessConfig:
    """`given`, with what it leaves open from `own`."""
    left_open = vars(PreprocessConfig())
    values = vars(given).items()
    return PreprocessConfig(**{k: getattr(own, k) if v == left_open[k] else v for k, v in values})


def _text_changes(
    text_cfg: dict[str, Any], tokenizer: TextTokenizer, vocab_size: int
) -> dict[str, Any]:
    """The settings of a native text tower that its tokenizer decides: the number of tokens and
    where to pool.

    open_clip pools at the highest id of a text, which is right only if the end token has the
    highest id of all.

    Raises:
        ValueError: the tower would pool at a wrong token.
    """
    changes: dict[str, Any] = {"vocab_size": vocab_size}
    if reads_padding(text_cfg):
        return changes
    end, pool_type = end_token_id(tokenizer), text_cfg.get("pool_type")
    is_highest = end == tokenizer.vocab_size - 1
    if pool_type == "argmax" and not is_highest:
        raise ValueError(
            f"text_cfg.pool_type is argmax, which pools at the highest id, but the tokenizer's end "
            f"token is {end} of {tokenizer.vocab_size}; leave pool_type out, or make it eos"
        )
    if pool_type == "eos" and text_cfg.setdefault("eos_id", end) != end:
        raise ValueError(
            f"text_cfg.eos_id is {text_cfg['eos_id']}, but the tokenizer ends texts with {end}"
        )
    if pool_type is None and not is_highest:
        changes |= {"pool_type": "eos", "eos_id": end}
    return changes
